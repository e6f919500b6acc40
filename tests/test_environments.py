"""What people bring as an environment: what goes in, and what comes out of it.

Each row of the tables below is one kind of environment. It trains and is evaluated, or one line names the
flag and says what to do.
"""

import importlib
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MLP
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
    "a matrix": Box(-1, 1, (4, 3), np.float64),
    "bytes": Box(0, 255, (8,), np.uint8),
    "a Dict": Dict({"here": VECTOR, "goal": Discrete(3)}),
    "a Dict in a Dict": Dict({"arm": Dict({"angle": VECTOR}), "goal": Discrete(3)}),
    "a Tuple": Tuple([VECTOR, Discrete(2), Box(-1, 1, (), np.float32)]),
    "a Tuple in a Dict": Dict({"both": Tuple([VECTOR, MultiBinary(2)])}),
}
RETURNS = {
    "a list": {"obs": [1.0, 2.0, 3.0]},
    "another dtype": {"obs": np.array([1, 2, 3], np.int64)},
    "outside of its space": {"observation_space": Box(-1, 1, (3,), np.float32), "obs": np.full(3, 9.0)},
    "a reward of shape (1,)": {"reward": np.ones(1)},
    "a reward that is an int": {"reward": 1},
    "ends as ints": {"end": int},
    "ends as numpy's bools": {"end": np.bool_},
}
ACTIONS = {
    "ppo_discrete": {
        "one action": Discrete(1),
        "int32": Discrete(3, dtype=np.int32),
        "MultiDiscrete": MultiDiscrete([2, 3]),
        "a matrix of choices": MultiDiscrete([[2, 3], [4, 2]]),
        "MultiBinary": MultiBinary(3),
        "a matrix of switches": MultiBinary([2, 2]),
    },
    "ppo_continuous": {
        "one number": Box(-1, 1, (1,), np.float32),
        "float64": Box(-2, 2, (2,), np.float64),
        "without bounds": Box(-np.inf, np.inf, (2,), np.float32),
        "integers": Box(0, 5, (2,), np.int64),
    },
}
TRAINS = [(name, {"observation_space": space}, what) for name in MLP for what, space in OBSERVATIONS.items()]
TRAINS += [(name, changes, what) for name in MLP for what, changes in RETURNS.items()]
TRAINS += [(name, {"action_space": x}, what) for name in MLP for what, x in ACTIONS[name].items()]


@pytest.mark.filterwarnings("ignore")  # gymnasium says what it thinks of some of them
@pytest.mark.parametrize("name, kwargs, what", TRAINS, ids=[f"{name}-{what}" for name, _, what in TRAINS])
def test_it_trains_and_is_evaluated(train, monkeypatch, name, kwargs, what):
    script = importlib.import_module(name)
    result = train(script, make(name, monkeypatch, **kwargs), iterations=2)
    assert result["episodic_return"] == 5.0
    assert all(torch.isfinite(x).all() for x in result["agent"].parameters())
    assert script.evaluate(result["run_dir"], 2).tolist() == [5.0, 5.0]


# --- these are refused in one line ---

REFUSED = {
    "text": (Text(8), "observation is Text"),
    "text in a Dict": (Dict({"image": VECTOR, "mission": Text(8)}), "observation['mission'] is Text"),
    "a sequence": (Sequence(VECTOR), "observation is Sequence"),
    "a sequence in a Tuple": (Tuple([VECTOR, Sequence(VECTOR)]), "observation[1] is Sequence"),
    "a graph": (Graph(VECTOR, None), "observation is Graph"),
    "a picture": (PICTURE, "observation is pixels (16, 16, 3)"),
    "a picture in a Dict": (Dict({"screen": PICTURE, "speed": VECTOR}), "observation['screen'] is pixels"),
    "a picture in a Tuple": (Tuple([VECTOR, Dict({"eye": PICTURE})]), "observation[1]['eye'] is pixels"),
}


@pytest.mark.parametrize("name", MLP)
@pytest.mark.parametrize("what", REFUSED)
def test_observations_that_are_no_numbers_are_refused(refused, monkeypatch, name, what):
    space, words = REFUSED[what]
    env_id = make(name, monkeypatch, observation_space=space)
    refused(importlib.import_module(name), ["--env-id", env_id], f"--env-id {env_id}", words)


@pytest.mark.parametrize(
    "name, space, words",
    [
        ("ppo_discrete", Box(-1, 1, (2,), np.float32), "ppo_continuous.py"),
        ("ppo_discrete", Discrete(3, start=1), "Discrete from 0"),
        ("ppo_discrete", Tuple([Discrete(2), Discrete(2)]), "(Multi)Discrete"),
        ("ppo_discrete", Dict({"a": Discrete(2)}), "(Multi)Discrete"),
        ("ppo_continuous", Discrete(3), "ppo_discrete.py"),
        ("ppo_continuous", MultiDiscrete([2, 2]), "ppo_discrete.py"),
        ("ppo_continuous", MultiBinary(2), "ppo_discrete.py"),
        ("ppo_continuous", Box(-1, 1, (), np.float32), "not in a Box of vectors"),
        ("ppo_continuous", Box(-1, 1, (2, 2), np.float32), "not in a Box of vectors"),
    ],
)
def test_actions_of_another_kind_are_refused(refused, monkeypatch, name, space, words):
    env_id = make(name, monkeypatch, action_space=space)
    refused(importlib.import_module(name), ["--env-id", env_id], f"--env-id {env_id} acts in", words)


@pytest.mark.parametrize("name", MLP)
def test_a_film_needs_a_render_mode(monkeypatch, name):
    """The environment's own error, before the training."""
    script = importlib.import_module(name)
    with pytest.raises(TypeError, match="render_mode"):
        script.train(script.Args(env_id=make(name, monkeypatch), capture_video=True))


# --- and these are subtle ---


@pytest.mark.parametrize("low, high, warns", [(300, 500, True), (-0.01, 0.01, True), (-2, 2, False)])
def test_actions_that_cannot_be_learned_are_not_silent(monkeypatch, low, high, warns):
    """The policy begins with actions near 0, of a size of about 1."""
    script = importlib.import_module("ppo_continuous")
    env_id = make("ppo_continuous", monkeypatch, action_space=Box(low, high, (2,), np.float32))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script.make_envs(script.Args(env_id=env_id), 1).close()
    said = [str(x.message) for x in caught if "RescaleAction" in str(x.message)]
    assert len(said) == warns and all(f"--env-id {env_id} acts in" in x for x in said)


class InPlace(gym.Env):
    """Observes the number of steps, in the same array each time."""

    observation_space = VECTOR

    def __init__(self, action_space):
        self.action_space, self.obs = action_space, np.zeros(3, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 0
        return self.obs, {}

    def step(self, action):
        self.obs += 1
        return self.obs, 1.0, False, False, {}


@pytest.mark.parametrize("name", MLP)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_the_final_observation_is_not_that_after_the_reset(monkeypatch, name, vectorization):
    """A time limit of 8 steps: V(8) is the value of what was cut off, V(0) that of another episode."""
    script = importlib.import_module(name)
    actions = Discrete(2) if name == "ppo_discrete" else Box(-1, 1, (1,), np.float32)
    spec = gym.envs.registration.EnvSpec("Odd-v0", entry_point=InPlace, kwargs={"action_space": actions})
    monkeypatch.setitem(gym.registry, "Odd-v0", spec)
    args = script.Args(env_id="Odd-v0", max_episode_steps=8, norm_reward=False, vectorization=vectorization)
    envs = script.make_envs(args, 2)
    envs.reset(seed=1)
    shape = (2,) if name == "ppo_discrete" else (2, 1)
    for step in range(1, 9):
        obs, _, _, truncated, infos = envs.step(np.zeros(shape, int))
        if step < 8:
            assert (obs == step).all() and not truncated.any()
    assert truncated.all() and (obs == 0).all()
    assert (np.stack(infos["final_obs"]) == 8).all()
    envs.close()


class NoFile(Odd):
    def reset(self, *, seed=None, options=None):
        raise FileNotFoundError(2, "No such file or directory: 'level.txt'")


@pytest.mark.parametrize("name", MLP)
def test_an_error_of_the_environment_keeps_its_traceback(monkeypatch, name):
    """Also one that could be taken for bad input."""
    script = importlib.import_module(name)
    make(name, monkeypatch)
    gym.registry["Odd-v0"].entry_point = NoFile
    monkeypatch.setattr("sys.argv", [name, "--env-id", "Odd-v0"])
    with pytest.raises(FileNotFoundError, match=r"level\.txt"):
        script.main()
