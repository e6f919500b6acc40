"""What a run saves and when, what it never saves, and that a resumed run is the uninterrupted one.

save_checkpoint and restore are the same in the two scripts for vectors, check_finite in all three, which
test_siblings.py proves: where train plays no part, one script is tested.
"""

import dataclasses
import itertools
import math
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, normalised, plain, resume, same, saved, scalars, state
from stub_envs import ids


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

    file = checkpoint_of(train(script, "Count", **normalised(script)))
    visit(file)
    assert kinds <= {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert file["global_step"] == 16


def test_checkpoint_holds_the_arguments_of_the_run(discrete, train):
    """In Python's own types, although numpy's, paths and integers for floats were given."""
    odd = {"seed": np.int64(3), "gamma": np.float32(0.5), "anneal_lr": np.bool_(False), "learning_rate": 0}
    odd |= {"run_dir": Path("x"), "hidden_sizes": [np.int64(8), 4]}
    args = checkpoint_of(train(discrete, "Stateless", **odd))["args"]
    given = {"seed": 3, "gamma": 0.5, "anneal_lr": False, "learning_rate": 0.0, "run_dir": "x"}
    given |= {"hidden_sizes": (8, 4), "norm_obs": False, "norm_reward": False, "device": "cpu"}
    given |= {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 16}
    assert args == vars(discrete.Args()) | given | {"env_id": args["env_id"]}
    assert all(type(args[name]) is type(value) for name, value in given.items())
    assert discrete.load_checkpoint("x")["args"] == discrete.Args(**args)


def test_checkpoints_come_every_save_every_iterations_and_at_the_end(script, train, monkeypatch):
    written, save = [], script.save_checkpoint

    def spied(*args, **kwargs):
        save(*args, **kwargs)
        written.append(saved("x/checkpoint.pt")["global_step"] // 16)

    monkeypatch.setattr(script, "save_checkpoint", spied)
    train(script, "Count", 5, save_every=2, run_dir="x")
    assert written == [2, 4, 5]


def test_stop_requested_ends_the_run_after_the_iteration_with_a_checkpoint(script, train):
    """It is asked once per iteration, the last one included: one that says yes only once is heard."""
    asked = []

    def stop_requested():
        asked.append(1)
        return len(asked) == 2

    result = train(script, "Count", 5, save_every=100, stop_requested=stop_requested)
    assert len(asked) == 2
    assert result["episodic_return"] == 3.0
    assert result["global_step"] == checkpoint_of(result)["global_step"] == 32
    assert same(state(script.load_agent(result["run_dir"])), state(result["agent"]))
    assert len(scalars(result)["losses/value_loss"]) == 2
    assert resume(script, result)["global_step"] == 80
    train(script, "Count", 3, stop_requested=lambda: bool(asked.append(1)))
    assert len(asked) == 2 + 3


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


def test_b29_evaluation_moves_no_statistics(mlp_script, train, monkeypatch):
    result = train(mlp_script, REAL[mlp_script.__name__], max_episode_steps=50, **normalised(mlp_script))
    path = result["run_dir"] / "checkpoint.pt"
    agents, init, before = [], mlp_script.Agent.__init__, path.read_bytes()

    def spied(self, *args, **kwargs):
        init(self, *args, **kwargs)
        agents.append(self)

    monkeypatch.setattr(mlp_script.Agent, "__init__", spied)
    mlp_script.evaluate(path, 2)  # 2 x 50 steps
    played, *_ = agents  # another one only tells the shapes of the environment
    assert same(state(played), state(result["agent"]))
    assert path.read_bytes() == before


# --- same seed, same run; resuming ---


def test_b37_same_seed_same_run(script, train):
    """3 iterations, bit for bit, whatever is saved; another seed gives another run."""
    flags = {"iterations": 3, "max_episode_steps": 6, **normalised(script)}
    a = train(script, REAL[script.__name__], seed=5, **flags)
    b = train(script, REAL[script.__name__], seed=5, save_every=1, exp_name="x", **flags)
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
    betas = [x["args"]["kl_penalty_coef"] for x in files]
    assert betas == [1.0 if objective == "clip" else 1 / 16] * 2
    assert files[0].keys() == files[1].keys()
    for key in files[0].keys() - {"args"}:  # optimiser, statistics, generators
        assert plain(files[0][key]) == plain(files[1][key]), key


def test_b38_resumed_environments_get_new_seeds(script, train, watch):
    """The stubs observe the seed that they were reset with: no episode of the first run comes again."""
    seen = watch(script)
    half = train(script, "CountEndless", 2, seed=1)
    resume(script, half, total_timesteps=64)
    tags = [set(ids(obs)[:, 2]) for obs in (seen.acted[0], seen.acted[-1])]
    assert tags[0] == {1, 2}
    assert len(tags[1]) == 2
    assert not tags[0] & tags[1]
    assert len(scalars(half)["losses/value_loss"]) == 4, "the curves go on"


def test_b38_what_draws_from_the_generators_of_numpy_and_python_does_not_repeat(script, train, monkeypatch):
    drawn, make_envs = [], script.make_envs

    def spied(*args):
        drawn.append((random.random(), np.random.rand()))
        return make_envs(*args)

    monkeypatch.setattr(script, "make_envs", spied)
    half = train(script, "Count", 1)
    resume(script, half, total_timesteps=32)
    resume(script, half, total_timesteps=48)
    assert [len(set(x)) for x in zip(*drawn, strict=True)] == [3, 3]


def test_resume_refuses_another_network_and_a_run_at_its_end(discrete, train):
    half = train(discrete, "Stateless", 2)
    path = half["run_dir"] / "checkpoint.pt"
    before = path.read_bytes()
    with pytest.raises(discrete.UsageError, match=r"^--resume: another network[^\n]*$"):
        resume(discrete, half, total_timesteps=64, hidden_sizes=(8,))
    with pytest.raises(
        discrete.UsageError, match=r"^--total-timesteps 32: use at least 48, of which 32 are done$"
    ):
        resume(discrete, half)
    assert path.read_bytes() == before


def test_reward_statistics_are_saved_and_go_on(discrete, train):
    """Mean, variance and count of the discounted returns."""
    result = train(discrete, "CartPole-v1", 2, **normalised(discrete))
    file = checkpoint_of(result)
    mean, var, count = file["reward_stats"]
    assert count == 32
    assert var > 0
    assert mean not in (0, count)
    file["reward_stats"][2] = 1000.0
    torch.save(file, result["run_dir"] / "checkpoint.pt")
    resume(discrete, result, total_timesteps=48)
    assert checkpoint_of(result)["reward_stats"][2] == 1016


def test_a_run_resumed_with_a_larger_batch_takes_no_step_too_many(script, train):
    """48 of 100 steps are done, which is no multiple of 32: one batch of 32 more fits, not two."""
    part = train(script, REAL[script.__name__], 3, **normalised(script))
    result = resume(script, part, total_timesteps=100, num_steps=16)
    assert result["global_step"] == 80


def test_a_copy_beside_the_checkpoint_begins_a_run_of_its_own(discrete, train):
    """Its older state must not replace the newer one."""
    run_dir = train(discrete, "Count", 2)["run_dir"]
    newest = (run_dir / "checkpoint.pt").read_bytes()
    copy = run_dir / "older.pt"
    copy.write_bytes(newest)
    args = discrete.load_checkpoint(copy)["args"]
    result = discrete.train(dataclasses.replace(args, resume=str(copy), total_timesteps=64))
    assert result["global_step"] == 64
    assert result["run_dir"].resolve() != run_dir.resolve()
    with pytest.raises(discrete.UsageError, match="holds a checkpoint"):
        discrete.train(dataclasses.replace(args, resume=str(copy), run_dir=str(run_dir), total_timesteps=64))
    assert (run_dir / "checkpoint.pt").read_bytes() == newest


# --- what is never saved ---


@pytest.mark.parametrize("name", ["NanReward", "InfReward", "NanObservation", "InfObservation"])
@pytest.mark.parametrize("norm", [False, True])
def test_not_finite_input_stops_the_run_at_once(discrete, train, watch, name, norm):
    """In the iteration in which it comes (the second); the checkpoint of the first stays."""
    seen, flags = watch(discrete), normalised(discrete) if norm else {}
    with pytest.raises(FloatingPointError, match=r"v_loss[^\n]*rewards and observations"):
        train(discrete, name, 4, save_every=1, run_dir="x", **flags)
    assert len(seen.gae) == 2
    assert saved("x/checkpoint.pt")["global_step"] == 16
    assert all(x.isfinite().all() for x in discrete.load_agent("x").state_dict().values())


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
