"""What a run saves and when, what it never saves, and that a resumed run is the uninterrupted one."""

import dataclasses
import itertools
import math
import random
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
    assert file["iteration"] == 1
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
        written.append(saved("x/checkpoint.pt")["iteration"])

    monkeypatch.setattr(script, "save_checkpoint", spied)
    train(script, "Count", 5, save_every=2, run_dir="x")
    assert written == [2, 4, 5]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(script, train, monkeypatch):
    """As on a full disk: half of the file was there, under another name."""
    save, calls = torch.save, itertools.count(1)

    def full_disk(data, file):
        if next(calls) < 2:
            return save(data, file)
        file.write(b"half of a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(script, "Count", 3, save_every=1, run_dir="x")
    assert saved("x/checkpoint.pt")["iteration"] == 1 and not Path("x/checkpoint.tmp").exists()
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
    assert checkpoint_of(result)["iteration"] == 2
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
    flags = {"objective": objective, **normalised(script)}
    if objective == "kl-penalty" and script.__name__ == "ppo_continuous":
        flags |= {"learn_std": False, "init_log_std": -0.5}

    def interrupted(*args, **kwargs):
        random.random()
        np.random.random()
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
    assert files[0]["kl_coef"] == (1.0 if objective == "clip" else 1 / 16)
    assert files[0].keys() == files[1].keys()
    for key in files[0].keys() - {"args"}:  # optimiser, statistics, generators, beta
        assert plain(files[0][key]) == plain(files[1][key]), key


def test_b38_each_generator_goes_on(mlp_script, train):
    """Where they stood, also where the process that resumes has used its own."""
    half = train(mlp_script, "Stateless", 1)
    expected = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(12345)
    restored = []

    def stop_requested():
        generators = random.getstate(), np.random.get_state()[1].tolist()
        restored.append(generators)
        return True

    resume(mlp_script, half, stop_requested, total_timesteps=64)
    assert restored == [expected[:2]]  # nothing in an iteration uses these two
    assert checkpoint_of(half)["torch_rng"].tolist() != expected[2]  # torch's has been used


def test_b38_more_steps_for_a_finished_run(mlp_script, train):
    """Without annealing, 4 iterations are also 2 and, after --total-timesteps has grown, 2 more."""
    whole = train(mlp_script, "Stateless", 4, anneal_lr=False, **normalised(mlp_script))
    half = train(mlp_script, "Stateless", 2, anneal_lr=False, **normalised(mlp_script))
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


def test_resume_refuses_what_would_be_another_run(discrete, train):
    half = train(discrete, "Stateless", 2, gamma=0.9)
    path = half["run_dir"] / "checkpoint.pt"
    before = path.read_bytes()
    for given in ({"gamma": 0.5}, {"num_steps": 16}, {"seed": 3}, {"env_id": "Other-v0"}):
        (name,) = given
        with pytest.raises(discrete.UsageError, match=f"^--{name.replace('_', '-')} [^\n]*$"):
            resume(discrete, half, total_timesteps=64, **given)
    with pytest.raises(discrete.UsageError, match=r"^--total-timesteps [^\n]*48"):
        resume(discrete, half)  # it is at its end
    assert path.read_bytes() == before


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


def test_reward_statistics_are_saved_in_the_order_of_older_versions(mlp_script, train):
    """Mean, variance, count, then one discounted return per environment: older checkpoints resume with it."""
    result = train(mlp_script, REAL[mlp_script.__name__], 2, **normalised(mlp_script))
    file = checkpoint_of(result)
    mean, var, count, *discounted = file["reward_scale"]
    assert (count, len(discounted)) == (32, 2)
    assert var > 0
    assert mean not in (0, count)
    file["reward_scale"][2] = 1000.0
    torch.save(file, result["run_dir"] / "checkpoint.pt")
    resume(mlp_script, result, total_timesteps=48)
    assert checkpoint_of(result)["reward_scale"][2] == 1016


# --- a checkpoint as commit c12a367 wrote it ---

# its arguments, but for env_id and run_dir; what a script had of its own
# fmt: off
OLD_ARGS = {
    "exp_name": "", "seed": 1, "device": "cpu", "num_threads": 1, "compile": False, "track": False,
    "torch_deterministic": True, "wandb_project_name": "ppo", "wandb_entity": None,
    "total_timesteps": 64, "learning_rate": 0.4, "num_envs": 2, "num_steps": 8, "anneal_lr": True,
    "gamma": 0.99, "gae_lambda": 0.95, "num_minibatches": 2, "update_epochs": 2, "norm_adv": True,
    "objective": "clip", "clip_coef": 0.2, "kl_penalty_coef": 1.0, "kl_penalty_target": 0.01,
    "clip_vloss": True, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None,
    "max_episode_steps": 0, "save_every": 50, "resume": "", "evaluate": "", "eval_episodes": 10,
    "deterministic": False, "capture_video": False,
}
# fmt: on
OLD_VECTORS = {"hidden_sizes": (16,), "activation": "tanh", "vectorization": "sync"}
OLD_VECTORS |= {"norm_obs": True, "norm_reward": True}
OLD_OF_SCRIPT = {
    "ppo_discrete": OLD_VECTORS,
    "ppo_continuous": OLD_VECTORS | {"init_log_std": 0.0, "learn_std": True},
    "ppo_atari": {"precision": "fp32", "clip_coef": 0.1, "num_threads": 0},
}
STATISTICS = {"obs_mean": (2,), "obs_var": (2,), "obs_count": ()}
CRITIC = {"critic.0.weight": (16, 2), "critic.0.bias": (16,)}
CRITIC |= {"critic.2.weight": (1, 16), "critic.2.bias": (1,)}


def old_actor(name, outputs):
    first = {f"{name}.0.weight": (16, 2), f"{name}.0.bias": (16,)}
    return first | {f"{name}.2.weight": (outputs, 16), f"{name}.2.bias": (outputs,)}


CNN = {"0.weight": (32, 4, 8, 8), "0.bias": (32,), "2.weight": (64, 32, 4, 4), "2.bias": (64,)}
CNN |= {"4.weight": (64, 64, 3, 3), "4.bias": (64,), "7.weight": (512, 3136), "7.bias": (512,)}
CNN = {f"network.{key}": shape for key, shape in CNN.items()}
HEADS = {"actor.weight": (3, 512), "actor.bias": (3,), "critic.weight": (1, 512), "critic.bias": (1,)}
GAUSSIAN = {"actor_logstd": (2,)} | STATISTICS | CRITIC | old_actor("actor_mean", 2)
OLD = {
    "discrete": {
        "script": "ppo_discrete",
        "env": "Count",
        "shapes": ((2,), 3),
        "agent": STATISTICS | CRITIC | old_actor("actor", 3),
    },
    "branches": {
        "script": "ppo_discrete",
        "env": "stub_envs:Branches-v0",
        "shapes": ((2,), [3, 1, 4]),
        "agent": STATISTICS | CRITIC | old_actor("actor", 3 * 4),
    },
    "continuous": {
        "script": "ppo_continuous",
        "env": "Count",
        "shapes": ((2,), 2),
        "agent": GAUSSIAN,
        "args": {"objective": "kl-penalty"},
        "kl_coef": 0.25,  # None without --objective kl-penalty
    },
    "fixed std": {
        "script": "ppo_continuous",
        "env": "Count",
        "shapes": ((2,), 2),
        "agent": GAUSSIAN,
        "args": {"learn_std": False},
    },
    "atari": {"script": "ppo_atari", "env": "Count", "shapes": ((4, 84, 84), 3), "agent": CNN | HEADS},
}


def old_checkpoint(name, env_id):
    """After the first of four iterations, with random weights."""
    old = OLD[name]
    script = old["script"]
    generator = torch.Generator().manual_seed(0)
    agent = OrderedDict(
        (key, 0.05 * torch.randn(shape, generator=generator)) for key, shape in old["agent"].items()
    )
    learned = [key for key in agent if not key.startswith("obs_")]
    if name == "fixed std":
        learned.remove("actor_logstd")
    if script != "ppo_atari":
        agent["obs_mean"] = torch.tensor([1.0, 1.5], dtype=torch.float64)
        agent["obs_var"] = torch.tensor([2.0, 0.25], dtype=torch.float64)
        agent["obs_count"] = torch.tensor(18.0, dtype=torch.float64)
    if name == "branches":  # what a branch lacks against the widest
        agent["actor.2.bias"].view(3, 4)[torch.arange(4) >= torch.tensor([[3], [1], [4]])] = -1e9
    moments = {
        number: {
            "step": torch.tensor(4.0),
            "exp_avg": torch.full_like(agent[key], 1e-3),
            "exp_avg_sq": torch.full_like(agent[key], 1e-4),
        }
        for number, key in enumerate(learned)
    }
    group = {"lr": 0.4, "betas": (0.9, 0.999), "eps": 1e-05, "weight_decay": 0, "amsgrad": False}
    group |= {"maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    group |= {"fused": True, "decoupled_weight_decay": False, "params": list(range(len(learned)))}
    args = OLD_ARGS | OLD_OF_SCRIPT[script] | old.get("args", {})
    file = {
        "script": script,
        "args": args | {"exp_name": script, "env_id": env_id, "run_dir": "somewhere/else"},
        "iteration": 1,
        "global_step": 16,
        "python_rng": random.getstate(),
        "shapes": old["shapes"],
        "agent": agent,
        "optimizer": {"state": moments, "param_groups": [group]},
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": [],
        "numpy_rng": [np.asarray(x).tolist() for x in np.random.get_state()],
        "kl_coef": old.get("kl_coef"),
    }
    if script != "ppo_atari":
        file["reward_scale"] = [0.5, 2.0, 16.0, 0.25, -0.25]
    return file


@pytest.mark.parametrize("name", OLD)
def test_an_older_checkpoint_loads_and_resumes(name, play, request):
    script = request.getfixturevalue(OLD[name]["script"].removeprefix("ppo_"))
    stub = OLD[name]["env"]
    file = old_checkpoint(name, stub if ":" in stub else play(script, stub))
    Path("old").mkdir()
    torch.save(file, "old/checkpoint.pt")

    agent = script.load_agent("old")
    assert same(agent.state_dict(), file["agent"])
    raw = torch.full((64, 4, 84, 84), 9, dtype=torch.uint8) if name == "atari" else torch.ones(64, 2)
    obs = agent.normalize(raw)
    if name != "atari":
        assert obs[0].tolist() == pytest.approx([0.0, -1.0])  # by the statistics of the file
    actions, logprobs, *_ = agent.get_action_and_value(obs)
    assert logprobs.isfinite().all()
    if name == "branches":
        assert (actions < torch.tensor([3, 1, 4])).all()

    result = script.train(script.Args(resume="old"))
    assert (result["global_step"], result["run_dir"]) == (64, Path("old"))
    logged, after = scalars(result), saved("old/checkpoint.pt")
    assert logged["charts/learning_rate"] == pytest.approx([0.3, 0.2, 0.1])
    expected = file["args"] | {"target_kl": 0.0, "wandb_entity": "", "run_dir": "old"}
    if name == "atari":  # which has graphs instead of a compiler since then
        expected = {key: x for key, x in expected.items() if key != "compile"} | {"cuda_graphs": False}
    assert after["args"] == expected
    steps = {key: int(x["step"]) for key, x in after["optimizer"]["state"].items()}
    assert steps == dict.fromkeys(file["optimizer"]["state"], 4 + 3 * 4)
    if name != "atari":
        assert after["agent"]["obs_count"] == 18 + 3 * 16
        assert after["reward_scale"][2] == 16 + 3 * 16
    if name == "continuous":
        assert logged["charts/kl_coef"][0] == 0.25
    moved = {key for key, x in file["agent"].items() if not torch.equal(x, after["agent"][key])}
    assert file["agent"].keys() - moved == ({"actor_logstd"} if name == "fixed std" else set())
    assert all(x.isfinite().all() for x in after["agent"].values())


# --- what is never saved ---


@pytest.mark.parametrize("name", ["NanReward", "InfReward", "NanObservation", "InfObservation"])
@pytest.mark.parametrize("norm", [False, True])
def test_not_finite_input_stops_the_run_at_once(mlp_script, train, watch, name, norm):
    """In the iteration in which it comes (the second), by its name; the checkpoint of the first stays."""
    seen, flags = watch(mlp_script), normalised(mlp_script) if norm else {}
    with pytest.raises(FloatingPointError, match=rf"\b{name[3:].lower()}s\b[^\n]*--env-id"):
        train(mlp_script, name, 4, save_every=1, run_dir="x", **flags)
    assert len(seen.gae) == 2
    assert saved("x/checkpoint.pt")["iteration"] == 1
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
    assert saved("x/checkpoint.pt")["iteration"] == 1
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
        assert saved("x/checkpoint.pt")["iteration"] == 1
        assert all(x.isfinite().all() for x in script.load_agent("x").state_dict().values())


def test_a_learning_rate_beyond_all_measure_is_not_saved(script, train):
    """The first step, which is the only one and the last, leaves weights that are not finite."""
    with pytest.raises(FloatingPointError, match=r"\bweights\b"):
        train(script, "Ids", learning_rate=1e39, num_minibatches=1, update_epochs=1, run_dir="x")
    assert not Path("x/checkpoint.pt").exists()


# --- arguments that a checkpoint could not hold ---

NOT_PLAIN = {
    "a float of steps": {"total_timesteps": 1e6},
    "a float of minibatches": {"num_minibatches": 2.0},
    "a numpy integer": {"total_timesteps": np.int64(64)},
    "a numpy seed": {"seed": np.int64(1)},
    "a numpy float": {"learning_rate": np.float64(1e-3)},
    "a short numpy float": {"gamma": np.float32(0.9)},
    "a numpy bool": {"anneal_lr": np.bool_(True)},
    "a number for a bool": {"anneal_lr": 1},
    "a bool for a number": {"seed": True},
    "a numpy string": {"exp_name": np.str_("x")},
    "a path to write to": {"run_dir": Path("x")},
    "a path to resume from": {"resume": Path("x")},
    "no target": {"target_kl": None},
    "a tensor": {"learning_rate": torch.tensor(1e-3)},
    "a list of sizes": {"hidden_sizes": [64, 64]},
    "numpy sizes": {"hidden_sizes": (np.int64(64), np.int64(64))},
    "floats as sizes": {"hidden_sizes": (64.0, 64.0)},
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_arguments_that_a_checkpoint_cannot_hold_are_refused_at_the_start(discrete, train, name):
    """In one line that names the flag, before anything is written; not by a file that nobody can read."""
    (flag,) = NOT_PLAIN[name]
    with pytest.raises(discrete.UsageError, match=f"^--{flag.replace('_', '-')} [^\n]*$"):
        train(discrete, "Stateless", **NOT_PLAIN[name])
    assert not list(Path().iterdir())


def test_an_integer_for_a_float_trains_and_loads(discrete, train):
    result = train(discrete, "Stateless", gamma=1, learning_rate=0, max_grad_norm=1)
    assert checkpoint_of(result)["args"]["gamma"] == 1
    discrete.load_agent(result["run_dir"])
