"""evaluate and load_agent: whole episodes, raw returns, seeds, time limits, files that do not load, video."""

import importlib
import os
import pickle
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import ale_py
import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from conftest import MLP, NAMES, SCRIPTS, TINY, copied, resume, saved, stub_id
from PIL import Image


@pytest.fixture
def run(train):
    """run(script, env_id, **flags): checkpoint.pt of one iteration."""
    return lambda script, env_id, **flags: train(script, env_id, **flags)["run_dir"] / "checkpoint.pt"


# --- whole episodes, raw returns [B35] ---


def lone_returns(seed, num_episodes):
    """Returns of num_episodes of ShortLong from one environment by itself."""
    env, returns = gym.make("ShortLongDiscrete-v0"), []
    env.reset(seed=seed)
    for _ in range(num_episodes):
        returns.append(100.0 * env.unwrapped.left)
        env.reset()
    return returns


@pytest.mark.parametrize("num_episodes", [1, 3, 50])
def test_b35_evaluation_plays_one_whole_episode_after_the_other(mlp_script, run, num_episodes):
    """So that short episodes are no more frequent than the environment makes them; rewards as they came."""
    path = run(mlp_script, stub_id(mlp_script, "ShortLong"), norm_reward=True)
    returns = mlp_script.evaluate(path, num_episodes, seed=7)
    assert isinstance(returns, np.ndarray) and returns.shape == (num_episodes,)
    assert returns.tolist() == lone_returns(7, num_episodes)


def test_b35_actions_are_clipped_in_evaluation(continuous, run):
    """A standard deviation of 1 leaves bounds of 0.1 nine times in ten; Nudge pays what it is sent."""
    returns = continuous.evaluate(run(continuous, "NudgeBox-v0"), 20)
    assert np.all(np.abs(returns) <= 5 * 2 * 0.1 + 1e-6) and len(set(returns)) > 1


class Spy(ale_py.AtariVectorEnv):
    """Keeps what each step gave: the newest frame of the first game, rewards, ends of games, lives."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)
        self.steps, self.options = [], kwargs

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = super().step(actions)
        self.steps.append((obs[0, -1].copy(), rewards[0], terminated[0] or truncated[0], infos["lives"][0]))
        return obs, rewards, terminated, truncated, infos


@pytest.fixture
def emulators(monkeypatch):
    """The emulators that are made from here on, in a list."""
    made = []
    monkeypatch.setattr(ale_py, "AtariVectorEnv", type("Spied", (Spy,), {"made": made}))
    return made


def test_b35_atari_evaluates_whole_games_and_raw_scores(atari, run, emulators):
    """What evaluate returns against the emulator's own rewards, summed over all lives of MsPacman."""
    path = run(atari, "MsPacmanNoFrameskip-v4")
    del emulators[:]
    returns = atari.evaluate(path, 2)
    (emulator,) = emulators
    _, rewards, dones, lives = (np.array(x) for x in zip(*emulator.steps, strict=True))
    first, last = np.flatnonzero(dones)
    assert last == len(dones) - 1, "not a step beyond the last game"
    assert returns.tolist() == [rewards[: first + 1].sum(), rewards[first + 1 :].sum()]
    for game in (lives[:first], lives[first + 1 : last]):
        assert (np.diff(game) < 0).sum() >= 2, "a game is all of its lives"
    assert min(returns) > 2 * np.count_nonzero(rewards), "points, not signs"


@pytest.mark.parametrize("env_id, sticky", [("BreakoutNoFrameskip-v4", 0.0), ("ALE/Breakout-v5", 0.25)])
def test_b35_atari_is_evaluated_on_the_game_of_the_training(atari, run, emulators, env_id, sticky):
    path = run(atari, env_id, max_episode_steps=20)
    atari.evaluate(path, 1)
    trained, evaluated = (emulator.options for emulator in emulators)
    assert trained == evaluated
    assert evaluated["repeat_action_probability"] == sticky and evaluated["frameskip"] == 4


# --- seeds, deterministic actions ---


def test_evaluation_repeats_with_its_seed(mlp_script, run):
    path = run(mlp_script, stub_id(mlp_script, "Nudge"))
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    sampled = mlp_script.evaluate(path, 12, seed=5)
    assert np.array_equal(sampled, mlp_script.evaluate(path, 12, seed=5))
    assert not np.array_equal(sampled, mlp_script.evaluate(path, 12, seed=6))
    fixed = mlp_script.evaluate(path, 12, deterministic=True, seed=5)
    torch.rand(9)
    assert np.array_equal(fixed, mlp_script.evaluate(path, 12, deterministic=True, seed=5))
    assert len(set(sampled)) > 1 and not np.array_equal(fixed, sampled)
    assert path.read_bytes() == before and path.stat().st_mtime_ns == stamp, "the checkpoint is not touched"


def test_the_seed_reaches_the_environment(discrete, run):
    """With deterministic actions and nothing learned from, only the environment's own chance is left."""
    path = run(discrete, "ShortLongDiscrete-v0")
    first, second = (discrete.evaluate(path, 20, deterministic=True, seed=seed) for seed in (5, 6))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("seed", "done"), [(1, 1_000_000), (10**9, 2**30 - 10**9)])
def test_seeds_of_evaluations_cannot_meet_those_of_a_training(script, train, cli, monkeypatch, seed, done):
    """Also where it was resumed after so many steps: each environment of it has a seed below 2**30."""
    seeds, make = [], script.make_envs

    def spied(args, num_envs, *others):
        envs = make(args, num_envs, *others)
        reset = envs.reset
        monkeypatch.setattr(envs, "reset", lambda seed: (seeds.append((seed, num_envs)), reset(seed=seed))[1])
        return envs

    result = train(script, "Count", seed=seed)
    path = result["run_dir"] / "checkpoint.pt"
    torch.save(saved(path) | {"global_step": done}, path)
    monkeypatch.setattr(script, "make_envs", spied)
    assert resume(script, result, total_timesteps=done + 16)["global_step"] == done + 16
    script.evaluate(path, 1)
    code, _, err = cli(script, "--evaluate", path, "--eval-episodes", 1)
    assert code == 0, err
    (resumed, num_envs), *evaluated = seeds
    assert evaluated == [(2**30, 1), (2**30 + seed, 1)]
    assert resumed != seed and 0 <= resumed and resumed + num_envs <= 2**30


def edit(path, change):
    """Save the checkpoint again with what change(its weights) does to them."""
    checkpoint = saved(path)
    change(checkpoint["agent"])
    torch.save(checkpoint, path)


def test_deterministic_actions_are_the_most_probable(discrete, run):
    """NudgeDiscrete pays the action: a policy that all but always picks 1 must score 5 in every episode."""
    path = run(discrete, "NudgeDiscrete-v0")

    def prefer_1(weights):
        (bias,) = (x for key, x in weights.items() if key.startswith("actor") and x.shape == (2,))
        bias.copy_(torch.tensor([0.0, 0.8]))

    edit(path, prefer_1)
    assert np.all(discrete.evaluate(path, 20, deterministic=True) == 5)
    assert not np.all(discrete.evaluate(path, 20) == 5)


def test_deterministic_actions_are_the_mean(continuous, run):
    """NudgeBox pays the sum of its action, here 0.05 - 0.02 in each of 5 steps."""
    path = run(continuous, "NudgeBox-v0")

    def constant_mean(weights):
        last = [key for key, x in weights.items() if key.startswith("actor_mean") and x.shape[0] == 2]
        for key in last:
            weights[key].zero_()
        weights[last[-1]].copy_(torch.tensor([0.05, -0.02]))

    edit(path, constant_mean)
    assert np.allclose(continuous.evaluate(path, 3, deterministic=True), 5 * 0.03)
    assert not np.allclose(continuous.evaluate(path, 3), 5 * 0.03)


# --- time limits, episodes without end ---


def test_the_time_limit_is_that_of_the_training_or_the_one_given(script, train):
    """CountEndless pays 1 per step and never ends by itself."""
    path = train(script, "CountEndless", max_episode_steps=3)["run_dir"]
    assert script.evaluate(path, 2).tolist() == [3, 3]
    assert script.evaluate(path, 2, max_episode_steps=5).tolist() == [5, 5]


@pytest.fixture
def faster_clock(monkeypatch):
    """Episodes as LearningEnvs counts them are 10,000 times as long. Returns the lengths that were real."""
    lengths = []

    def use(script):
        class Faster(script.LearningEnvs):
            def reset(self, **kwargs):
                lengths.append(0)
                return super().reset(**kwargs)

            def step(self, actions):
                assert self.episode_lengths[0] < 10**6, "nothing stops it"
                self.episode_lengths += 9_999
                lengths[-1] += 1
                return super().step(actions)

        monkeypatch.setattr(script, "LearningEnvs", Faster)
        return lengths

    return use


def test_an_episode_without_end_is_stopped(script, train, faster_clock):
    """After 100,000 steps, with a line that names the flag to use."""
    path = train(script, "CountEndless")["run_dir"]
    lengths = faster_clock(script)
    with pytest.raises(script.UsageError, match=r"^[^\n]*--max-episode-steps \d+[^\n]*$"):
        script.evaluate(path, 1)
    assert lengths == [11], "100,000 steps are allowed, 110,000 are not"


def test_an_episode_may_be_as_long_as_its_time_limit(discrete, run, faster_clock):
    """ShortLong has episodes of 20 steps, which the clock takes for 200,000."""
    path = run(discrete, "ShortLongDiscrete-v0")
    faster_clock(discrete)
    assert set(discrete.evaluate(path, 10, max_episode_steps=200_000)) == {100, 2000}
    with pytest.raises(discrete.UsageError, match="--max-episode-steps"):
        discrete.evaluate(path, 10, max_episode_steps=180_000)


# --- load_agent ---


def one_environment(name):
    """A single environment of a tiny run, made without the scripts: reset and step of one row."""
    if name == "ppo_atari":
        options = {"repeat_action_probability": 0.0, "max_num_frames_per_episode": 80}
        return ale_py.AtariVectorEnv("breakout", 1, reward_clipping=False, use_fire_reset=True, **options)
    env_id = {"ppo_discrete": "CartPole-v1", "ppo_continuous": "Pendulum-v1"}[name]
    return gym.vector.SyncVectorEnv([lambda: gym.make(env_id, max_episode_steps=20)])


def test_a_loaded_agent_acts_as_evaluate_does(script, checkpoints):
    """Played by hand in an environment that the script has not made, with the raw observations of it."""
    path = checkpoints[script.__name__]
    agent, env = script.load_agent(path), one_environment(script.__name__)
    before = {key: x.clone() for key, x in agent.state_dict().items()}
    obs, _ = env.reset(seed=12)
    score, over = 0.0, False
    while not over:
        obs = agent.normalize(torch.as_tensor(obs))
        action, *_ = agent.get_action_and_value(obs, deterministic=True)
        action = action.numpy()
        if script.__name__ == "ppo_continuous":
            action = action.clip(env.single_action_space.low, env.single_action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        score, over = score + reward[0], terminated[0] or truncated[0]
    assert [score] == pytest.approx(script.evaluate(path, 1, deterministic=True, seed=12), rel=1e-6)
    after = agent.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before), "acting counts nothing"


def test_a_loaded_agent_is_ready_to_act(script, checkpoints):
    agent = script.load_agent(str(checkpoints[script.__name__]))
    assert isinstance(agent, script.Agent) and not agent.training
    weights = saved(checkpoints[script.__name__])["agent"]
    assert agent.state_dict().keys() == weights.keys()
    for name, x in agent.state_dict().items():
        assert torch.equal(x, weights[name]) and not x.requires_grad and x.device.type == "cpu", name
    assert not any(p.requires_grad for p in agent.parameters())
    again = script.load_agent(checkpoints[script.__name__].parent)
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in weights.items()), "a directory will do"


@pytest.mark.parametrize("name", MLP)
def test_evaluation_normalises_as_training_did(name, run, checkpoints, monkeypatch):
    """The policy receives raw observations by the statistics in the file, which stay as they are."""
    script = importlib.import_module(name)
    if name == "ppo_discrete":
        path = run(script, "CartPole-v1", norm_obs=True, num_steps=16)
    else:
        path = checkpoints[name]
    weights, raw, seen = saved(path)["agent"], [], []
    normalize, act = script.Agent.normalize, script.Agent.get_action_and_value

    def spy_normalize(self, obs, *args, **kwargs):
        raw.append(torch.as_tensor(obs).clone().double())
        return normalize(self, obs, *args, **kwargs)

    def spy_act(self, obs, *args, **kwargs):
        seen.append(obs.clone())
        return act(self, obs, *args, **kwargs)

    monkeypatch.setattr(script.Agent, "normalize", spy_normalize)
    monkeypatch.setattr(script.Agent, "get_action_and_value", spy_act)
    script.evaluate(path, 1)
    std = (weights["obs_var"] + 1e-8).sqrt()
    expected = ((torch.cat(raw) - weights["obs_mean"]) / std).clamp(-10, 10)
    assert weights["obs_count"] >= 32 and len(seen) >= 8
    assert torch.allclose(torch.cat(seen).double(), expected, atol=1e-5)
    assert not torch.allclose(expected, torch.cat(raw), atol=0.1)


# --- checkpoints that do not load ---


class Payload:
    """Executed by an unpickler that trusts the file."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def wrong_files(good):
    """{path of a wrong file: what its refusal says}; written to the current folder."""
    Path("no_checkpoint_in_here").mkdir()
    Path("cut.pt").write_bytes(good.read_bytes()[:-3000])
    Path("beginning.pt").write_bytes(good.read_bytes()[:100])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("learning_rate: 3e-4\n")
    torch.save({"actor.0.weight": torch.ones(2, 2)}, "state_dict.pt")
    torch.save([1, 2], "list.pt")
    torch.save(saved(good) | {"more": Payload()}, "payload.pt")
    Path("payload.pkl").write_bytes(pickle.dumps(Payload(), protocol=2))
    old = saved(good)
    old["agent"].popitem()
    torch.save(old, "other_agent.pt")
    torch.save(saved(good) | {"args": saved(good)["args"] | {"old_flag": 1}}, "other_args.pt")
    damaged = dict.fromkeys(map(str, sorted(Path().glob("*.p*"))), "damaged, or not of this script")
    return damaged | dict.fromkeys(["missing.pt", "no_checkpoint_in_here"], "no such file")


def test_a_file_that_is_no_checkpoint_is_refused(discrete, refused, checkpoints):
    """By each way to load one, in one line that tells apart what is wrong."""
    for path, words in wrong_files(checkpoints["ppo_discrete"]).items():
        for flag in ("--evaluate", "--resume"):
            refused(discrete, [flag, path], path, words)
        message = f"^[^\n]*{re.escape(path)}[^\n]*{words}[^\n]*$"
        for function in (discrete.load_agent, discrete.evaluate, discrete.load_checkpoint):
            with pytest.raises(discrete.UsageError, match=message):
                function(path)
        with pytest.raises(discrete.UsageError, match=message):
            discrete.train(discrete.Args(resume=path))
    assert not Path("executed").exists(), "no code of the file has run"
    torch.load("payload.pt", weights_only=False)
    assert Path("executed").exists(), "although it carries some"


def test_a_checkpoint_of_another_script_is_refused(script, refused, checkpoints):
    for other in set(NAMES) - {script.__name__}:
        for flag in ("--evaluate", "--resume"):
            refused(script, [flag, checkpoints[other]], str(checkpoints[other]), "not of this script")


def test_a_checkpoint_does_not_fit_an_edited_agent(script, checkpoints, monkeypatch):
    """As of those who change the network of their copy and then load an older run."""

    class Edited(script.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.more = torch.nn.Linear(2, 2)

    monkeypatch.setattr(script, "Agent", Edited)
    with pytest.raises(script.UsageError, match=r"not of this script.*Missing key"):
        script.load_agent(checkpoints[script.__name__])


def test_no_episodes_are_refused(discrete, checkpoints):
    for number in (0, -1):
        with pytest.raises(discrete.UsageError, match=f"--eval-episodes {number}"):
            discrete.evaluate(checkpoints["ppo_discrete"], number)


# --- video ---


def frames(folder):
    (path,) = folder.glob("videos/**/*.mp4")
    return imageio.imread(path, plugin="FFMPEG")


def assert_coloured_film(film, height, width, length):
    assert film.shape[1:] == (height, width, 3) and abs(len(film) - length) <= 1, film.shape
    assert np.ptp(film.astype(int), axis=0).max() > 50, "something moves"
    assert np.ptp(film.astype(int), axis=3).max() > 50, "not grey"


def test_video_of_cartpole(discrete, checkpoints):
    path = copied(checkpoints["ppo_discrete"])
    returns = discrete.evaluate(path, 3, capture_video=True)
    assert_coloured_film(frames(path.parent), 400, 600, returns[0])  # CartPole pays 1 per step
    assert np.array_equal(returns, discrete.evaluate(path, 3)), "the camera changes nothing"


def test_a_second_video_leaves_the_first(discrete, checkpoints):
    path = copied(checkpoints["ppo_discrete"])
    films = set()
    for seed in (1, 2):
        discrete.evaluate(path, 1, seed=seed, capture_video=True, max_episode_steps=3)
        assert films < set(path.parent.glob("videos/**/*.mp4"))
        films = set(path.parent.glob("videos/**/*.mp4"))
    assert len(films) == 2


def test_video_of_pendulum(continuous, checkpoints):
    path = copied(checkpoints["ppo_continuous"])
    returns = continuous.evaluate(path, 2, capture_video=True)
    assert_coloured_film(frames(path.parent), 500, 500, 20)
    assert np.array_equal(returns, continuous.evaluate(path, 2))


def test_video_of_atari_has_full_size_and_colour(atari, checkpoints):
    path = copied(checkpoints["ppo_atari"])
    returns = atari.evaluate(path, 2, capture_video=True)
    assert_coloured_film(frames(path.parent), 210, 160, 20)
    assert np.array_equal(returns, atari.evaluate(path, 2))


def test_the_colour_frames_of_atari_show_the_game_that_is_played(atari, run, emulators):
    """Step by step, the filmed picture is the one that the agent sees, but for its size and colour."""
    path = run(atari, "BreakoutNoFrameskip-v4", max_episode_steps=60)
    del emulators[:]
    atari.evaluate(path, 3, capture_video=True)
    assert_same_pictures(emulators)


def test_of_several_games_the_first_is_filmed(atari, emulators):
    """The others get other actions."""
    envs = atari.make_envs(atari.Args(env_id="BreakoutNoFrameskip-v4"), 3, Path("films"))
    with closing(envs):
        envs.reset(seed=1)
        for actions in np.random.default_rng(1).integers(0, 4, (60, 3)):
            envs.step(actions)
        assert_same_pictures(emulators)


def assert_same_pictures(emulators):
    grey, colour = sorted(([step[0] for step in x.steps] for x in emulators), key=lambda x: x[0].ndim)
    assert 50 <= len(colour) <= len(grey)
    for step, (seen, filmed) in enumerate(zip(grey, colour, strict=False)):
        filmed = Image.fromarray(filmed).convert("L").resize((84, 84), Image.Resampling.BOX)
        assert np.abs(np.asarray(filmed, float) - seen).mean() < 2, f"step {step}"


def test_video_of_mujoco_without_a_display():
    """With no MUJOCO_GL set: a film where the system has a GL library, else a refusal before training."""
    env = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    flags = [*TINY, "--env-id", "HalfCheetah-v5", "--run-dir", "cheetah", "--capture-video"]
    flags += ["--max-episode-steps", "8"]
    program = [sys.executable, SCRIPTS / "ppo_continuous.py", *flags]
    done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=300)
    if done.returncode == 2:
        assert done.stderr.count("\n") == 1 and re.search("libegl1|libosmesa6", done.stderr), done.stderr
        assert not list(Path().iterdir())
    else:
        assert done.returncode == 0, done.stderr
        assert_coloured_film(frames(Path("cheetah")), 480, 480, 8)  # HalfCheetah never falls
