"""What a run saves and when, what it never saves, and that a resumed run is the uninterrupted one."""

import dataclasses
import itertools
import math
from collections import OrderedDict
from pathlib import Path

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import REAL, normalised, plain, resume, same, saved, scalars, state
from stub_envs import ids
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def checkpoint_of(result):
    return saved(result["run_dir"] / "checkpoint.pt")


# --- what a checkpoint holds, and when it is written ---


def test_checkpoint_holds_tensors_and_plain_values_only(script, train):
    """So that torch.load reads it without running code, with these types as with any later ones."""
    kinds = set()

    def visit(x):
        kinds.add(type(x))
        if isinstance(x, dict):
            x = [*x.keys(), *x.values()]
        if isinstance(x, list | tuple):
            for item in x:
                visit(item)

    result = train(script, "Count", **normalised(script))
    file = checkpoint_of(result)
    visit(file)
    assert kinds <= {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert file["global_step"] == 16


def test_checkpoint_holds_the_arguments_of_the_run(script, train):
    flags = {"seed": 7, "gamma": 0.9, "exp_name": "x", "ent_coef": 0.25, "anneal_lr": False, "save_every": 3}
    result = train(script, "Count", run_dir="here", **flags)
    args = checkpoint_of(result)["args"]
    assert args.keys() == {field.name for field in dataclasses.fields(script.Args)}
    given = flags | {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "device": "cpu"}
    given |= normalised(script) and {"norm_obs": False, "norm_reward": False}
    given |= {"run_dir": "here", "total_timesteps": 16, "env_id": args["env_id"]}
    assert args == vars(script.Args()) | given


def test_checkpoints_come_every_save_every_iterations_and_at_the_end(script, train, monkeypatch):
    written, save = [], script.save_checkpoint

    def spied(*args, **kwargs):
        save(*args, **kwargs)
        written.append(saved("x/checkpoint.pt")["global_step"] // 16)

    monkeypatch.setattr(script, "save_checkpoint", spied)
    train(script, "Count", 5, save_every=2, run_dir="x")
    assert written == [2, 4, 5]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(script, train, monkeypatch):
    """As on a full disk: half of the file was there, under another name."""
    save, calls = torch.save, itertools.count(1)

    def full_disk(data, file):
        if next(calls) < 2:
            return save(data, file)
        file.write_bytes(b"half of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(script, "Count", 3, save_every=1, run_dir="x")
    assert saved("x/checkpoint.pt")["global_step"] == 16
    script.load_agent("x")


def test_stop_requested_ends_the_run_after_the_iteration_with_a_checkpoint(script, train):
    asked = []

    def stop_requested():
        asked.append(1)
        return len(asked) == 2

    result = train(script, "Count", 5, save_every=100, stop_requested=stop_requested)
    assert len(asked) == 2
    assert result["global_step"] == 32
    assert result["episodic_return"] == 3.0
    assert checkpoint_of(result)["global_step"] == 32
    assert same(state(script.load_agent(result["run_dir"])), state(result["agent"]))
    assert len(scalars(result)["losses/value_loss"]) == 2
    assert resume(script, result)["global_step"] == 80


def test_stop_requested_is_asked_once_per_iteration(script, train):
    """So that one that says yes only once is heard, and what is asked may take its time."""
    asked = []
    result = train(script, "Count", 3, stop_requested=lambda: asked.append(1))
    assert result["global_step"] == 48
    assert len(asked) in (2, 3)  # there is nothing to ask after the last one


# --- acting with what was saved ---


def raw_observations(script, agent):
    """Five fixed raw observations that agent could meet."""
    generator = torch.Generator().manual_seed(7)
    if script.__name__ == "ppo_atari":
        return torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8, generator=generator)
    return torch.randn(5, *agent.shapes[0], generator=generator)


def test_b29_saved_agent_acts_bit_for_bit_like_the_trained_one(script, train):
    result = train(script, REAL[script.__name__], 2, **normalised(script))
    trained, loaded = result["agent"], script.load_agent(result["run_dir"] / "checkpoint.pt")
    raw = raw_observations(script, trained)
    outputs = []
    for agent in (trained, loaded):
        torch.manual_seed(0)
        with torch.no_grad():
            obs = agent.normalize(raw)
            sampled = agent.get_action_and_value(obs)
            outputs.append([obs, *sampled, *agent.get_action_and_value(obs, deterministic=True)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    if normalised(script):
        assert not torch.equal(outputs[0][0], raw)  # the statistics are part of it


def test_b29_evaluation_moves_no_statistics(script, train, monkeypatch):
    result = train(script, REAL[script.__name__], max_episode_steps=50, **normalised(script))
    path = result["run_dir"] / "checkpoint.pt"
    agents, init, before = [], script.Agent.__init__, path.read_bytes()

    def spied(self, *args, **kwargs):
        init(self, *args, **kwargs)
        agents.append(self)

    monkeypatch.setattr(script.Agent, "__init__", spied)
    script.evaluate(path, 2)  # 2 x 50 steps
    assert agents
    for agent in agents:
        assert same(state(agent), state(result["agent"]))
    assert path.read_bytes() == before


def play_by_hand(agent, env_id, seed):
    """The README's loop: raw observations in, actions out, those of a Box clipped by whoever acts."""
    env = gym.make(env_id, max_episode_steps=50)
    obs, _ = env.reset(seed=seed)
    points, done, actions = 0.0, False, []
    while not done:
        with torch.no_grad():
            normal = agent.normalize(torch.as_tensor(obs).unsqueeze(0))
            action, *_ = agent.get_action_and_value(normal, deterministic=True)
        action = action[0].numpy()
        actions.append(action.copy())
        if isinstance(env.action_space, gym.spaces.Box):
            action = np.clip(action, env.action_space.low, env.action_space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        points, done = points + reward, terminated or truncated
    return points, np.array(actions)


def test_acting_from_python_is_what_evaluate_does(mlp_script, train):
    """With a policy wide enough to need the clipping, over episodes that differ with their seed."""
    env_id = REAL[mlp_script.__name__]
    flags = {"learning_rate": 0.3, "max_episode_steps": 50, "update_epochs": 8}
    path = train(mlp_script, env_id, 2, **normalised(mlp_script) | flags)["run_dir"]
    agent = mlp_script.load_agent(path)
    torch.manual_seed(0)
    returns, actions = zip(*(play_by_hand(agent, env_id, seed) for seed in (3, 4)), strict=True)
    torch.manual_seed(1)  # nothing is sampled
    again, _ = play_by_hand(mlp_script.load_agent(path), env_id, 3)
    assert again == returns[0] != returns[1]
    if mlp_script.__name__ == "ppo_continuous":
        assert max(np.abs(x).max() for x in actions) > 2.1  # Pendulum's actions go to 2
    for seed, points in zip((3, 4), returns, strict=True):
        expected = mlp_script.evaluate(path, 1, deterministic=True, seed=seed)
        assert points == pytest.approx(expected[0], rel=1e-5)


def test_acting_from_python_with_an_atari_agent(atari, train):
    """It takes the frames of an emulator as they are; the same ones give the same actions."""
    agent = atari.load_agent(train(atari, REAL["ppo_atari"])["run_dir"])
    played = []
    for seed in (0, 1):
        envs = ale_py.AtariVectorEnv("breakout", 3)
        frames, _ = envs.reset(seed=5)
        torch.manual_seed(seed)  # nothing is sampled
        actions = []
        for _ in range(5):
            with torch.no_grad():
                obs = agent.normalize(torch.as_tensor(frames))
                action, logprob, _, value = agent.get_action_and_value(obs, deterministic=True)
            assert action.shape == logprob.shape == value.shape == (3,)
            assert envs.action_space.contains(action.numpy())
            actions.append(action.tolist())
            frames, *_ = envs.step(action.numpy())
        played.append(actions)
    assert played[0] == played[1]
    assert agent.normalize(torch.as_tensor(frames)).dtype == torch.uint8


# --- same seed, same run; resuming ---


def test_b37_same_seed_same_run(script, train):
    """3 iterations, bit for bit; another seed gives another run."""
    flags = {"iterations": 3, "max_episode_steps": 6, **normalised(script)}
    a, b = (train(script, REAL[script.__name__], seed=5, **flags) for _ in range(2))
    other = train(script, REAL[script.__name__], seed=6, **flags)
    assert same(state(a["agent"]), state(b["agent"]))
    assert a["episodic_return"] == b["episodic_return"]
    kept = [key for key in scalars(a) if "SPS" not in key]
    assert [scalars(a)[key] for key in kept] == [scalars(b)[key] for key in kept]
    assert not same(state(a["agent"]), state(other["agent"]))


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("discrete", "clip"),
        ("discrete", "kl-penalty"),
        ("continuous", "clip"),
        ("continuous", "kl-penalty"),
        ("atari", "kl-penalty"),
    ],
)
def test_b38_resumed_run_is_the_uninterrupted_one(name, objective, train, monkeypatch, request):
    """4 iterations are 2 and 2 more, bit for bit, with all generators in use, statistics, annealing, beta."""
    script = request.getfixturevalue(name)
    received, gae, calls = [], script.compute_gae, itertools.count(1)
    # gamma 0: the sums behind the reward scale begin anew with the environments, and so do not matter
    flags = {"objective": objective, "gamma": 0.0, **normalised(script)}
    if objective == "kl-penalty" and script.__name__ == "ppo_continuous":
        flags |= {"learn_std": False, "init_log_std": -0.5}

    def interrupted(*args, **kwargs):
        torch.rand(1)
        if next(calls) == 6:  # the second iteration of the second run
            received.append(2)  # as main does when a signal comes
        return gae(*args, **kwargs)

    monkeypatch.setattr(script, "compute_gae", interrupted)
    whole = train(script, "Stateless", 4, **flags)
    half = train(script, "Stateless", 4, stop_requested=lambda: bool(received), save_every=3, **flags)
    assert half["global_step"] == 32
    resumed = resume(script, half)
    assert resumed["global_step"] == 64
    assert resumed["run_dir"] == half["run_dir"]
    assert same(state(whole["agent"]), state(resumed["agent"]))
    files = checkpoint_of(whole), checkpoint_of(resumed)
    assert files[0]["kl_coef"] == (None if objective == "clip" else 1 / 16)
    assert files[0].keys() == files[1].keys()
    for key in files[0].keys() - {"args"}:  # optimiser, statistics, generators, beta
        assert plain(files[0][key]) == plain(files[1][key]), key


def test_b38_more_steps_for_a_finished_run(mlp_script, train):
    """Without annealing, 4 iterations are also 2 and, after --total-timesteps has grown, 2 more."""
    flags = {"anneal_lr": False, "gamma": 0.0, **normalised(mlp_script)}
    whole = train(mlp_script, "Stateless", 4, **flags)
    half = train(mlp_script, "Stateless", 2, **flags)
    resumed = resume(mlp_script, half, total_timesteps=64)
    assert same(state(whole["agent"]), state(resumed["agent"]))


def test_b38_resumed_run_of_a_real_environment(script, train, watch):
    """It goes on in the same files, and its environments do not play the start of the first run again."""
    seen = watch(script)
    half = train(script, REAL[script.__name__], 2, max_episode_steps=5, **normalised(script))
    first = seen.acted[0]
    seen.acted.clear()
    resumed = resume(script, half, total_timesteps=64)
    assert resumed["global_step"] == 64
    assert seen.acted[0].shape == first.shape
    assert not torch.equal(seen.acted[0], first)
    logged = EventAccumulator(str(half["run_dir"]))
    logged.Reload()
    assert [x.step for x in logged.Scalars("losses/value_loss")] == [16, 32, 48, 64]
    assert math.isfinite(resumed["episodic_return"])


def test_b38_resumed_environments_get_new_seeds(script, train, watch):
    """The stubs observe the seed that they were reset with."""
    seen = watch(script)
    half = train(script, "CountEndless", 2, seed=1)
    resume(script, half, total_timesteps=64)
    tags = [set(ids(obs)[:, 2]) for obs in (seen.acted[0], seen.acted[-1])]
    assert tags[0] == {1, 2}
    assert len(tags[1]) == 2
    assert not tags[0] & tags[1]


def test_resume_keeps_all_arguments_but_those_given(discrete, train):
    flags = {"gamma": 0.9, "ent_coef": 0.25, "anneal_lr": False, "seed": 9, "save_every": 7}
    half = train(discrete, "Stateless", 2, **flags)
    before = checkpoint_of(half)["args"]
    for given in ({"total_timesteps": 64}, {"total_timesteps": 96, "save_every": 3, "gamma": 0.9}):
        assert resume(discrete, half, **given)["global_step"] == given["total_timesteps"]
        before |= given
        assert checkpoint_of(half)["args"] == before


def test_resume_takes_all_arguments_of_args_that_come_from_the_checkpoint(discrete, train):
    """As main does, and as a program does that changes a flag back to its default."""
    half = train(discrete, "Stateless", 2, save_every=7)
    args = dataclasses.replace(
        discrete.load_checkpoint(half["run_dir"])["args"],
        resume=str(half["run_dir"]),
        total_timesteps=64,
        save_every=discrete.Args().save_every,
    )
    discrete.train(args)
    after = checkpoint_of(half)["args"]
    assert after["total_timesteps"] == 64
    assert after["save_every"] == discrete.Args().save_every


def test_resume_refuses_another_network_and_a_run_at_its_end(discrete, train):
    half = train(discrete, "Stateless", 2)
    path = half["run_dir"] / "checkpoint.pt"
    before = path.read_bytes()
    with pytest.raises(discrete.UsageError, match=r"^--resume: of another network[^\n]*$"):
        resume(discrete, half, total_timesteps=64, hidden_sizes=(8,))
    with pytest.raises(discrete.UsageError, match=r"^--total-timesteps [^\n]*48"):
        resume(discrete, half)
    assert path.read_bytes() == before


def test_reward_statistics_are_saved_and_go_on(mlp_script, train):
    """Mean, variance and count of the discounted returns."""
    result = train(mlp_script, REAL[mlp_script.__name__], 2, **normalised(mlp_script))
    file = checkpoint_of(result)
    mean, var, count = file["reward_stats"]
    assert count == 32
    assert var > 0
    assert mean not in (0, count)
    file["reward_stats"][2] = 1000.0
    torch.save(file, result["run_dir"] / "checkpoint.pt")
    resume(mlp_script, result, total_timesteps=48)
    assert checkpoint_of(result)["reward_stats"][2] == 1016


def test_a_copy_beside_the_checkpoint_begins_a_run_of_its_own(script, train):
    """Its older state must not replace the newer one."""
    run_dir = train(script, "Count", 2)["run_dir"]
    newest = (run_dir / "checkpoint.pt").read_bytes()
    copy = run_dir / "older.pt"
    copy.write_bytes(newest)
    args = script.load_checkpoint(copy)["args"]
    result = script.train(dataclasses.replace(args, resume=str(copy), total_timesteps=64))
    assert result["global_step"] == 64
    assert result["run_dir"].resolve() != run_dir.resolve()
    assert (run_dir / "checkpoint.pt").read_bytes() == newest
    with pytest.raises(script.UsageError, match="holds a checkpoint"):
        script.train(dataclasses.replace(args, resume=str(copy), run_dir=str(run_dir), total_timesteps=64))


# --- what is never saved ---


@pytest.mark.parametrize("name", ["NanReward", "InfReward", "NanObservation", "InfObservation"])
@pytest.mark.parametrize("norm", [False, True])
def test_not_finite_input_stops_the_run_at_once(mlp_script, train, watch, name, norm):
    """In the iteration in which it comes (the second); the checkpoint of the first stays."""
    seen, flags = watch(mlp_script), normalised(mlp_script) if norm else {}
    with pytest.raises(FloatingPointError, match=r"v_loss[^\n]*rewards and observations"):
        train(mlp_script, name, 4, save_every=1, run_dir="x", **flags)
    assert len(seen.gae) == 2
    assert saved("x/checkpoint.pt")["global_step"] == 16
    assert all(x.isfinite().all() for x in mlp_script.load_agent("x").state_dict().values())


def test_not_finite_loss_stops_the_run_at_once(script, train, monkeypatch):
    """As after steps that were too long; the message names a loss, the last good checkpoint stays."""
    calls, loss = itertools.count(1), script.ppo_loss

    def broken(*args, **kwargs):
        total, stats = loss(*args, **kwargs)
        bad = math.nan if next(calls) >= 6 else 1.0
        return total * bad, stats | {"v_loss": stats["v_loss"] * bad}

    monkeypatch.setattr(script, "ppo_loss", broken)
    with pytest.raises(FloatingPointError, match=r"\bv_loss\b[^\n]*--learning-rate"):
        train(script, "Count", 4, save_every=1, run_dir="x")
    assert saved("x/checkpoint.pt")["global_step"] == 16
    assert all(x.isfinite().all() for x in script.load_agent("x").state_dict().values())


@pytest.mark.parametrize(("bad", "bad_step"), [(math.nan, 4), (math.inf, 8)])
def test_not_finite_weights_after_the_last_step_are_not_saved(script, train, monkeypatch, bad, bad_step):
    """All losses of that iteration are finite: they were computed before its last step, number 4 or 8."""
    steps = itertools.count(1)

    class Broken(torch.optim.Adam):
        def step(self):
            super().step()
            if next(steps) == bad_step:
                with torch.no_grad():
                    self.param_groups[0]["params"][-1].view(-1)[0] = bad

    monkeypatch.setattr(torch.optim, "Adam", Broken)
    with pytest.raises(FloatingPointError, match=r"\bweights\b[^\n]*--learning-rate"):
        train(script, "Count", 3, save_every=1, run_dir="x")
    if bad_step == 4:
        assert not Path("x/checkpoint.pt").exists()
    else:
        assert saved("x/checkpoint.pt")["global_step"] == 16
        assert all(x.isfinite().all() for x in script.load_agent("x").state_dict().values())


def test_a_learning_rate_beyond_all_measure_is_not_saved(script, train):
    """The first step, which is the only one and the last, leaves weights that are not finite."""
    with pytest.raises(FloatingPointError, match=r"\bweights\b"):
        train(script, "Ids", learning_rate=1e39, num_minibatches=1, update_epochs=1, run_dir="x")
    assert not Path("x/checkpoint.pt").exists()


def test_an_integer_for_a_float_trains_and_loads(discrete, train):
    result = train(discrete, "Stateless", gamma=1, learning_rate=0, max_grad_norm=1)
    assert checkpoint_of(result)["args"]["gamma"] == 1
    discrete.load_agent(result["run_dir"])


# --- arguments from Python ---


def test_numbers_of_numpy_and_paths_become_plain(discrete, train):
    """A checkpoint that holds others cannot be read again."""
    numbers = {"seed": np.int64(3), "gamma": np.float32(0.5), "anneal_lr": np.bool_(False)}
    flags = numbers | {"run_dir": Path("x"), "hidden_sizes": [np.int64(8), 8]}
    train(discrete, "Stateless", **flags)
    args = discrete.load_checkpoint("x")["args"]
    assert (args.seed, args.gamma, args.anneal_lr, args.hidden_sizes) == (3, 0.5, False, (8, 8))


def test_a_field_more_in_a_subclass_of_args(script, play):
    """As somebody writes who extends the file: it trains, and its checkpoint can be read."""

    @dataclasses.dataclass
    class More(script.Args):
        mine: int = 5

    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "device": "cpu"}
    args = More(env_id=play(script, "Count"), total_timesteps=16, run_dir="x", **sizes)
    script.train(args)
    assert script.load_checkpoint("x")["args"].run_dir == "x"
