"""On a GPU: --cuda-graphs against eager PyTorch, CUDA against the CPU. Skipped where there is none."""

import copy

import numpy as np
import pytest
import torch
from conftest import resume, saved, scalars
from gymnasium.spaces import Box, Discrete

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

M = 32
SPACES = {
    "ppo_discrete": (Box(-9, 9, (5,), np.float32), Discrete(3)),
    "ppo_continuous": (Box(-9, 9, (5,), np.float32), Box(-1, 1, (2,), np.float32)),
    "ppo_atari": (Box(0, 255, (4, 84, 84), np.uint8), Discrete(3)),
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """What is compared is not the rounding of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def batch_of(script):
    """2 M rows as train makes them, on the CPU."""
    torch.manual_seed(0)
    space, actions = SPACES[script.__name__]
    if script.__name__ == "ppo_atari":
        obs = torch.randint(0, 256, (2 * M, *space.shape), dtype=torch.uint8)
    else:
        obs = torch.randn(2 * M, *space.shape)
    if isinstance(actions, Box):
        taken, logprobs = torch.randn(2 * M, *actions.shape), torch.full((2 * M,), -3.0)
    else:
        taken, logprobs = torch.randint(0, 3, (2 * M,)), torch.full((2 * M,), -1.1)
    drawn = {x: torch.randn(2 * M) for x in ("advantages", "returns", "values")}
    return {"obs": obs, "actions": taken, "logprobs": logprobs} | drawn


def gradients(agent):
    return torch.cat([x.grad.flatten() for x in agent.parameters()]).double().cpu()


# --- CUDA against the CPU ---


@pytest.mark.parametrize("objective", ["clip", "kl-penalty"])
def test_gradients_are_those_of_the_cpu(script, objective):
    """Of one minibatch, with the same weights, whose heads are no longer tiny; the stats as well."""
    batch, rows, args = batch_of(script), torch.arange(M) * 2, script.Args(objective=objective)
    agent = script.Agent(*SPACES[script.__name__], args)
    for x in agent.parameters():
        x.data.add_(0.01 * torch.randn_like(x))
    other, beta = copy.deepcopy(agent).to(GPU), torch.tensor(0.7) if objective == "kl-penalty" else None
    expected = script.compute_gradients(agent, batch, rows, args, beta)
    batch = {name: x.to(GPU) for name, x in batch.items()}
    beta = beta if beta is None else beta.to(GPU)
    found = script.compute_gradients(other, batch, rows.to(GPU), args, beta)
    difference = gradients(other) - gradients(agent)
    assert difference.norm() < 1e-3 * gradients(agent).norm()
    for name, x in expected.items():
        assert found[name].device.type == GPU
        assert found[name].item() == pytest.approx(x.item(), rel=1e-3, abs=1e-4), name


def test_a_run_on_the_gpu_goes_on_on_the_cpu(script, train):
    """And back; its numbers are finite, and its agent is evaluated on the CPU."""
    result = train(script, "CountMixed", 4, stop_requested=lambda: True, device=GPU)
    assert all(x.device.type == GPU and x.isfinite().all() for x in result["agent"].parameters())
    for iteration, device in ((2, "cpu"), (3, GPU)):
        result = resume(script, result, stop_requested=lambda: True, device=device)
        checkpoint = saved(result["run_dir"] / "checkpoint.pt")
        assert (checkpoint["global_step"], checkpoint["args"]["device"]) == (16 * iteration, device)
        assert all(x.device.type == device for x in result["agent"].parameters())
    losses = {key: x for key, x in scalars(result).items() if key.startswith("losses")}
    assert all(len(x) == 3 and np.isfinite(x).all() for x in losses.values()), losses
    assert script.evaluate(result["run_dir"], 2).shape == (2,)
    assert all(x.device.type == "cpu" for x in script.load_agent(result["run_dir"]).parameters())


# --- graphs against eager PyTorch ---


FLAGS = {
    "plain": {},
    "target-kl": {"learning_rate": 0.01, "target_kl": 1e-3},
    "kl-penalty": {"objective": "kl-penalty", "kl_penalty_coef": 0.1, "kl_penalty_target": 1e-5},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("what", FLAGS)
def test_a_training_on_graphs_is_the_eager_one(atari, train, what):
    """Its losses, updates and betas of the first iterations, up to rounding; then it is evaluated."""
    flags = {"update_epochs": 3, "device": GPU} | FLAGS[what]
    eager, replayed = (train(atari, "CountMixed", 3, cuda_graphs=x, **flags) for x in (False, True))
    logged, again = scalars(eager), scalars(replayed)
    assert logged.keys() == again.keys()
    rounding = {"rel": 0.1, "abs": 2e-2} if what == "bf16" else {"rel": 1e-3, "abs": 1e-4}
    for name in (x for x in logged if x.startswith("losses")):
        assert np.isfinite(again[name]).all(), name
        assert again[name] == pytest.approx(logged[name], **rounding), name
    for name in {"charts/updates", "charts/kl_coef", "charts/episodic_return"} & logged.keys():
        assert again[name] == logged[name], name
    if what == "target-kl":
        assert min(logged["charts/updates"]) < 6, "it ended an update"
    if what == "kl-penalty":
        assert len(set(logged["charts/kl_coef"])) > 1, "beta changed"
    assert all(x.isfinite().all() for x in replayed["agent"].parameters())
    assert atari.evaluate(replayed["run_dir"], 2).shape == (2,)
