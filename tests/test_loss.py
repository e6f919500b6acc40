"""The loss by hand-written tables, by a slow loop and by finite differences.

ppo_loss is the same in the three scripts, which test_siblings.py proves: one of them is tested.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from ppo_discrete import ppo_loss

LOSS_INPUTS = ["newlogprob", "entropy", "newvalue", "logprobs", "advantages", "returns", "values"]
SWITCHES = list(itertools.product([False, True], repeat=2))  # norm_adv, clip_vloss

pytestmark = pytest.mark.usefixtures("seeded")


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def loss_args(**flags):
    """Flags that switch everything off but the policy loss, and those given."""
    off = {"clip_coef": 0.2, "ent_coef": 0.0, "vf_coef": 0.0, "norm_adv": False, "clip_vloss": False}
    return SimpleNamespace(**off | flags)


def hand_loss(flags=(), **inputs):
    """ppo_loss of hand-written lists, where 0 stands for those not given: loss, stats, gradients by input."""
    size = len(next(iter(inputs.values())))
    tensors = {name: double(inputs.get(name, [0.0] * size)) for name in LOSS_INPUTS}
    for name in LOSS_INPUTS[:3]:
        tensors[name].requires_grad_()
    loss, stats = ppo_loss(*tensors.values(), loss_args(**dict(flags)))
    loss.backward()
    gradients = {name: tensors[name].grad.tolist() for name in LOSS_INPUTS[:3]}
    return loss.item(), {key: x.item() for key, x in stats.items()}, gradients


def random_minibatch(dtype=torch.float64):
    """Inputs of ppo_loss in its order, on both sides of every clip at clip_coef 0.2."""
    x = dict(zip(LOSS_INPUTS, torch.randn(len(LOSS_INPUTS), 24, dtype=dtype), strict=True))
    x["newlogprob"] = x["logprobs"] + 0.3 * x["newlogprob"]
    x["newvalue"] = x["values"] + 0.3 * x["newvalue"]
    return list(x.values())


def slow_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args, kl_coef=None):
    """PPO paper eq. 7 or 8, and 9, with clipped values, sample by sample in Python floats: loss and stats."""
    M, eps = len(returns), args.clip_coef
    if args.norm_adv:
        mean = sum(advantages) / M
        std = math.sqrt(sum((a - mean) ** 2 for a in advantages) / (M - 1))
        advantages = [(a - mean) / (std + 1e-8) for a in advantages]
    s = dict.fromkeys(["pg_loss", "v_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"], 0.0)
    for m in range(M):
        difference, A = newlogprob[m] - logprobs[m], advantages[m]
        ratio = math.exp(difference)
        if kl_coef is None:
            s["pg_loss"] -= min(ratio * A, min(max(ratio, 1 - eps), 1 + eps) * A) / M
        else:
            s["pg_loss"] -= (ratio * A - kl_coef * (ratio - 1 - difference)) / M
        error = (newvalue[m] - returns[m]) ** 2
        if args.clip_vloss:
            clipped = min(max(newvalue[m], values[m] - eps), values[m] + eps)
            error = max(error, (clipped - returns[m]) ** 2)
        s["v_loss"] += error / 2 / M
        s["entropy"] += entropy[m] / M
        s["old_approx_kl"] -= difference / M
        s["approx_kl"] += (ratio - 1 - difference) / M
        s["clipfrac"] += (ratio < 1 - eps or ratio > 1 + eps) / M
    return s["pg_loss"] - args.ent_coef * s["entropy"] + args.vf_coef * s["v_loss"], s


@pytest.mark.parametrize("kl_coef", [None, 0.0, 0.3, 4.0])
@pytest.mark.parametrize("norm_adv, clip_vloss", SWITCHES)
def test_loss_and_stats_equal_a_slow_loop(norm_adv, clip_vloss, kl_coef):
    """With every combination of switches, for both objectives."""
    flags = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "ent_coef": 0.03, "vf_coef": 0.7}
    for clip_coef in 4 * [0.1, 0.2, 0.4]:
        args, inputs = loss_args(clip_coef=clip_coef, **flags), random_minibatch()
        loss, stats = ppo_loss(*inputs, args, kl_coef)
        expected_loss, expected = slow_loss(*(x.tolist() for x in inputs), args, kl_coef)
        assert 0 < expected["clipfrac"] < 1
        assert loss.item() == pytest.approx(expected_loss, abs=1e-12)
        got = {key: stats[key].item() for key in expected}
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kl_coef", [None, 4.0])
@pytest.mark.parametrize("norm_adv, clip_vloss", SWITCHES)
def test_loss_gradient_equals_finite_differences(norm_adv, clip_vloss, kl_coef):
    """By all that depends on the weights: log-probability, entropy, value."""
    args = loss_args(norm_adv=norm_adv, clip_vloss=clip_vloss, ent_coef=0.03, vf_coef=0.7)
    *new, logprobs, advantages, returns, values = random_minibatch()
    new = [x.requires_grad_() for x in new]
    assert torch.autograd.gradcheck(
        lambda *new: ppo_loss(*new, logprobs, advantages, returns, values, args, kl_coef)[0], new
    )


def test_beta_may_be_a_tensor():
    """train keeps it as one; it weighs the penalty like a number and needs no .item()."""
    inputs, beta = random_minibatch(), torch.tensor(0.25)
    loss, _ = ppo_loss(*inputs, loss_args(), kl_coef=beta)
    assert loss.shape == () and loss == ppo_loss(*inputs, loss_args(), kl_coef=0.25)[0]


@pytest.mark.parametrize("ratio, penalty, gradient", [(1.0, 0.0, 0.0), (1.5, 0.5 - math.log(1.5), 0.5)])
def test_kl_penalty_by_hand(ratio, penalty, gradient):
    """Eq. 8: -r A + beta (r - 1 - log r), derivative by log r: -r A + beta (r - 1); nothing is clipped."""
    newlogprob = double([math.log(ratio)]).requires_grad_()
    inputs = newlogprob, *(double([x]) for x in (0, 0, 0, 2, 0, 0))  # advantage 2
    loss, stats = ppo_loss(*inputs, loss_args(clip_coef=1e-3), kl_coef=3.0)
    loss.backward()
    assert loss.item() == stats["pg_loss"].item() == pytest.approx(-2 * ratio + 3 * penalty)
    assert newlogprob.grad.item() == pytest.approx(-2 * ratio + 3 * gradient)


def test_kl_penalty_and_its_gradient_are_exact_on_average():
    """Actions as often as the old policy plays them, 1, 3, 4 times in 8: KL(old || new), not the reverse."""
    old, new = double([1, 3, 4]) / 8, double([0.5, -0.2, 0.9]).requires_grad_()
    actions = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    zeros = torch.zeros(8, dtype=torch.float64)
    inputs = new.log_softmax(0)[actions], zeros, zeros, old.log()[actions], zeros, zeros, zeros
    loss, stats = ppo_loss(*inputs, loss_args(), kl_coef=1.0)
    exact = torch.nn.functional.kl_div(new.log_softmax(0), old, reduction="sum")
    assert loss.item() == pytest.approx(exact.item()) == stats["approx_kl"].item()
    got, expected = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (loss, exact))
    assert got.abs().max() > 0.05
    torch.testing.assert_close(got, expected)


def test_loss_of_unmoved_policy_is_minus_the_mean_advantage():
    """Ratio 1: pg_loss = -mean(A), with the gradient -A / M of the plain policy gradient."""
    logprobs, advantages = [-1.0, -3.0, -0.5], [2.0, -1.0, 5.0]
    loss, stats, gradients = hand_loss(newlogprob=logprobs, logprobs=logprobs, advantages=advantages)
    assert loss == stats["pg_loss"] == pytest.approx(-2.0, abs=1e-12)
    assert gradients["newlogprob"] == pytest.approx([-2 / 3, 1 / 3, -5 / 3])
    assert stats["approx_kl"] == stats["old_approx_kl"] == stats["clipfrac"] == 0


def test_loss_weighs_its_three_terms():
    """loss = pg_loss - ent_coef * entropy + vf_coef * v_loss, and v_loss has a factor 1/2 of its own."""
    flags = {"ent_coef": 0.1, "vf_coef": 0.25}
    inputs = {"advantages": [1.0, 3.0], "entropy": [5.0, 7.0], "newvalue": [2.0, 0.0], "returns": [0.0, 4.0]}
    loss, stats, _ = hand_loss(flags, **inputs)
    assert (stats["pg_loss"], stats["entropy"], stats["v_loss"]) == pytest.approx((-2.0, 6.0, 5.0))
    assert loss == pytest.approx(-2 - 0.1 * 6 + 0.25 * 5)


def test_stats_by_hand():
    """Estimators of KL(old || new): mean of -log r, and of r - 1 - log r. clipfrac: |r - 1| > clip_coef."""
    ratios = [1.0, 1.1, 0.7, 1.5]
    _, stats, _ = hand_loss(newlogprob=[math.log(r) for r in ratios])
    assert stats["old_approx_kl"] == pytest.approx(-math.log(1.1 * 0.7 * 1.5) / 4)
    assert stats["approx_kl"] == pytest.approx((0.1 - 0.3 + 0.5 - math.log(1.1 * 0.7 * 1.5)) / 4)
    assert stats["clipfrac"] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stats_are_detached_scalars_of_the_dtype_of_the_inputs(dtype):
    """Keeping them keeps no graph alive."""
    *new, logprobs, advantages, returns, values = random_minibatch(dtype)
    new = [x.requires_grad_() for x in new]
    loss, stats = ppo_loss(*new, logprobs, advantages, returns, values, loss_args(norm_adv=True))
    assert loss.requires_grad and loss.shape == () and loss.dtype == dtype
    for name, x in stats.items():
        assert not x.requires_grad and x.shape == () and x.dtype == dtype, name


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        (1.5, 1.0, -1.2, 0.0),  # better, but far enough already
        (1.5, -1.0, 1.5, 1.5),  # worse: come back, from however far
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.2),  # within the clip range: the plain surrogate objective
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_b10_clipping_table(ratio, advantage, loss, gradient):
    """clip_coef 0.2; the gradient is that of the loss by the log-probability."""
    got, stats, gradients = hand_loss(newlogprob=[math.log(ratio)], advantages=[advantage])
    assert got == stats["pg_loss"] == pytest.approx(loss, abs=1e-12)
    assert gradients["newlogprob"] == pytest.approx([gradient], abs=1e-12)


def test_b13_entropy_bonus_is_subtracted_from_the_loss():
    """More entropy, less loss."""
    loss, stats, gradients = hand_loss({"ent_coef": 0.5}, entropy=[1.0, 3.0])
    assert stats["entropy"] == pytest.approx(2.0) and loss == pytest.approx(-1.0)
    assert gradients["entropy"] == pytest.approx([-0.25, -0.25])


def test_b14_value_loss_pairs_each_value_with_its_own_return():
    """(4, 1) - (4,) would give the mean over all 16 pairs, 1.25."""
    inputs = {"newvalue": [1.0, 2.0, 3.0, 4.0], "returns": [4.0, 3.0, 2.0, 1.0]}
    loss, stats, gradients = hand_loss({"vf_coef": 1.0}, **inputs)
    assert loss == stats["v_loss"] == pytest.approx(2.5)
    assert gradients["newvalue"] == pytest.approx([-0.75, -0.25, 0.25, 0.75])


@pytest.mark.parametrize("name", LOSS_INPUTS)
def test_b14_loss_refuses_a_column_among_vectors(name):
    """(M, 1) in any place would broadcast with (M,)."""
    inputs = dict(zip(LOSS_INPUTS, random_minibatch(), strict=True))
    inputs[name] = inputs[name].unsqueeze(1)
    with pytest.raises(AssertionError):
        ppo_loss(*inputs.values(), loss_args())


@pytest.mark.parametrize(
    "old, new, target, loss, gradient",
    [
        (0.0, 1.0, 0.5, 0.125, 0.5),  # clipped to 0.2, an error of 0.3: the new value's error, 0.5, is worse
        (0.0, 1.0, 2.0, 1.62, 0.0),  # clipped to 0.2, an error of 1.8: worse than 1
        (0.0, 0.1, 1.0, 0.405, -0.9),  # moved by less than clip_coef: the plain squared error
        (0.0, -1.0, 1.0, 2.0, -2.0),  # moved away from the return: the new value's error
        (10.0, 11.0, 12.0, 1.62, 0.0),  # the second case again: the range is around the old value
        (10.0, 9.0, 8.0, 1.62, 0.0),
    ],
)
def test_b15_value_clipping_table(old, new, target, loss, gradient):
    """clip_coef 0.2; the gradient is that of the loss by the new value."""
    inputs = {"values": [old], "newvalue": [new], "returns": [target]}
    got, stats, gradients = hand_loss({"vf_coef": 1.0, "clip_vloss": True}, **inputs)
    assert got == stats["v_loss"] == pytest.approx(loss, abs=1e-12)
    assert gradients["newvalue"] == pytest.approx([gradient], abs=1e-12)


def test_b16_advantages_are_normalised_in_each_minibatch():
    """(A - mean) / (std + 1e-8) with Bessel's correction: neither the unit nor the origin of A matters."""
    std = math.sqrt(5 / 3)  # of 1, 2, 3, 4
    ratios, normalised = [1.1, 0.9, 1.0, 1.15], [-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std]
    expected = -sum(r * a for r, a in zip(ratios, normalised, strict=True)) / 4
    for scale, shift in (1.0, 0.0), (1000.0, 0.0), (0.5, 70.0):
        inputs = {"newlogprob": [math.log(r) for r in ratios]}
        inputs["advantages"] = [scale * a + shift for a in (1.0, 2.0, 3.0, 4.0)]
        loss, stats, _ = hand_loss({"norm_adv": True}, **inputs)
        assert loss == stats["pg_loss"] == pytest.approx(expected, rel=1e-6)
    assert hand_loss({"norm_adv": False}, **inputs)[0] != pytest.approx(expected, rel=0.1)


def test_b16_equal_advantages_give_zero_and_not_nan():
    """Their std is 0."""
    inputs = {"newlogprob": [0.1, -0.1], "advantages": [3.0, 3.0]}
    loss, _, gradients = hand_loss({"norm_adv": True}, **inputs)
    assert loss == 0 and gradients["newlogprob"] == [0, 0]


def test_b16_returns_are_not_normalised():
    """Nor values: their error stays in units of the reward."""
    inputs = {"newvalue": [1.0, 2.0], "returns": [11.0, 32.0], "advantages": [10.0, 30.0]}
    _, stats, _ = hand_loss({"norm_adv": True}, **inputs)
    assert stats["v_loss"] == pytest.approx((100 + 900) / 4)


def test_b16_loss_leaves_its_inputs_alone():
    """The next epoch finds the advantages, returns and values as they were."""
    inputs = random_minibatch()
    before = [x.clone() for x in inputs]
    ppo_loss(*inputs, loss_args(norm_adv=True, clip_vloss=True, vf_coef=1.0, ent_coef=1.0))
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_b42_ratio_of_tiny_probabilities_is_finite(dtype):
    """exp(-200) is 0 in float32 and exp(-2000) in float64: only the difference may be exponentiated."""
    newlogprob = torch.tensor([-200.0, -201.0, -2000.0, -2001.0], dtype=dtype)
    logprobs = torch.tensor([-201.0, -200.0, -2001.0, -2000.0], dtype=dtype)
    zeros = torch.zeros(4, dtype=dtype)
    inputs = newlogprob, zeros, zeros, logprobs, zeros - 1, zeros, zeros
    loss, stats = ppo_loss(*inputs, loss_args())
    assert loss.item() == pytest.approx((math.e + 0.8) / 2, rel=1e-6)
    assert stats["approx_kl"].item() == pytest.approx((math.e + 1 / math.e - 2) / 2, rel=1e-6)
