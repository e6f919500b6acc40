"""What make_envs returns: ends of episodes, rewards as the agent learns from them, spaces, lives, games."""

import itertools
import math

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import stub_envs
import torch
from conftest import GAMES, same, state, statistics
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from stub_envs import ids

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def make(play):
    """make(script, stub, num_envs, **flags): the environments of a stub, raw unless a flag says otherwise."""
    made = []

    def start(script, name, num_envs=2, **flags):
        if script.__name__ != "ppo_atari":
            flags = {"norm_reward": False, "norm_obs": False} | flags
        made.append(script.make_envs(script.Args(env_id=play(script, name), **flags), num_envs))
        return made[-1]

    yield start
    for envs in made:
        envs.close()


def steps(envs, number, action=None):
    """The results of so many steps, each with the same action, by default 0."""
    action = np.zeros_like(envs.action_space.sample()) if action is None else action
    return [envs.step(action) for _ in range(number)]


def register(monkeypatch, env_id, factory):
    """A new --env-id for the length of a test."""
    monkeypatch.setitem(gym.registry, env_id, gym.envs.registration.EnvSpec(env_id, entry_point=factory))


# --- ends of episodes ---


def test_b01_a_new_episode_begins_in_the_step_that_ends_one(script, make):
    """obs is the first of the next episode, final_obs the last of this one; no reward is 0 [ours 2]."""
    envs = make(script, "Count")
    envs.reset(seed=1)
    results = steps(envs, 6)
    seen = [ids(torch.as_tensor(obs))[:, :2].tolist() for obs, *_ in results]
    assert [x[0] for x in seen] == [[1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 2]]
    assert [x[2].tolist() for x in results] == [[False] * 2, [False] * 2, [True] * 2] * 2
    assert not any(x[3].any() for x in results) and all((x[1] == 1).all() for x in results)
    for end in results[2], results[5]:
        assert ids(torch.as_tensor(np.stack(end[4]["final_obs"])))[:, 0].tolist() == [3, 3]


def test_b28_episodes_are_recorded_whole_and_raw(script, make):
    """By their sums of rewards and their lengths, truncated ones too, each from its own start."""
    flags = {} if script.__name__ == "ppo_atari" else {"norm_reward": True}
    envs = make(script, "CountMixed", 1, **flags)
    envs.reset(seed=1)
    steps(envs, 10)
    assert list(envs.return_queue) == list(envs.length_queue) == [2.0, 3.0, 2.0, 3.0]


def test_one_environment_needs_no_other_process(mlp_script, make):
    """--vectorization async matters from two environments on."""
    assert isinstance(make(mlp_script, "Count", 1, vectorization="async").unwrapped, gym.vector.SyncVectorEnv)
    assert isinstance(
        make(mlp_script, "Count", 2, vectorization="async").unwrapped, gym.vector.AsyncVectorEnv
    )


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_odd_infos_do_no_harm(mlp_script, train, make, vectorization):
    """Ragged arrays, None, a key "episode", from reset as well: the run is the one without them."""
    envs = make(mlp_script, "OddInfos", 3, vectorization=vectorization)
    _, infos = envs.reset(seed=1)
    assert not infos
    for number, (*_, infos) in enumerate(steps(envs, 6), 1):
        assert infos.keys() <= {"final_obs", "_final_obs", "final_info", "_final_info", "episode", "_episode"}
        assert ("episode" in infos) == (number % 3 == 0)
    assert infos["episode"]["r"].tolist() == [3.0] * 3
    odd, plain = (
        train(mlp_script, name, 2, num_envs=3, num_steps=8, vectorization=vectorization)
        for name in ("OddInfos", "Count")
    )
    assert same(state(odd["agent"]), state(plain["agent"]))
    assert odd["episodic_return"] == 3.0 == plain["episodic_return"]
    assert mlp_script.evaluate(odd["run_dir"], 3).tolist() == [3.0] * 3


# --- rewards of vector environments ---


def scaled_rewards(make, script, story, num_envs, number, **flags):
    """Of the first steps of environments with seeds from 1: a list of (num_envs,) arrays."""
    envs = make(script, story, num_envs, norm_reward=True, **flags)
    envs.reset(seed=1)
    return [rewards for _, rewards, *_ in steps(envs, number)]


@pytest.mark.parametrize("story", ["CountTruncated", "CountMinus", "Count"])
def test_b33_reward_scale_is_the_std_of_the_discounted_return(mlp_script, make, story):
    """gamma 1, ends at 3: the accumulator goes 1, 2, 3, 1, 2, 3; sign kept, no mean, clipped to +-10."""
    sign = -1 if story == "CountMinus" else 1
    rewards = [x[0] for x in scaled_rewards(make, mlp_script, story, 1, 6, gamma=1.0)]
    sums = [1, 2, 3, 1, 2, 3]
    expected = [sign * min(1 / math.sqrt(np.var(sums[: t + 1]) + 1e-8), 10) for t in range(6)]
    assert rewards == pytest.approx(expected, rel=1e-6)
    assert rewards[0] == 10 * sign


def test_b33_reward_scale_uses_gamma(mlp_script, make):
    """gamma 0.5: the accumulator goes 1, 1.5, 1.75, 1."""
    rewards = [x[0] for x in scaled_rewards(make, mlp_script, "CountTruncated", 1, 4, gamma=0.5)]
    assert rewards[3] == pytest.approx(1 / np.std([1, 1.5, 1.75, 1]), rel=1e-6)


def test_b33_only_the_environment_that_ended_begins_anew(mlp_script, make):
    """The first one ends after 2 and 3 steps, the second one never: its accumulator goes on."""
    envs = make(mlp_script, "CountMixed", 2, norm_reward=True, gamma=1.0)
    envs.reset(seed=1)
    envs.unwrapped.envs[1].unwrapped.ends = []
    scaled, sums = [x[1][0] for x in steps(envs, 5)], [[1, 1], [2, 2], [1, 3], [2, 4], [3, 5]]
    assert scaled[1:] == pytest.approx([1 / np.std(sums[: t + 1]) for t in range(1, 5)], rel=1e-6)


def test_b34_all_environments_share_the_reward_scale(mlp_script, make):
    """Rewards of 10 and 100 in the two environments keep their proportion."""
    rewards = scaled_rewards(make, mlp_script, "CountScale", 2, 6)
    sums = np.cumsum([0.99**t for t in range(6)])[:, None] * [10, 100]
    assert rewards[-1] == pytest.approx([10 / np.std(sums), 100 / np.std(sums)], rel=1e-6)


def test_b27_episodes_count_raw_rewards_where_scaled_ones_are_learnt_from(mlp_script, make):
    """Rewards 4 and 7: the return is 11 with and without scaling, and only scaling changes the rewards."""
    for norm_reward in (False, True):
        envs = make(mlp_script, "Points", norm_reward=norm_reward)
        envs.reset(seed=1)
        (_, first, *_), (_, second, *_, infos) = steps(envs, 2)
        assert ((first == 4).all() and (second == 7).all()) != norm_reward
        assert infos["episode"]["r"].tolist() == [11.0, 11.0] == list(envs.return_queue)


@pytest.mark.parametrize("gamma", [0.0, 0.99])
@pytest.mark.parametrize("num_envs", [3, 7])
def test_scale_of_large_constant_rewards_is_a_number(mlp_script, make, monkeypatch, gamma, num_envs):
    """54321.9 in 7 environments: the variance of equal numbers has a root, and nothing is nan."""
    story = {"ends": [], "reward": lambda step, tag: 54321.9}
    register(monkeypatch, "Large-v0", lambda **kwargs: stub_envs.Count(**story, **kwargs))
    register(monkeypatch, "LargeBox-v0", lambda **kwargs: stub_envs.Count(**story, box=True, **kwargs))
    env_id = "Large-v0" if mlp_script.__name__ == "ppo_discrete" else "LargeBox-v0"
    envs = mlp_script.make_envs(mlp_script.Args(env_id=env_id, norm_reward=True, gamma=gamma), num_envs)
    envs.reset(seed=1)
    for _ in range(200):
        ((_, rewards, *_),) = steps(envs, 1)
        assert (rewards > 0).all() and (rewards <= 10).all()
    assert (rewards == 10).all() == (gamma == 0)  # without a future all returns are the same


# --- spaces ---

VECTORS = {
    "Dict": 6,
    "DiscreteObs": 5,
    "Matrix": 6,
    "Float64": 3,
    "Integer": 3,
    "Boolean": 3,
    "MultiBinary": 4,
}


@pytest.mark.parametrize("name", VECTORS)
def test_observations_become_float_vectors(mlp_script, train, watch, name):
    """Numbers, matrices and dictionaries are flattened; the networks get float32 whatever the dtype is."""
    seen = watch(mlp_script)
    agent = train(mlp_script, name)["agent"]
    space = stub_envs.SPACES[name]
    rows = []
    for seed in (1, 2):
        space.seed(seed)
        rows.append(gym.spaces.flatten(space, space.sample()))
    assert agent.get_value(torch.zeros(1, VECTORS[name])).shape == (1,)
    assert seen.acted[0].dtype == torch.float32
    torch.testing.assert_close(seen.acted[0], torch.as_tensor(np.stack(rows)).float())


@pytest.mark.parametrize("name", ["Boolean", "MultiBinary", "Integer", "DiscreteObs", "Float64"])
def test_observations_of_any_dtype_are_normalised(mlp_script, train, watch, monkeypatch, name):
    """The statistics are those of the same numbers as floats."""
    received, normalize, seen = [], mlp_script.Agent.normalize, watch(mlp_script)

    def spy(self, raw_obs, update=False):
        if update:
            received.append(raw_obs.clone())
        return normalize(self, raw_obs, update)

    monkeypatch.setattr(mlp_script.Agent, "normalize", spy)
    now, raw = statistics(train(mlp_script, name, norm_obs=True)["agent"]), torch.cat(received)
    assert raw.dtype == {"Boolean": torch.bool, "MultiBinary": torch.int8}.get(name, raw.dtype)
    acted = torch.cat(seen.acted)
    assert acted.dtype == torch.float32 and acted.isfinite().all() and len(acted) == now["count"] == 16
    last = acted[-2:].double() * (now["var"] + 1e-8).sqrt() + now["mean"]
    torch.testing.assert_close(last, raw[-2:].double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(now["mean"], raw.double().mean(0))
    torch.testing.assert_close(now["var"], raw.double().var(0, correction=0))


KINDS = {
    "int32 MultiDiscrete": MultiDiscrete([3, 2], dtype=np.int32),
    "int8 MultiDiscrete": MultiDiscrete([3, 2], dtype=np.int8),
    "table MultiDiscrete": MultiDiscrete([[2, 3], [4, 1]]),
    "int32 Discrete": Discrete(3, dtype=np.int32),
    "int32 Box": Box(-2, 3, (2,), np.int32),
    "uint8 Box": Box(0, 3, (2,), np.uint8),
    "boolean Box": Box(0, 1, (2,), bool),
    "float16 Box": Box(-0.3, 0.3, (2,), np.float16),
    "float64 Box": Box(-0.3, 0.3, (2,), np.float64),
    "half-open Box": Box(-0.3, math.inf, (2,), np.float32),
}


class Receiver(stub_envs.Stub):
    """Keeps the actions that it receives."""

    def __init__(self, space, **kwargs):
        super().__init__(space=space, **kwargs)
        self.received = []

    def step(self, action):
        self.received.append(action)
        return super().step(action)


@pytest.mark.filterwarnings("ignore:.*Getting the length of a multi-dimensional")
@pytest.mark.parametrize("kind", KINDS)
def test_b40_actions_have_the_dtype_and_the_bounds_of_the_space(
    discrete, continuous, monkeypatch, train, kind
):
    """In training and in evaluation, where a policy gives int64 or, far beyond the bounds, float32."""
    space, made = KINDS[kind], []

    def factory(render_mode=None):
        made.append(Receiver(space))
        return gym.wrappers.TimeLimit(made[-1], 5)

    register(monkeypatch, "Receiver-v0", factory)
    script = continuous if isinstance(space, Box) else discrete
    flags = {"init_log_std": 1.5} if script is continuous else {}
    result = train(script, "Receiver-v0", **flags)
    script.evaluate(result["run_dir"], 2)
    actions = [action for env in made for action in env.received]
    assert len(actions) == 2 * 8 + 2 * 5
    assert all(action.dtype == space.dtype and space.contains(action) for action in actions)
    assert len({action.tobytes() for action in actions}) > 1


def test_actions_of_an_integer_box_are_rounded(continuous, monkeypatch):
    """To the nearest, after clipping: cutting decimals off would make 0 twice as wide as any other."""
    made = []
    register(
        monkeypatch,
        "Receiver-v0",
        lambda render_mode=None: made.append(Receiver(Box(-2, 3, (2,), np.int32))) or made[0],
    )
    envs = continuous.make_envs(continuous.Args(env_id="Receiver-v0", norm_reward=False), 1)
    envs.reset(seed=1)
    for action in ([0.6, -0.6], [-1.4, 2.7], [-9.0, 9.0], [0.4, -0.4]):
        envs.step(np.array([action], np.float32))
    assert [x.tolist() for x in made[0].received] == [[1, -1], [-1, 3], [-2, 3], [0, 0]]


def test_actions_are_sent_clipped_and_left_as_they_are(continuous, make):
    """The array of the caller, which goes into the buffer, keeps the unclipped ones (CleanRL's #240)."""
    envs = make(continuous, "Count", 2)
    envs.reset(seed=1)
    actions = np.array([[5.0, -5.0], [0.1, 0.2]], np.float32)
    envs.step(actions)  # the stub refuses what is beyond 0.3
    assert actions.tolist() == np.array([[5.0, -5.0], [0.1, 0.2]], np.float32).tolist()


# --- Atari: lives and rewards ---

FIRE, RIGHT = 1, 2


@pytest.fixture
def sent(monkeypatch):
    """The actions that reach the emulator, a list of arrays."""
    actions, step = [], stub_envs.FakeAtari.step

    def spy(self, action):
        actions.append(action.copy())
        return step(self, action)

    monkeypatch.setattr(stub_envs.FakeAtari, "step", spy)
    return actions


def test_b26_a_lost_life_terminates_and_the_game_goes_on(atari, make):
    """Lives 3, 2, 2, 1, 1 and the end: three terminations, one game, one record of it with all its points."""
    envs = make(atari, "Lives")
    envs.reset(seed=1)
    results = steps(envs, 6)
    assert [x[2].tolist() for x in results] == [[x] * 2 for x in (False, True, False, True, False, True)]
    assert not any(x[3].any() for x in results)
    assert [ids(torch.as_tensor(x[0]))[0, :2].tolist() for x in results[:5]] == [[t, 0] for t in range(1, 6)]
    assert ["episode" in x[4] for x in results] == [False] * 5 + [True]
    assert results[-1][4]["episode"]["r"].tolist() == [11.0, 11.0] == list(envs.return_queue)


def test_b27_rewards_are_signs_and_episodes_count_points(atari, make, monkeypatch):
    """Points of 4, 0, -7 become 1, 0, -1; the record says -3."""
    points = {"ends": [(3, "terminated")], "reward": lambda step, tag: (4, 0, -7)[step]}
    monkeypatch.setitem(GAMES, "Debts", points)
    envs = make(atari, "Debts")
    envs.reset(seed=1)
    results = steps(envs, 3)
    assert [x[1].tolist() for x in results] == [[1, 1], [0, 0], [-1, -1]]
    assert results[-1][4]["episode"]["r"].tolist() == [-3.0, -3.0]


def test_fire_is_pressed_after_a_lost_life(atari, make, sent):
    """In the very next step, and then no more; the caller's array keeps the action of the agent."""
    envs = make(atari, "Lives")
    envs.reset(seed=1)
    actions = np.full(2, RIGHT)
    steps(envs, 8, actions)  # lives are lost in steps 2 and 4, the game ends in step 6
    assert [x.tolist() for x in sent] == [[x] * 2 for x in (2, 2, FIRE, 2, FIRE, 2, 2, 2)]
    assert actions.tolist() == [RIGHT] * 2


@pytest.fixture
def lives(make, atari, monkeypatch):
    """lives(numbers of lives after each step): environments whose games end with the last of them."""

    def start(numbers, how="terminated", num_envs=1):
        story = {"ends": [(len(numbers), how)], "lives": numbers}
        monkeypatch.setitem(GAMES, "Story", story)
        envs = make(atari, "Story", num_envs)
        envs.reset(seed=1)
        return envs

    return start


@pytest.mark.parametrize("how", ["terminated", "truncated"])
def test_the_end_of_a_game_is_no_lost_life(lives, sent, how):
    """A bonus life makes 4, the next game has 3: no FIRE, and a time limit stays one."""
    envs = lives((4, 4, 3), how)
    results = steps(envs, 6, np.array([RIGHT]))
    assert [x[2][0] for x in results] == ([False, False, True] * 2 if how == "terminated" else [False] * 6)
    assert [x[3][0] for x in results] == ([False, False, True] * 2 if how == "truncated" else [False] * 6)
    assert [x[0] for x in sent] == [RIGHT] * 6


def test_no_lives_left_is_no_lost_life(lives, sent):
    """Some games play on with 0 lives until they are over: their last steps belong to the same return."""
    envs = lives((2, 0, 0, 3))
    results = steps(envs, 4, np.array([RIGHT]))
    assert [x[2][0] for x in results] == [True, False, False, True]
    assert [x[0] for x in sent] == [RIGHT, FIRE, RIGHT, RIGHT]


def test_only_the_game_that_lost_a_life_is_fired_at(lives, sent, monkeypatch):
    """The second game is over where the first one loses a life."""
    envs = lives((3, 2, 2, 3), num_envs=2)
    monkeypatch.setattr(envs.unwrapped.games[1], "ends", [(2, "terminated")])
    results = steps(envs, 4, np.array([RIGHT, RIGHT]))
    assert [x[2].tolist() for x in results] == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]
    assert [x.tolist() for x in sent] == [[RIGHT] * 2, [RIGHT] * 2, [FIRE, RIGHT], [RIGHT] * 2]


@pytest.mark.parametrize(("env_id", "first"), [("BreakoutNoFrameskip-v4", RIGHT), ("ALE/Breakout-v5", FIRE)])
def test_with_sticky_actions_fire_begins_every_game(atari, sent, monkeypatch, env_id, first):
    """In two steps: the emulator presses it for one frame, in which a sticky action may take its place."""
    monkeypatch.setattr(stub_envs.FakeAtari, "story", {"ends": [(3, "terminated"), (3, "truncated")] * 2})
    monkeypatch.setattr(ale_py, "AtariVectorEnv", stub_envs.FakeAtari)
    envs = atari.make_envs(atari.Args(env_id=env_id), 1)
    envs.reset(seed=1)
    steps(envs, 7, np.array([RIGHT]))
    envs.reset(seed=1)
    steps(envs, 1, np.array([RIGHT]))
    assert [x[0] for x in sent] == [first, first, RIGHT] * 2 + [first, first]


@pytest.mark.parametrize(("sticky", "second"), [(0.0, RIGHT), (0.25, FIRE)])
def test_with_sticky_actions_fire_is_pressed_twice_after_a_lost_life(lives, sent, sticky, second):
    envs = lives((2, 1, 1, 1, 1, 2))
    envs = type(envs)(envs.env, sticky)
    envs.reset(seed=1)
    steps(envs, 5, np.array([RIGHT]))
    assert [x[0] for x in sent][2:] == [FIRE, second, RIGHT]


def test_no_ball_waits_for_a_sticky_agent_that_does_nothing(atari):
    """Twelve games of Breakout without an action: in the first 100 steps every one of them loses a ball."""
    envs = atari.make_envs(atari.Args(env_id="ALE/Breakout-v5", num_threads=1), 12)
    _, infos = envs.reset(seed=1)
    fewest = infos["lives"]
    for _ in range(100):
        fewest = np.minimum(fewest, envs.step(np.zeros(12, np.int64))[4]["lives"])
    assert fewest.max() < 5


def test_reset_forgets_a_lost_life(lives, sent):
    """The emulator itself presses FIRE when a game begins."""
    envs = lives((2, 2, 3))
    steps(envs, 1, np.array([RIGHT]))
    envs.reset(seed=2)
    steps(envs, 1, np.array([RIGHT]))
    assert [x[0] for x in sent] == [RIGHT, RIGHT]


def test_a_game_without_the_button_plays_on(lives, sent, monkeypatch):
    """After a lost life the action of the agent is played."""
    envs = lives((3, 2, 2, 3))
    buttons = [ale_py.Action.NOOP, ale_py.Action.UP, ale_py.Action.DOWN]
    monkeypatch.setattr(envs.unwrapped.ale, "get_action_set", lambda: buttons)
    kind = type(envs)(envs.env)
    kind.reset(seed=1)
    steps(kind, 4, np.array([RIGHT]))
    assert [x[0] for x in sent] == [RIGHT] * 4


def test_all_lives_of_a_real_game_are_played_without_pressing_fire(atari):
    """Breakout, action NOOP throughout: without FIRE the second ball would never come."""
    envs = atari.make_envs(atari.Args(env_id="BreakoutNoFrameskip-v4", num_threads=1), 1)
    _, infos = envs.reset(seed=1)
    seen, ends = [int(infos["lives"][0])], 0
    for _ in range(1000):
        _, _, terminated, _, infos = envs.step(np.zeros(1, np.int64))
        ends += int(terminated[0])
        seen.append(int(infos["lives"][0]))
        if "episode" in infos:
            break
    assert [x for x, y in itertools.pairwise(seen) if x != y] == [5, 4, 3, 2, 1] and ends == 5
    assert infos["episode"]["l"][0] == len(seen) - 1


# --- Atari: games ---


def test_frames_and_sticky_actions_are_those_of_the_id(atari):
    """Frame by frame those of a plain emulator with that probability of repeating the last action."""
    actions = np.random.default_rng(0).integers(2, 4, (20, 1))  # no ball is lost in so short a time

    def frames(envs):
        obs, _ = envs.reset(seed=5)
        return np.stack([obs] + [envs.step(a)[0] for a in actions])

    actions[:2] = FIRE  # which the script presses at first with sticky actions

    def emulator(sticky):
        options = {"noop_max": 30, "frameskip": 4, "maxpool": True, "use_fire_reset": True, "num_threads": 1}
        return ale_py.AtariVectorEnv("breakout", 1, repeat_action_probability=sticky, **options)

    plain, sticky = frames(emulator(0.0)), frames(emulator(0.25))
    assert plain.shape == (21, 1, 4, 84, 84) and plain.dtype == np.uint8
    assert not np.array_equal(plain, sticky)
    expected = {"BreakoutNoFrameskip-v4": plain, "ALE/Breakout-v5": sticky}
    for env_id in expected:
        ours = frames(atari.make_envs(atari.Args(env_id=env_id, num_threads=1), 1))
        assert np.array_equal(ours, expected[env_id]) and ours.dtype == np.uint8, env_id


def test_a_game_is_truncated_after_108_000_frames_or_as_the_flag_says(atari, monkeypatch):
    """--max-episode-steps counts steps of the agent, of 4 frames each."""
    options = []
    kind = ale_py.AtariVectorEnv
    monkeypatch.setattr(ale_py, "AtariVectorEnv", lambda *a, **o: options.append(o) or kind(*a, **o))
    for limit in (0, 10**9, 5):  # a flag only cuts; a number of frames this large would overflow
        envs = atari.make_envs(atari.Args(max_episode_steps=limit, num_threads=1), 1)
    assert [x["max_num_frames_per_episode"] for x in options] == [108_000, 108_000, 20]
    envs.reset(seed=1)
    assert [x[3].tolist() for x in steps(envs, 6)] == [[False]] * 4 + [[True], [False]]


def test_names_that_are_no_game_from_pixels_are_refused(atari, monkeypatch):
    """In one line, before the emulator starts; games for two, which gymnasium leaves out, would end it."""
    monkeypatch.setattr(ale_py, "AtariVectorEnv", lambda *args, **options: pytest.fail("it started"))
    cases = {
        "ALE/TicTacTo3D-v5": "Did you mean: `TicTacToe3D`?",
        "Breakot-v4": "Did you mean: `Breakout`?",
        "breakout": "use <Game>NoFrameskip-v4",
        "Breakout-v4": "use <Game>NoFrameskip-v4",
        "BreakoutDeterministic-v4": "Did you mean: `BreakoutNoFrameskip`?",
        "CartPole-v1": "or try ppo_discrete.py",
    }
    two_players = ("ALE/Combat-v5", "ALE/Joust-v5", "ALE/MazeCraze-v5", "ALE/Warlords-v5")
    for env_id, words in (cases | dict.fromkeys(two_players, "use <Game>NoFrameskip-v4")).items():
        with pytest.raises(atari.UsageError) as caught:
            atari.make_envs(atari.Args(env_id=env_id), 1)
        message = str(caught.value)
        assert message.startswith(f"--env-id {env_id}: ") and words in message and "\n" not in message


def test_games_have_the_ids_of_gymnasium(atari, monkeypatch):
    """Of its registry every fifth ALE/<Game>-v5 and all <Game>NoFrameskip-v4: the right ROM, which exists."""
    roms = []

    def emulator(rom, *args, **options):
        roms.append(rom)
        return stub_envs.FakeAtari(rom, *args, **options)

    monkeypatch.setattr(ale_py, "AtariVectorEnv", emulator)
    gym.register_envs(ale_py)
    games = sorted(x for x in gym.registry if x.startswith("ALE/") and x.endswith("-v5"))
    older = sorted(x for x in gym.registry if x.endswith("NoFrameskip-v4"))
    assert len(games) > 100 and len(older) > 50
    for env_id in {*games[::5], *older, "ALE/TicTacToe3D-v5"}:
        assert atari.make_envs(atari.Args(env_id=env_id), 1).num_envs == 1
        name = env_id.removeprefix("ALE/").removesuffix("-v5").removesuffix("NoFrameskip-v4")
        assert roms[-1].replace("_", "") == name.lower() and ale_py.roms.get_rom_path(roms[-1]).is_file()
