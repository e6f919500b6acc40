"""evaluate and load_agent: whole episodes, raw returns, seeds, time limits, files that do not load, video.

evaluate and load_agent are the same in the three scripts, which test_siblings.py proves.
"""

import os
import random
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
from conftest import NAMES, REAL, SCRIPTS, TINY, copied, plain, resume, saved
from PIL import Image


@pytest.fixture
def run(train):
    """run(script, env_id, **flags): checkpoint.pt of one iteration."""
    return lambda script, env_id, **flags: train(script, env_id, **flags)["run_dir"] / "checkpoint.pt"


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "MountainCar-v0"])
def test_an_environment_of_other_shapes_is_refused(discrete, run, cli, env_id):
    """Six numbers are observed where the agent knows four, or two where it has three actions."""
    path = run(discrete, "CartPole-v1")
    code, _, err = cli(discrete, "--evaluate", str(path), "--env-id", env_id)
    assert code == 2 and err.startswith(f"error: --env-id {env_id} has "), err


# --- whole episodes, raw returns [B35] ---


def lone_returns(seed, num_episodes):
    """Returns of num_episodes of ShortLong from one environment by itself."""
    env, returns = gym.make("stub_envs:ShortLong-v0"), []
    env.reset(seed=seed)
    for _ in range(num_episodes):
        returns.append(100.0 * env.unwrapped.left)
        env.reset()
    return returns


@pytest.mark.parametrize("num_episodes", [1, 50])
def test_b35_evaluation_plays_one_whole_episode_after_the_other(discrete, run, num_episodes):
    """So that short episodes are no more frequent than the environment makes them; rewards as they came."""
    path = run(discrete, "stub_envs:ShortLong-v0", norm_reward=True)
    returns = discrete.evaluate(path, num_episodes, seed=7)
    assert isinstance(returns, np.ndarray) and returns.shape == (num_episodes,)
    assert returns.tolist() == lone_returns(7, num_episodes)


def test_b35_actions_are_clipped_in_evaluation(continuous, run):
    """A standard deviation of 0.6 leaves bounds of 0.1 nearly always; Nudge pays what it is sent."""
    returns = continuous.evaluate(run(continuous, "stub_envs:NudgeBox-v0"), 20)
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


# --- seeds, deterministic actions, time limits ---


def test_evaluation_repeats_with_its_seed(continuous, run):
    path = run(continuous, "stub_envs:NudgeBox-v0")
    before = path.read_bytes()
    sampled = continuous.evaluate(path, 12, seed=5)
    assert np.array_equal(sampled, continuous.evaluate(path, 12, seed=5))
    assert not np.array_equal(sampled, continuous.evaluate(path, 12, seed=6))
    fixed = continuous.evaluate(path, 12, deterministic=True, seed=5)
    torch.rand(9)
    assert np.array_equal(fixed, continuous.evaluate(path, 12, deterministic=True, seed=5))
    assert len(set(sampled)) > 1 and not np.array_equal(fixed, sampled)
    assert path.read_bytes() == before, "the checkpoint is not touched"


def test_a_training_that_evaluates_is_the_same_training(script, train):
    """In each iteration: what evaluation draws, with a seed of its own, takes nothing from the training."""
    path = train(script, "Count")["run_dir"]

    def trained(each_iteration):
        drawn = []

        def stop_requested():
            each_iteration()
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return False

        agent = train(script, "Count", 3, stop_requested)["agent"]
        return drawn, plain(agent.state_dict())

    alone = trained(lambda: None)
    assert len(set(alone[0])) == 3
    assert trained(lambda: script.evaluate(path, 1)) == alone


def test_seeds_of_evaluations_cannot_meet_those_of_a_training(script, train, cli, monkeypatch):
    """Also where it was resumed after so many steps: each environment of it has a seed below 2**30."""
    seed, done = 10**9, 2**30 - 10**9
    result, seeds, reset = train(script, "Count", seed=seed), [], script.LearningEnvs.reset

    def spied(self, seed):
        seeds.append((seed, self.num_envs))
        return reset(self, seed=seed)

    path = result["run_dir"] / "checkpoint.pt"
    torch.save(saved(path) | {"global_step": done}, path)
    monkeypatch.setattr(script.LearningEnvs, "reset", spied)
    assert resume(script, result, total_timesteps=done + 16)["global_step"] == done + 16
    script.evaluate(path, 1)
    code, _, err = cli(script, "--evaluate", path, "--eval-episodes", 1)
    assert code == 0, err
    code, _, err = cli(script, "--evaluate", path, "--eval-episodes", 1, "--seed", 2**31)  # ale_py: int32
    assert code == 0, err
    (resumed, num_envs), *evaluated = seeds
    assert evaluated == [(2**30, 1), (2**30 + seed, 1), (2**30, 1)]
    assert resumed != seed and 0 <= resumed and resumed + num_envs <= 2**30


def test_the_time_limit_is_that_of_the_training_or_the_one_given(script, train):
    """CountEndless pays 1 per step and never ends by itself."""
    path = train(script, "CountEndless", max_episode_steps=3)["run_dir"]
    assert script.evaluate(path, 2).tolist() == [3, 3]
    assert script.evaluate(path, 2, max_episode_steps=5).tolist() == [5, 5]
    with pytest.raises(script.UsageError, match="--max-episode-steps -5: use 0 or more"):
        script.evaluate(path, 2, max_episode_steps=-5)


def test_an_episode_without_end_is_stopped(discrete, train, monkeypatch):
    """After 100,000 steps, or after its time limit, with a line that names the flag to use. Each step counts
    for 10,000 here."""
    path, step, lengths = train(discrete, "CountEndless")["run_dir"], discrete.LearningEnvs.step, []

    def longer(self, actions):
        assert self.episode_lengths[0] < 10**6, "nothing stops it"
        self.episode_lengths += 9_999
        lengths.append(self.episode_lengths[0])
        return step(self, actions)

    monkeypatch.setattr(discrete.LearningEnvs, "step", longer)
    for limit, steps in ((0, 11), (180_000, 19)):
        lengths.clear()
        with pytest.raises(discrete.UsageError, match=r"^[^\n]*--max-episode-steps \d+[^\n]*$"):
            discrete.evaluate(path, 1, max_episode_steps=limit)
        assert len(lengths) == steps


# --- load_agent ---


def one_environment(name):
    """A single environment of a tiny run, made without the scripts: reset and step of one row."""
    if name == "ppo_atari":
        options = {"repeat_action_probability": 0.0, "max_num_frames_per_episode": 80}
        return ale_py.AtariVectorEnv("breakout", 1, reward_clipping=False, use_fire_reset=True, **options)
    return gym.vector.SyncVectorEnv([lambda: gym.make(REAL[name], max_episode_steps=20)])


def test_a_loaded_agent_acts_as_evaluate_does(script, checkpoints):
    """Played by hand in an environment that the script has not made, with the raw observations of it."""
    path = checkpoints[script.__name__]
    agent, env = script.load_agent(path), one_environment(script.__name__)
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
    assert isinstance(agent, script.Agent) and not agent.training
    weights = saved(path)["agent"]
    assert agent.state_dict().keys() == weights.keys()
    for name, x in agent.state_dict().items():
        assert torch.equal(x, weights[name]) and not x.requires_grad and x.device.type == "cpu", name


def test_a_loaded_agent_is_given_no_bounds_that_nobody_saved(continuous, checkpoints, monkeypatch):
    """A policy of one's own that scales its actions by them would act by wrong ones, and look right."""

    class Watched(continuous.Agent):
        def __init__(self, observation_space, action_space, args):
            super().__init__(observation_space, action_space, args)
            self.bounds = action_space.low, action_space.high

    monkeypatch.setattr(continuous, "Agent", Watched)
    assert np.isinf(continuous.load_agent(checkpoints["ppo_continuous"]).bounds).all()


def test_a_loaded_agent_can_be_exported(mlp_script, checkpoints):
    """With any number of observations, for programs without Python."""

    class Policy(torch.nn.Module):
        def __init__(self, agent):
            super().__init__()
            self.agent = agent

        def forward(self, obs):
            return self.agent.get_action_and_value(self.agent.normalize(obs), deterministic=True)[0]

    policy = Policy(mlp_script.load_agent(checkpoints[mlp_script.__name__]))
    num_inputs = policy.agent.shapes[0][0]
    program = torch.export.export(
        policy, (torch.rand(5, num_inputs),), dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}]
    )
    obs = torch.randn(3, num_inputs)
    assert torch.equal(program.module()(obs), policy(obs))


# --- checkpoints that do not load ---


class Payload:
    """Executed by an unpickler that trusts the file."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def wrong_files(good):
    """{path of a wrong file: what its refusal says}; written to the current folder."""
    Path("no_checkpoint_in_here").mkdir()
    content = good.read_bytes()
    for part in (0, 0.1, 0.5, 0.999):
        Path(f"cut{part}.pt").write_bytes(content[: int(part * len(content))])
    Path("text.pt").write_text("learning_rate: 3e-4\n")
    torch.save({"actor.0.weight": torch.ones(2, 2)}, "state_dict.pt")
    torch.save(saved(good) | {"more": Payload()}, "payload.pt")
    old = saved(good)
    old["agent"].popitem()
    torch.save(old, "other_agent.pt")
    torch.save(saved(good) | {"args": saved(good)["args"] | {"old_flag": 1}}, "other_args.pt")
    damaged = dict.fromkeys(map(str, sorted(Path().glob("*.pt"))), "damaged, or not of this script")
    return damaged | dict.fromkeys(["missing.pt", "no_checkpoint_in_here"], "no such file")


def test_a_file_that_is_no_checkpoint_is_refused(discrete, refused, checkpoints):
    """By each way to load one, in one line that tells apart what is wrong."""
    for path, words in wrong_files(checkpoints["ppo_discrete"]).items():
        for flag in ("--evaluate", "--resume"):
            refused(discrete, [flag, path], path, words)
        message = f"^[^\n]*{re.escape(path)}[^\n]*{words}[^\n]*$"
        for function in (discrete.load_agent, discrete.evaluate):
            with pytest.raises(discrete.UsageError, match=message):
                function(path)
    assert not Path("executed").exists(), "no code of the file has run"
    torch.load("payload.pt", weights_only=False)
    assert Path("executed").exists(), "although it carries some"


def test_a_checkpoint_of_another_script_is_refused(script, refused, checkpoints):
    for other in set(NAMES) - {script.__name__}:
        refused(script, ["--evaluate", checkpoints[other]], str(checkpoints[other]), "not of this script")


# --- video ---


def film(folder):
    (path,) = folder.glob("videos/**/*.mp4")
    return imageio.imread(path, plugin="FFMPEG")


def assert_coloured_film(pictures, height, width, length):
    assert pictures.shape[1:] == (height, width, 3) and abs(len(pictures) - length) <= 1, pictures.shape
    assert np.ptp(pictures.astype(int), axis=0).max() > 50, "something moves"
    assert np.ptp(pictures.astype(int), axis=3).max() > 50, "not grey"


@pytest.mark.parametrize(
    "name, height, width", [("ppo_discrete", 400, 600), ("ppo_continuous", 500, 500), ("ppo_atari", 210, 160)]
)
def test_the_first_episode_is_filmed(request, checkpoints, name, height, width):
    """No episode of these is shorter than its time limit of 9 steps."""
    script, path = request.getfixturevalue(name.removeprefix("ppo_")), copied(checkpoints[name])
    returns = script.evaluate(path, 2, capture_video=True, max_episode_steps=9)
    assert_coloured_film(film(path.parent), height, width, 9)
    unseen = script.evaluate(path, 2, max_episode_steps=9)
    assert np.array_equal(returns, unseen), "the camera changes nothing"
    if name == "ppo_discrete":
        script.evaluate(path, 1, seed=1, capture_video=True, max_episode_steps=3)
        assert len(list(path.parent.glob("videos/**/*.mp4"))) == 2, "a second film leaves the first"


def test_of_several_games_the_first_is_filmed(atari, emulators):
    """The others get other actions. Step by step, the filmed picture is the one that the agent sees, but for
    its size and colour."""
    envs = atari.make_envs(atari.Args(env_id="BreakoutNoFrameskip-v4"), 3, Path("films"))
    with closing(envs):
        envs.reset(seed=1)
        for actions in np.random.default_rng(1).integers(0, 4, (60, 3)):
            envs.step(actions)
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
        assert_coloured_film(film(Path("cheetah")), 480, 480, 8)  # HalfCheetah never falls
