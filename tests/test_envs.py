"""What make_envs returns: infos, rewards as the agent learns from them, actions as they are sent, games."""

import itertools
import math
import multiprocessing
import signal
import threading
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import stub_envs
import torch
from conftest import GAMES
from gymnasium.spaces import Box
from stub_envs import ids


@pytest.fixture
def make(play):
    """make(script, stub, num_envs, **flags): the environments of a stub, raw unless a flag says otherwise."""
    made = []

    def start(script, name, num_envs=2, **flags):
        if script.__name__ != "ppo_atari":
            flags = {"norm_reward": False, "norm_obs": False} | flags
        made.append(script.make_envs(script.Args(env_id=play(script, name), **flags), num_envs))
        return made[-1]

    start.made = made
    yield start
    for envs in made:
        envs.close()


def steps(envs, number, action=None):
    """The results of so many steps, each with the same action, by default 0."""
    action = np.zeros_like(envs.action_space.sample()) if action is None else action
    return [envs.step(action) for _ in range(number)]


# --- infos ---


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_odd_infos_do_no_harm(discrete, train, make, vectorization):
    """Ragged arrays, None, a key "episode", from reset as well: none of it reaches the run."""
    envs = make(discrete, "OddInfos", 3, vectorization=vectorization)
    _, infos = envs.reset(seed=1)
    assert not infos
    for number, (*_, infos) in enumerate(steps(envs, 6), 1):
        assert infos.keys() <= {"final_obs", "_final_obs", "final_info", "_final_info", "episode", "_episode"}
        assert ("episode" in infos) == (number % 3 == 0)
    assert infos["episode"]["r"].tolist() == [3.0] * 3
    result = train(discrete, "OddInfos", vectorization=vectorization)
    assert discrete.evaluate(result["run_dir"], 3).tolist() == [3.0] * 3


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_environments_are_closed(discrete, train, vectorization):
    """Each of them, in its worker too: it may hold a simulator, a file or a connection."""
    train(discrete, "Closes", vectorization=vectorization, seed=5)
    assert sorted(path.name for path in Path().glob("closed-*")) == ["closed-5", "closed-6"]


def test_environments_that_were_interrupted_in_a_step_are_closed(mlp_script, make):
    """One worker was heard, and its answer is lost, as by Ctrl-C: nothing waits for it."""
    envs = make(mlp_script, "Count", 2, vectorization="async").unwrapped
    envs.reset(seed=1)
    limit = threading.Timer(60, lambda: [x.kill() for x in envs.processes])  # it would wait for ever
    limit.start()
    envs.step_async(envs.action_space.sample())
    envs.parent_pipes[0].recv()
    with pytest.warns(UserWarning, match="Calling `close` while waiting"):
        make.made[-1].close()
    limit.cancel()
    assert not any(x.is_alive() for x in envs.processes)


def test_signals_of_a_process_that_makes_async_environments_stay(mlp_script, make, monkeypatch):
    """Also of one that was started by another: only the workers leave Ctrl-C to it."""
    monkeypatch.setattr(multiprocessing, "parent_process", multiprocessing.current_process)
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    make(mlp_script, "Count", 2, vectorization="async")
    after = [signal.signal(*pair) for pair in zip(numbers, before, strict=True)]
    assert after == [signal.default_int_handler] * 2


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


# --- actions ---


def test_b40_actions_are_sent_clipped_and_left_as_they_are(continuous, make):
    """The array of the caller, which goes into the buffer, keeps the unclipped ones (CleanRL's #240)."""
    envs = make(continuous, "Count", 2)
    envs.reset(seed=1)
    actions = np.array([[5.0, -5.0], [0.1, 0.2]], np.float32)
    envs.step(actions)  # the stub refuses what is beyond 0.3
    assert actions.tolist() == np.array([[5.0, -5.0], [0.1, 0.2]], np.float32).tolist()


def test_b40_actions_of_an_integer_box_are_rounded(continuous, monkeypatch):
    """To the nearest, after clipping: cutting decimals off would make 0 twice as wide as any other."""
    received = []

    class Receiver(stub_envs.Stub):
        def step(self, action):
            received.append(action.tolist())
            return super().step(action)

    kwargs = {"space": Box(-2, 3, (2,), np.int32)}
    spec = gym.envs.registration.EnvSpec("Receiver-v0", entry_point=Receiver, kwargs=kwargs)
    monkeypatch.setitem(gym.registry, "Receiver-v0", spec)
    envs = continuous.make_envs(continuous.Args(env_id="Receiver-v0", norm_reward=False), 1)
    envs.reset(seed=1)
    for action in ([0.6, -0.6], [-1.4, 2.7], [-9.0, 9.0], [0.4, -0.4]):
        envs.step(np.array([action], np.float32))
    assert received == [[1, -1], [-1, 3], [-2, 3], [0, 0]]


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


@pytest.mark.parametrize(("env_id", "second"), [("BreakoutNoFrameskip-v4", RIGHT), ("ALE/Breakout-v5", FIRE)])
def test_with_sticky_actions_fire_is_pressed_twice(atari, sent, monkeypatch, env_id, second):
    """A sticky action may take its place once: when a game begins, and after the lost life of step 3."""
    story = {"ends": [(6, "terminated"), (6, "truncated")], "lives": (3, 3, 2, 2, 2, 3)}
    monkeypatch.setattr(stub_envs.FakeAtari, "story", story)
    monkeypatch.setattr(ale_py, "AtariVectorEnv", stub_envs.FakeAtari)
    envs = atari.make_envs(atari.Args(env_id=env_id), 1)
    envs.reset(seed=1)
    steps(envs, 12, np.array([RIGHT]))
    assert [x[0] for x in sent] == [second, second, RIGHT, FIRE, second, RIGHT] * 2


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
