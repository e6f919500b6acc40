"""What people bring as an environment: what goes in, and what comes out of it.

Each row of the tables below is one kind of environment. It trains and is evaluated, or one line names the
flag and says what to do.
"""

import importlib
import warnings
from contextlib import closing
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import stub_envs
import torch
from conftest import NAMES
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple

VECTOR = Box(-np.inf, np.inf, (3,), np.float32)
PICTURE = Box(0, 255, (16, 16, 3), np.uint8)


class Odd(gym.Env):
    """Samples of its spaces, reward 1, episodes of 5 steps; obs, reward, end: what is returned instead."""

    def __init__(self, observation_space, action_space, obs=None, reward=1.0, end=bool):
        self.observation_space, self.action_space = observation_space, action_space
        self.obs, self.reward, self.end = obs, reward, end

    def observe(self):
        return self.observation_space.sample() if self.obs is None else self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        assert np.asarray(action).dtype == self.action_space.dtype
        self.count += 1
        return self.observe(), self.reward, self.end(self.count == 5), self.end(False), {}


def make(name, monkeypatch, **kwargs):
    """Registers it under an id, with the actions of the script if no others are named."""
    actions = Discrete(3) if name == "ppo_discrete" else Box(-1, 1, (2,), np.float32)
    kwargs = {"observation_space": VECTOR, "action_space": actions} | kwargs
    spec = gym.envs.registration.EnvSpec("Odd-v0", entry_point=Odd, kwargs=kwargs, disable_env_checker=True)
    monkeypatch.setitem(gym.registry, "Odd-v0", spec)
    return "Odd-v0"


# --- these train ---

OBSERVATIONS = {
    "a number": Box(-1, 1, (), np.float32),
    "an integer": Discrete(4),
    "integers": MultiDiscrete([3, 4]),
    "switches": MultiBinary(5),
    "booleans": Box(0, 1, (3,), bool),
    "a matrix": Box(-1, 1, (4, 3), np.float64),
    "bytes": Box(0, 255, (8,), np.uint8),
    "a Dict in a Dict": Dict({"arm": Dict({"angle": VECTOR}), "goal": Discrete(3)}),
    "a Tuple in a Dict": Dict({"both": Tuple([VECTOR, MultiBinary(2)])}),
}
RETURNS = {
    "a list": {"obs": [1.0, 2.0, 3.0]},
    "another dtype": {"obs": np.array([1, 2, 3], np.int64)},
    "outside of its space": {"observation_space": Box(-1, 1, (3,), np.float32), "obs": np.full(3, 9.0)},
    "a reward of shape (1,)": {"reward": np.ones(1)},
    "a reward that is an int": {"reward": 1},
    "ends as numpy's bools": {"end": np.bool_},
}
ACTIONS = {
    "ppo_discrete": {
        "one action": Discrete(1),
        "int32": Discrete(3, dtype=np.int32),
        "int8 MultiDiscrete": MultiDiscrete([2, 3], dtype=np.int8),
        "a matrix of choices": MultiDiscrete([[2, 3], [4, 2]]),
        "a matrix of switches": MultiBinary([2, 2]),
    },
    "ppo_continuous": {
        "float64": Box(-0.3, 0.3, (2,), np.float64),
        "float16": Box(-0.3, 0.3, (2,), np.float16),
        "half without bounds": Box(-0.3, np.inf, (2,), np.float32),
        "bytes": Box(0, 3, (2,), np.uint8),
        "booleans": Box(0, 1, (2,), bool),
    },
}


@pytest.mark.parametrize("what", OBSERVATIONS)
def test_observations_become_float_vectors(mlp_script, train, watch, monkeypatch, what):
    """Numbers, matrices and dictionaries are flattened; the networks get float32 whatever the dtype is."""
    seen, space = watch(mlp_script), OBSERVATIONS[what]
    result = train(mlp_script, make(mlp_script.__name__, monkeypatch, observation_space=space))
    rows = []
    for seed in (1, 2):
        space.seed(seed)
        rows.append(np.ravel(gym.spaces.flatten(space, space.sample())))
    assert seen.acted[0].dtype == torch.float32
    torch.testing.assert_close(seen.acted[0], torch.as_tensor(np.stack(rows)).float())
    assert mlp_script.evaluate(result["run_dir"], 2).tolist() == [5.0, 5.0]


TRAINS = [("ppo_discrete", changes, what) for what, changes in RETURNS.items()]
TRAINS += [(name, {"action_space": x}, what) for name in ACTIONS for what, x in ACTIONS[name].items()]


@pytest.mark.filterwarnings("ignore")  # gymnasium says what it thinks of some of them
@pytest.mark.parametrize("name, kwargs, what", TRAINS, ids=[f"{name}-{what}" for name, _, what in TRAINS])
def test_b40_it_trains_and_is_evaluated(train, monkeypatch, name, kwargs, what):
    """The environment refuses actions of another dtype than its own, or out of bounds."""
    script = importlib.import_module(name)
    result = train(script, make(name, monkeypatch, **kwargs), iterations=2)
    assert result["episodic_return"] == 5.0
    assert all(torch.isfinite(x).all() for x in result["agent"].parameters())
    assert script.evaluate(result["run_dir"], 2).tolist() == [5.0, 5.0]


# --- these are refused in one line ---

REFUSED = {
    "text in a Dict": (Dict({"image": VECTOR, "mission": Text(8)}), "observation['mission'] is Text"),
    "a sequence": (Sequence(VECTOR), "observation is Sequence"),
    "a graph": (Graph(VECTOR, None), "observation is Graph"),
    "a picture": (PICTURE, "observation is pixels (16, 16, 3)"),
    "a picture in a Tuple": (Tuple([VECTOR, Dict({"eye": PICTURE})]), "observation[1]['eye'] is pixels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_observations_that_are_no_numbers_are_refused(mlp_script, refused, monkeypatch, what):
    space, words = REFUSED[what]
    env_id = make(mlp_script.__name__, monkeypatch, observation_space=space)
    refused(mlp_script, ["--env-id", env_id], f"--env-id {env_id}", words)


@pytest.mark.parametrize(
    "name, space, words",
    [
        ("ppo_discrete", Box(-1, 1, (2,), np.float32), "ppo_continuous.py"),
        ("ppo_discrete", Discrete(3, start=1), "Discrete from 0"),
        ("ppo_discrete", Tuple([Discrete(2), Discrete(2)]), "(Multi)Discrete"),
        ("ppo_continuous", MultiDiscrete([2, 2]), "ppo_discrete.py"),
        ("ppo_continuous", Box(-1, 1, (), np.float32), "ppo_continuous.py a 1-D Box"),
        ("ppo_continuous", Box(-1, 1, (2, 2), np.float32), "ppo_continuous.py a 1-D Box"),
    ],
)
def test_actions_of_another_kind_are_refused(refused, monkeypatch, name, space, words):
    env_id = make(name, monkeypatch, action_space=space)
    refused(importlib.import_module(name), ["--env-id", env_id], f"--env-id {env_id} acts in", words)


# --- and these are subtle ---


@pytest.mark.parametrize(
    "low, high, warns",
    [(300, 500, True), (-0.01, 0.01, True), (2, 5, True), (-5, -2, True), (0, 1, False), (-2, 2, False)],
)
def test_actions_that_cannot_be_learned_are_not_silent(continuous, monkeypatch, low, high, warns):
    """The policy begins with actions near 0, of a size of about 1."""
    env_id = make("ppo_continuous", monkeypatch, action_space=Box(low, high, (2,), np.float32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        continuous.make_envs(continuous.Args(env_id=env_id), 1).close()
    said = [str(x.message) for x in caught if "RescaleAction" in str(x.message)]
    assert len(said) == warns and all(f"--env-id {env_id} acts in" in x for x in said)


class Batched(gym.vector.VectorEnv):
    """Environments in one array, as docs/usage.md wants them: reward 1, a time limit after three steps."""

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    single_observation_space = VECTOR

    def __init__(self, num_envs, actions):
        self.num_envs, self.single_action_space = num_envs, actions
        self._state = np.zeros(3)  # AsyncVectorEnv has this name, too

    def reset(self, *, seed=None, options=None):
        self.steps = np.zeros(self.num_envs)
        return np.tile(self._state, (self.num_envs, 1)), {}

    def step(self, actions):
        self.steps = self.steps % 3 + 1
        obs, never = np.tile(self._state, (self.num_envs, 1)), np.zeros(self.num_envs, bool)
        return obs, np.ones(self.num_envs), never, self.steps == 3, {"final_obs": obs}


def test_a_vector_environment_of_ones_own_trains_and_is_evaluated(mlp_script, train, monkeypatch):
    actions = Discrete(3) if mlp_script.__name__ == "ppo_discrete" else Box(-1, 1, (2,), np.float32)

    def make_envs(args, num_envs, video_folder=None):
        return mlp_script.LearningEnvs(Batched(num_envs, actions), args)

    monkeypatch.setattr(mlp_script, "make_envs", make_envs)
    result = train(mlp_script, "Count")
    assert result["episodic_return"] == 3
    assert mlp_script.evaluate(result["run_dir"], num_episodes=2).tolist() == [3, 3]


def test_a_vector_environment_that_spends_a_step_on_a_reset_is_refused(script):
    """gymnasium's default; statistics and batch would count the rows of resets."""
    envs = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    with closing(envs), pytest.raises(AssertionError):
        script.LearningEnvs(envs, script.Args())


@pytest.mark.parametrize("error", [KeyError, FileNotFoundError])
def test_an_error_of_the_environment_keeps_its_traceback(discrete, monkeypatch, error):
    """Also one that could be taken for bad input: main takes only refusals and nan for its own."""

    def step(self, action):
        raise error("a mistake of the environment")

    monkeypatch.setattr(stub_envs.Count, "step", step)
    monkeypatch.setattr("sys.argv", [NAMES[0], "--env-id", "stub_envs:Count-v0"])
    with pytest.raises(error, match="a mistake"):
        discrete.main()
