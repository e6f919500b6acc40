"""The equations (GAE, loss, running statistics) and the networks, against hand values and slow versions."""

import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

LOSS_INPUTS = "newlogprob entropy newvalue logprobs advantages returns values".split()
SWITCHES = list(itertools.product([False, True], repeat=2))  # norm_adv, clip_vloss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["ppo_discrete", "ppo_atari"])
def categorical_script(request):
    return importlib.import_module(request.param)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


# --- generalised advantage estimation ---


def slow_gae(rewards, values, dones, next_value, gamma, lam):
    """PPO paper eq. 11 and 12 as sums: A_t = sum of (gamma lambda)^l delta_{t+l}, to the episode's end."""
    r, V, done = rewards.tolist(), torch.cat([values, next_value[None]]).tolist(), dones.tolist()
    T, N = rewards.shape
    A = np.zeros((T, N))
    for n, t in itertools.product(range(N), range(T)):
        for k in range(t, T):
            delta = r[k][n] - V[k][n] if done[k][n] else r[k][n] + gamma * V[k + 1][n] - V[k][n]
            A[t, n] += (gamma * lam) ** (k - t) * delta
            if done[k][n]:
                break
    return torch.from_numpy(A)


def random_rollout(T, N, dtype=torch.float64):
    """Random rewards, values and next_value."""
    rewards, values = torch.randn(2, T, N, dtype=torch.float64).to(dtype)
    return rewards, values, torch.randn(N, dtype=torch.float64).to(dtype)


def gae_of_column(script, rewards, values, dones, next_value, gamma=0.9, lam=0.8):
    """Advantages of one environment, from lists: (T,)."""
    columns = [double(x).unsqueeze(1) for x in (rewards, values, dones)]
    advantages, returns = script.compute_gae(*columns, double([next_value]), gamma, lam)
    assert torch.equal(returns, advantages + columns[1])
    return advantages.squeeze(1).tolist()


def test_b02_truncation_counts_what_was_to_come_and_termination_does_not(script):
    """A truncated row carries gamma * V(final observation) in its reward: 1 + 0.9 * 10."""
    assert gae_of_column(script, [1 + 0.9 * 10], [0.0], [1.0], 55.0) == pytest.approx([10.0])
    assert gae_of_column(script, [1.0], [0.0], [1.0], 55.0) == pytest.approx([1.0])


@pytest.mark.parametrize("reset_value", [100.0, -100.0])
def test_b03_value_of_the_reset_observation_is_not_used(script, reset_value):
    """V(final) = 10 comes with the reward; the next row, or next_value, belongs to the next episode."""
    last = gae_of_column(script, [1 + 0.9 * 10], [0.0], [1.0], reset_value)
    middle = gae_of_column(script, [1 + 0.9 * 10, 0.0], [0.0, reset_value], [1.0, 1.0], 0.0)
    assert last == pytest.approx([10.0]) and middle[0] == pytest.approx(10.0)


def test_b04_td_error_takes_the_value_of_the_next_observation(script):
    """V(s_t) = 7 and V(s_{t+1}) = 10, once within the rollout and once after it."""
    within = gae_of_column(script, [1.0, 0.0], [7.0, 10.0], [0.0, 1.0], 55.0, lam=0.0)
    assert within[0] == pytest.approx(1 + 0.9 * 10 - 7)
    assert gae_of_column(script, [1.0], [7.0], [0.0], 10.0) == pytest.approx([1 + 0.9 * 10 - 7])


@pytest.mark.parametrize("length", [1, 3, 6])
def test_b05_two_episodes_in_a_row_equal_each_of_them_alone(script, length):
    rewards, values, next_value = random_rollout(7, 3)
    dones = torch.zeros_like(values)
    dones[length - 1] = 1
    both, _ = script.compute_gae(rewards, values, dones, next_value, 0.99, 0.95)
    parts = []
    for part in (slice(0, length), slice(length, 7)):
        parts += script.compute_gae(rewards[part], values[part], dones[part], next_value, 0.99, 0.95)[:1]
    assert torch.allclose(both, torch.cat(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_b06_a_truncated_episode_equals_one_that_is_still_running(script, length):
    """Nothing leaks over a truncation: gamma * V(final) within the reward equals V(final) as next_value."""
    rewards, values, next_value = random_rollout(7, 3)
    final_value, running = torch.randn(3, dtype=torch.float64), torch.zeros(7, 3)
    alone, _ = script.compute_gae(
        rewards[:length], values[:length], running[:length], final_value, 0.99, 0.95
    )
    after, _ = script.compute_gae(rewards[length:], values[length:], running[length:], next_value, 0.99, 0.95)
    cut = running.clone()
    cut[length - 1] = 1
    rewards[length - 1] += 0.99 * final_value
    both, _ = script.compute_gae(rewards, values, cut, next_value, 0.99, 0.95)
    assert torch.allclose(both, torch.cat([alone, after]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.5, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_b07_gae_equals_the_sum_in_the_paper_for_every_pattern_of_dones(script, dtype, tolerance, gamma, lam):
    """T = 7 rows, a column for each of the 2^7 patterns: episodes end in every row, first and last too."""
    dones = torch.tensor(list(itertools.product([0, 1], repeat=7))).T
    rewards, values, next_value = random_rollout(*dones.shape, dtype)
    advantages, returns = script.compute_gae(rewards, values, dones.to(dtype), next_value, gamma, lam)
    expected = slow_gae(rewards, values, dones, next_value, gamma, lam)
    assert advantages.dtype == returns.dtype == dtype and advantages.shape == (7, 128)
    assert torch.allclose(advantages.double(), expected, rtol=0, atol=tolerance)
    assert torch.allclose(returns.double(), expected + values.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(5))
def test_b07_gae_with_random_dones_of_any_dtype(script, seed):
    """Done flags may be bool, int or float and do not change the dtype of the result."""
    torch.manual_seed(seed)
    rewards, values, next_value = random_rollout(40, 3, torch.float32)
    dones = torch.rand(40, 3) < 0.2
    expected = slow_gae(rewards, values, dones, next_value, 0.97, 0.9)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64):
        advantages, _ = script.compute_gae(rewards, values, dones.to(dtype), next_value, 0.97, 0.9)
        assert advantages.dtype == torch.float32
        assert torch.allclose(advantages.double(), expected, rtol=0, atol=1e-5)


def test_b08_last_row_of_the_rollout(script):
    """The rollout ends with a termination, a truncation (V(final) = 10), or mid-episode (next_value = 4)."""
    values, gl = [0.5, 2.0], 0.9 * 0.8
    for last_reward, done, next_value, last in (
        (1.0, 1.0, 55.0, 1 - 2),
        (1 + 0.9 * 10, 1.0, 55.0, 1 + 0.9 * 10 - 2),
        (1.0, 0.0, 4.0, 1 + 0.9 * 4 - 2),
    ):
        first = 3 + 0.9 * 2 - 0.5 + gl * last
        got = gae_of_column(script, [3.0, last_reward], values, [0.0, done], next_value)
        assert got == pytest.approx([first, last], abs=1e-12)


def test_b09_lambda_1_is_the_discounted_return_minus_the_value(script):
    rewards, values, next_value = random_rollout(9, 3)
    dones = torch.zeros(9, 3)
    dones[3, 0] = dones[8, 1] = dones[0, 2] = 1
    discounted, G = torch.zeros_like(values), next_value
    for t in reversed(range(9)):
        G = discounted[t] = rewards[t] + 0.9 * G * (1 - dones[t])
    advantages, returns = script.compute_gae(rewards, values, dones, next_value, 0.9, 1.0)
    assert torch.allclose(advantages, discounted - values, rtol=0, atol=1e-12)
    assert torch.allclose(returns, discounted, rtol=0, atol=1e-12)


def test_b09_lambda_0_is_the_td_error(script):
    rewards, values, next_value = random_rollout(2, 1)
    advantages, _ = script.compute_gae(rewards, values, torch.zeros(2, 1), next_value, 0.9, 0.0)
    following = torch.stack([values[1], next_value])
    assert torch.allclose(advantages, rewards + 0.9 * following - values, rtol=0, atol=1e-12)


def test_b09_gamma_0_is_the_reward_minus_the_value(script):
    rewards, values, next_value = random_rollout(9, 3)
    advantages, returns = script.compute_gae(rewards, values, torch.zeros(9, 3), next_value, 0.0, 0.95)
    assert torch.equal(advantages, rewards - values)
    assert torch.allclose(returns, rewards, rtol=0, atol=1e-12)


def test_gae_leaves_its_inputs_alone(script):
    rewards, values, next_value = random_rollout(5, 2)
    inputs = rewards, values, torch.ones(5, 2), next_value
    before = [x.clone() for x in inputs]
    script.compute_gae(*inputs, 0.99, 0.95)
    assert all(map(torch.equal, inputs, before))


# --- loss ---


def loss_args(script, **flags):
    """Flags that switch everything off but the policy loss, and those given."""
    off = dict(clip_coef=0.2, ent_coef=0.0, vf_coef=0.0, norm_adv=False, clip_vloss=False)
    return script.Args(**off | flags)


def hand_loss(script, flags=(), **inputs):
    """ppo_loss of hand-written lists, where 0 stands for those not given: loss, stats, gradients by input."""
    size = len(next(iter(inputs.values())))
    tensors = {name: double(inputs.get(name, [0.0] * size)) for name in LOSS_INPUTS}
    for name in LOSS_INPUTS[:3]:
        tensors[name].requires_grad_()
    loss, stats = script.ppo_loss(*tensors.values(), loss_args(script, **dict(flags)))
    loss.backward()
    gradients = {name: tensors[name].grad.tolist() for name in LOSS_INPUTS[:3]}
    return loss.item(), {key: x.item() for key, x in stats.items()}, gradients


def random_minibatch(M=24, dtype=torch.float64):
    """Inputs of ppo_loss in its order, on both sides of every clip at clip_coef 0.2."""
    x = dict(zip(LOSS_INPUTS, torch.randn(len(LOSS_INPUTS), M, dtype=dtype), strict=True))
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
def test_loss_and_stats_equal_a_slow_loop(script, norm_adv, clip_vloss, kl_coef):
    flags = dict(norm_adv=norm_adv, clip_vloss=clip_vloss, ent_coef=0.03, vf_coef=0.7)
    for clip_coef in 4 * [0.1, 0.2, 0.4]:
        args, inputs = loss_args(script, clip_coef=clip_coef, **flags), random_minibatch()
        loss, stats = script.ppo_loss(*inputs, args, kl_coef)
        expected_loss, expected = slow_loss(*(x.tolist() for x in inputs), args, kl_coef)
        assert 0 < expected["clipfrac"] < 1
        assert loss.item() == pytest.approx(expected_loss, abs=1e-12)
        got = {key: stats[key].item() for key in expected}
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kl_coef", [None, 4.0])
@pytest.mark.parametrize("norm_adv, clip_vloss", SWITCHES)
def test_loss_gradient_equals_finite_differences(script, norm_adv, clip_vloss, kl_coef):
    args = loss_args(script, norm_adv=norm_adv, clip_vloss=clip_vloss, ent_coef=0.03, vf_coef=0.7)
    *new, logprobs, advantages, returns, values = random_minibatch()
    new = [x.requires_grad_() for x in new]
    assert torch.autograd.gradcheck(
        lambda *new: script.ppo_loss(*new, logprobs, advantages, returns, values, args, kl_coef)[0], new
    )


@pytest.mark.parametrize("ratio, penalty, gradient", [(1.0, 0.0, 0.0), (1.5, 0.5 - math.log(1.5), 0.5)])
def test_kl_penalty_by_hand(script, ratio, penalty, gradient):
    """Eq. 8: -r A + beta (r - 1 - log r), derivative by log r: -r A + beta (r - 1); nothing is clipped."""
    newlogprob = double([math.log(ratio)]).requires_grad_()
    inputs = newlogprob, *(double([x]) for x in (0, 0, 0, 2, 0, 0))  # advantage 2
    loss, stats = script.ppo_loss(*inputs, loss_args(script, clip_coef=1e-3), kl_coef=3.0)
    loss.backward()
    assert loss.item() == stats["pg_loss"].item() == pytest.approx(-2 * ratio + 3 * penalty)
    assert newlogprob.grad.item() == pytest.approx(-2 * ratio + 3 * gradient)


def test_kl_penalty_and_its_gradient_are_exact_on_average(script):
    """Actions as often as the old policy plays them, 1, 3, 4 times in 8: KL(old || new), not the reverse."""
    old, new = double([1, 3, 4]) / 8, double([0.5, -0.2, 0.9]).requires_grad_()
    actions = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    zeros = torch.zeros(8, dtype=torch.float64)
    inputs = new.log_softmax(0)[actions], zeros, zeros, old.log()[actions], zeros, zeros, zeros
    loss, stats = script.ppo_loss(*inputs, loss_args(script), kl_coef=1.0)
    exact = torch.nn.functional.kl_div(new.log_softmax(0), old, reduction="sum")
    assert loss.item() == pytest.approx(exact.item()) == stats["approx_kl"].item()
    got, expected = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (loss, exact))
    assert got.abs().max() > 0.05
    torch.testing.assert_close(got, expected)


def test_loss_of_unmoved_policy_is_minus_the_mean_advantage(script):
    """Ratio 1: pg_loss = -mean(A), with the gradient -A / M of the plain policy gradient."""
    logprobs, advantages = [-1.0, -3.0, -0.5], [2.0, -1.0, 5.0]
    loss, stats, gradients = hand_loss(script, newlogprob=logprobs, logprobs=logprobs, advantages=advantages)
    assert loss == stats["pg_loss"] == pytest.approx(-2.0, abs=1e-12)
    assert gradients["newlogprob"] == pytest.approx([-2 / 3, 1 / 3, -5 / 3])
    assert stats["approx_kl"] == stats["old_approx_kl"] == stats["clipfrac"] == 0


def test_loss_weighs_its_three_terms(script):
    """loss = pg_loss - ent_coef * entropy + vf_coef * v_loss, and v_loss has a factor 1/2 of its own."""
    flags = dict(ent_coef=0.1, vf_coef=0.25)
    inputs = dict(advantages=[1.0, 3.0], entropy=[5.0, 7.0], newvalue=[2.0, 0.0], returns=[0.0, 4.0])
    loss, stats, _ = hand_loss(script, flags, **inputs)
    assert (stats["pg_loss"], stats["entropy"], stats["v_loss"]) == pytest.approx((-2.0, 6.0, 5.0))
    assert loss == pytest.approx(-2 - 0.1 * 6 + 0.25 * 5)


def test_stats_by_hand(script):
    """Estimators of KL(old || new): mean of -log r, and of r - 1 - log r. clipfrac: |r - 1| > clip_coef."""
    ratios = [1.0, 1.1, 0.7, 1.5]
    _, stats, _ = hand_loss(script, newlogprob=[math.log(r) for r in ratios])
    assert stats["old_approx_kl"] == pytest.approx(-math.log(1.1 * 0.7 * 1.5) / 4)
    assert stats["approx_kl"] == pytest.approx((0.1 - 0.3 + 0.5 - math.log(1.1 * 0.7 * 1.5)) / 4)
    assert stats["clipfrac"] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_stats_have_the_dtype_of_the_inputs(script, dtype):
    loss, stats = script.ppo_loss(*random_minibatch(dtype=dtype), loss_args(script, norm_adv=True))
    assert {loss.dtype, *(x.dtype for x in stats.values())} == {dtype}


def test_stats_are_detached_scalars(script):
    *new, logprobs, advantages, returns, values = random_minibatch()
    new = [x.requires_grad_() for x in new]
    loss, stats = script.ppo_loss(*new, logprobs, advantages, returns, values, loss_args(script))
    assert loss.requires_grad and loss.shape == ()
    assert not any(x.requires_grad for x in stats.values())
    assert {x.shape for x in stats.values()} == {()}


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
def test_b10_clipping_table(script, ratio, advantage, loss, gradient):
    """clip_coef 0.2; the gradient is that of the loss by the log-probability."""
    got, stats, gradients = hand_loss(script, newlogprob=[math.log(ratio)], advantages=[advantage])
    assert got == stats["pg_loss"] == pytest.approx(loss, abs=1e-12)
    assert gradients["newlogprob"] == pytest.approx([gradient], abs=1e-12)


def test_b10_clip_range_is_a_flag(script):
    for clip_coef in (0.1, 0.3):
        for ratio, advantage, loss in (1.5, 1.0, -1 - clip_coef), (0.5, -1.0, 1 - clip_coef):
            inputs = dict(newlogprob=[math.log(ratio)], advantages=[advantage])
            got, stats, _ = hand_loss(script, dict(clip_coef=clip_coef), **inputs)
            assert got == stats["pg_loss"] == pytest.approx(loss, abs=1e-12)


def test_b13_entropy_bonus_is_subtracted_from_the_loss(script):
    loss, stats, gradients = hand_loss(script, dict(ent_coef=0.5), entropy=[1.0, 3.0])
    assert stats["entropy"] == pytest.approx(2.0) and loss == pytest.approx(-1.0)
    assert gradients["entropy"] == pytest.approx([-0.25, -0.25])


def test_b14_value_loss_pairs_each_value_with_its_own_return(script):
    """(4, 1) - (4,) would give the mean over all 16 pairs, 1.25."""
    inputs = dict(newvalue=[1.0, 2.0, 3.0, 4.0], returns=[4.0, 3.0, 2.0, 1.0])
    loss, stats, gradients = hand_loss(script, dict(vf_coef=1.0), **inputs)
    assert loss == stats["v_loss"] == pytest.approx(2.5)
    assert gradients["newvalue"] == pytest.approx([-0.75, -0.25, 0.25, 0.75])


@pytest.mark.parametrize("name", LOSS_INPUTS)
def test_b14_loss_refuses_a_column_among_vectors(script, name):
    inputs = dict(zip(LOSS_INPUTS, random_minibatch(), strict=True))
    inputs[name] = inputs[name].unsqueeze(1)
    with pytest.raises(AssertionError):
        script.ppo_loss(*inputs.values(), loss_args(script))


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
def test_b15_value_clipping_table(script, old, new, target, loss, gradient):
    """clip_coef 0.2; the gradient is that of the loss by the new value."""
    inputs, flags = dict(values=[old], newvalue=[new], returns=[target]), dict(vf_coef=1.0, clip_vloss=True)
    got, stats, gradients = hand_loss(script, flags, **inputs)
    assert got == stats["v_loss"] == pytest.approx(loss, abs=1e-12)
    assert gradients["newvalue"] == pytest.approx([gradient], abs=1e-12)


def test_b15_without_clipping_the_old_value_plays_no_part(script):
    for old in (0.0, 1.0, 50.0):
        inputs = dict(values=[old], newvalue=[1.0], returns=[3.0])
        loss, stats, gradients = hand_loss(script, dict(vf_coef=1.0, clip_vloss=False), **inputs)
        assert loss == stats["v_loss"] == pytest.approx(2.0) and gradients["newvalue"] == pytest.approx(
            [-2.0]
        )


def test_b16_advantages_are_normalised_in_each_minibatch(script):
    """(A - mean) / (std + 1e-8) with Bessel's correction: neither the unit nor the origin of A matters."""
    std = math.sqrt(5 / 3)  # of 1, 2, 3, 4
    ratios, normalised = [1.1, 0.9, 1.0, 1.15], [-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std]
    expected = -sum(r * a for r, a in zip(ratios, normalised, strict=True)) / 4
    for scale, shift in (1.0, 0.0), (1000.0, 0.0), (0.5, 70.0):
        inputs = dict(newlogprob=[math.log(r) for r in ratios])
        inputs["advantages"] = [scale * a + shift for a in (1.0, 2.0, 3.0, 4.0)]
        loss, stats, _ = hand_loss(script, dict(norm_adv=True), **inputs)
        assert loss == stats["pg_loss"] == pytest.approx(expected, rel=1e-6)
    assert hand_loss(script, dict(norm_adv=False), **inputs)[0] != pytest.approx(expected, rel=0.1)


def test_b16_equal_advantages_give_zero_and_not_nan(script):
    inputs = dict(newlogprob=[0.1, -0.1], advantages=[3.0, 3.0])
    loss, _, gradients = hand_loss(script, dict(norm_adv=True), **inputs)
    assert loss == 0 and gradients["newlogprob"] == [0, 0]


def test_b16_returns_are_not_normalised(script):
    inputs = dict(newvalue=[1.0, 2.0], returns=[11.0, 32.0], advantages=[10.0, 30.0])
    _, stats, _ = hand_loss(script, dict(norm_adv=True), **inputs)
    assert stats["v_loss"] == pytest.approx((100 + 900) / 4)


def test_b16_loss_leaves_its_inputs_alone(script):
    """The next epoch finds the advantages, returns and values as they were."""
    inputs = random_minibatch()
    before = [x.clone() for x in inputs]
    script.ppo_loss(*inputs, loss_args(script, norm_adv=True, clip_vloss=True, vf_coef=1.0, ent_coef=1.0))
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("function", ["check_args", "train"])
def test_b17_a_minibatch_of_1_cannot_be_normalised(script, function):
    """Refused with the flags to change, before anything is written."""
    flags = dict(num_envs=2, num_steps=2, num_minibatches=4, update_epochs=1, total_timesteps=4)
    with pytest.raises(ValueError, match="--num-minibatches 4 .*--no-norm-adv"):
        getattr(script, function)(script.Args(**flags))
    assert not list(Path().iterdir())
    script.check_args(script.Args(**flags, norm_adv=False))
    script.check_args(script.Args(**flags | dict(num_minibatches=2)))


def test_b18_every_epoch_learns_from_the_same_constants(script, monkeypatch):
    """What train gives to ppo_loss in each epoch is what compute_gae returned once, without a gradient."""
    compute_gae, ppo_loss, rollouts, epochs = script.compute_gae, script.ppo_loss, [], []

    def spy_gae(*inputs):
        rollouts.append(compute_gae(*inputs))
        return rollouts[-1]

    def spy_loss(newlogprob, entropy, newvalue, *rest):
        *constants, _, kl_coef = rest
        assert kl_coef is None
        assert newlogprob.requires_grad and newvalue.requires_grad
        assert not any(x.requires_grad for x in constants)
        epochs.append(torch.stack(constants[1:3]))  # (2, M) advantages, returns
        return ppo_loss(newlogprob, entropy, newvalue, *rest)

    monkeypatch.setattr(script, "compute_gae", spy_gae)
    monkeypatch.setattr(script, "ppo_loss", spy_loss)
    flags = dict(num_envs=2, num_steps=4, num_minibatches=2, update_epochs=3, total_timesteps=8, device="cpu")
    script.train(script.Args(**flags))
    assert len(rollouts) == 1 and len(epochs) == 6
    expected = torch.stack(rollouts[0]).flatten(1)
    expected = expected[:, expected[0].argsort()]
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        seen = torch.cat([first, second], dim=1)
        assert torch.equal(seen[:, seen[0].argsort()], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_b42_ratio_of_tiny_probabilities_is_finite(script, dtype):
    """exp(-200) is 0 in float32 and exp(-2000) in float64: only the difference may be exponentiated."""
    newlogprob = torch.tensor([-200.0, -201.0, -2000.0, -2001.0], dtype=dtype)
    logprobs = torch.tensor([-201.0, -200.0, -2001.0, -2000.0], dtype=dtype)
    zeros = torch.zeros(4, dtype=dtype)
    inputs = newlogprob, zeros, zeros, logprobs, zeros - 1, zeros, zeros
    loss, stats = script.ppo_loss(*inputs, loss_args(script))
    assert loss.item() == pytest.approx((math.e + 0.8) / 2, rel=1e-6)
    assert stats["approx_kl"].item() == pytest.approx((math.e + 1 / math.e - 2) / 2, rel=1e-6)


# --- networks ---


def make_agent(script, num_actions=4, **flags):
    """A fresh agent for vectors of 5 numbers, or frames; num_actions is the size of a continuous action."""
    shape = (4, 84, 84) if script.__name__ == "ppo_atari" else (5,)
    return script.Agent(shape, num_actions, script.Args(**flags))


def make_obs(script, N=6):
    """Observations as the buffer stores them."""
    if script.__name__ == "ppo_atari":
        return torch.randint(0, 256, (N, 4, 84, 84), dtype=torch.uint8)
    return torch.randn(N, 5)


def policy_net(agent):
    return agent.actor_mean if hasattr(agent, "actor_mean") else agent.actor


def layers(module):
    return [x for x in module.modules() if isinstance(x, nn.Linear | nn.Conv2d)]


def set_policy(agent, logits_or_means):
    """The same logits or means whatever is observed."""
    head = layers(policy_net(agent))[-1]
    nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor(logits_or_means)


def randomize(agent):
    """Weights that make no output small, so that an activation on it would show."""
    for parameter in agent.parameters():
        nn.init.normal_(parameter, std=0.7)
    return agent


@torch.no_grad()
def all_logprobs(agent, obs, num_actions=4):
    """Log-probability of every action, (N, num_actions), by scoring each."""
    given = [torch.full((len(obs),), a) for a in range(num_actions)]
    return torch.stack([agent.get_action_and_value(obs, a)[1] for a in given], dim=1)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_layer_init_is_orthogonal_with_the_given_gain(script, shape):
    layer = nn.Linear(*shape)
    assert script.layer_init(layer, std=0.3, bias_const=-2.0) is layer
    assert torch.allclose(torch.linalg.svdvals(layer.weight), torch.full((min(shape),), 0.3), atol=1e-5)
    assert (layer.bias == -2).all()


def test_layer_init_defaults_to_sqrt_2_and_no_bias(script):
    layer = script.layer_init(nn.Conv2d(2, 6, 3))
    gains = torch.linalg.svdvals(layer.weight.flatten(1))
    assert torch.allclose(gains, torch.full((6,), math.sqrt(2)), atol=1e-5)
    assert (layer.bias == 0).all()


def test_b24_gains_of_fresh_weights(script):
    """sqrt(2) in hidden layers, 0.01 in the policy's output, 1 in the value's; all biases 0."""
    agent = make_agent(script)
    heads = {layers(policy_net(agent))[-1]: 0.01, layers(agent.critic)[-1]: 1.0}
    assert len(layers(agent)) == 6
    for layer in layers(agent):
        gains = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        expected = heads.get(layer, math.sqrt(2))
        assert torch.allclose(gains, torch.full_like(gains, expected), rtol=1e-4, atol=0), layer
        assert (layer.bias == 0).all(), layer


@pytest.mark.parametrize("num_actions", [2, 6])
def test_b24_fresh_policy_is_almost_uniform(categorical_script, num_actions):
    agent = make_agent(categorical_script, num_actions)
    *_, entropy, _ = agent.get_action_and_value(make_obs(categorical_script))
    assert torch.allclose(entropy, torch.full((6,), math.log(num_actions)), rtol=0, atol=1e-3)


def test_b24_fresh_policy_is_a_standard_normal(continuous):
    agent = make_agent(continuous)
    mean, _, entropy, _ = agent.get_action_and_value(make_obs(continuous), deterministic=True)
    assert mean.abs().max() < 0.05
    assert torch.allclose(entropy, torch.full((6,), 2 * math.log(2 * math.pi * math.e)))


def test_b24_policy_and_value_share_nothing(mlp_script):
    """Neither's gradient reaches the other, and together they reach everything."""
    agent, obs = make_agent(mlp_script), make_obs(mlp_script)
    reached = []
    for quantity in (lambda: agent.get_value(obs), lambda: agent.get_action_and_value(obs)[1]):
        agent.zero_grad(set_to_none=True)
        quantity().sum().backward()
        reached.append({name for name, x in agent.named_parameters() if x.grad is not None})
    assert not reached[0] & reached[1]
    assert reached[0] | reached[1] == {name for name, _ in agent.named_parameters()}
    assert len(reached[0]) == 6


def test_b24_policy_and_value_share_the_cnn(atari):
    agent = make_agent(atari)
    agent.get_value(make_obs(atari, 2)).sum().backward()
    without = {name for name, x in agent.named_parameters() if x.grad is None}
    assert without == {"actor.weight", "actor.bias"}


@pytest.mark.parametrize(
    "has, device, gpu, fast",
    [
        (True, "auto", False, True),
        (True, "cpu", True, True),
        (False, "cpu", False, False),
        (True, "cuda", True, False),
        (True, "auto", True, False),
    ],
)
def test_precision_auto_is_that_of_the_processor(atari, monkeypatch, has, device, gpu, fast):
    """bf16 on CPUs that have it; on GPUs it was not measured."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert bool(make_agent(atari, precision="auto", device=device).bf16) == fast
    assert make_agent(atari, precision="bf16").bf16 and not make_agent(atari, precision="fp32").bf16


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_b25_pixels_reach_the_cnn_divided_by_255_once(atari, precision):
    agent, inputs = make_agent(atari, precision=precision), []
    layers(agent)[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    raw = torch.zeros(3, 4, 84, 84, dtype=torch.uint8)
    raw[0], raw[1] = 255, 51
    obs = agent.normalize(raw)
    with torch.no_grad():
        agent.get_value(obs)
        agent.get_action_and_value(obs)
    assert obs.dtype == torch.uint8 and torch.equal(obs, raw) and (raw[0] == 255).all()
    assert len(inputs) == 2
    for x in inputs:
        assert x.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert (x[0] == 1).all() and (x[2] == 0).all()
        assert torch.allclose(x[1].float(), torch.tensor(0.2), rtol=2**-8)


def test_bf16_cnn_is_close_to_fp32_and_outputs_are_float32(atari):
    """Only the trunk is in bf16: the weights, the heads' inputs and all outputs stay in float32."""
    agents = {precision: make_agent(atari, precision=precision) for precision in ("fp32", "bf16")}
    agents["bf16"].load_state_dict(agents["fp32"].state_dict())
    obs, results, features, dtypes = make_obs(atari, 8), {}, {}, {}
    for precision, agent in agents.items():
        for layer in set(layers(agent)) - {agent.actor, agent.critic}:
            layer.register_forward_hook(
                lambda *args, p=precision: dtypes.setdefault(p, set()).add(args[2].dtype)
            )
        agent.actor.weight.data *= 100  # to the scale of the value
        agent.actor.register_forward_pre_hook(lambda _, args, p=precision: features.update({p: args[0]}))
        results[precision] = agent.get_action_and_value(obs, torch.zeros(8, dtype=torch.int64))[1:]
        values = agent.get_value(obs)
        assert {x.dtype for x in (*results[precision], values, features[precision])} == {torch.float32}
        assert {x.dtype for x in agent.parameters()} == {torch.float32}
    assert dtypes == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    assert 0 < (features["bf16"] - features["fp32"]).norm() / features["fp32"].norm() < 0.02
    for low, full in zip(results["bf16"], results["fp32"], strict=True):
        assert torch.allclose(low, full, rtol=0, atol=0.05)


@pytest.mark.parametrize("N", [1, 6])
def test_agent_shapes_and_dtypes(script, N):
    """The contract: action, log-probability, entropy, value, one row for each observation."""
    agent, obs = make_agent(script), make_obs(script, N)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    if script.__name__ == "ppo_continuous":
        assert action.shape == (N, 4) and action.dtype == torch.float32
    else:
        assert action.shape == (N,) and action.dtype == torch.int64
    assert agent.get_value(obs).shape == logprob.shape == entropy.shape == value.shape == (N,)
    assert {x.dtype for x in (logprob, entropy, value, agent.get_value(obs))} == {torch.float32}


def test_agent_gives_one_value_by_both_ways(script):
    agent, obs = make_agent(script), make_obs(script)
    *_, value = agent.get_action_and_value(obs)
    assert torch.allclose(agent.get_value(obs), value, rtol=1e-5)
    assert len(set(value.tolist())) == len(obs)


def test_agent_scores_a_given_action_and_does_not_sample_it_again(script):
    agent, obs = make_agent(script), make_obs(script)
    sampled, logprob, *_ = agent.get_action_and_value(obs)
    for _ in range(3):
        action, again, *_ = agent.get_action_and_value(obs, sampled)
        assert torch.equal(action, sampled)
        assert torch.allclose(again, logprob, rtol=1e-5)
    other = (sampled + 1) % 4
    action, changed, *_ = agent.get_action_and_value(obs, other)
    assert torch.equal(action, other) and (changed != logprob).all()


def test_agent_deterministic_is_the_most_probable_action(categorical_script):
    agent = make_agent(categorical_script)
    layers(policy_net(agent))[-1].weight.data *= 100
    obs = make_obs(categorical_script, 20)
    action, logprob, *_ = agent.get_action_and_value(obs, deterministic=True)
    best, index = all_logprobs(agent, obs).max(dim=1)
    assert torch.equal(action, index) and torch.allclose(logprob, best, rtol=1e-5)
    assert torch.equal(agent.get_action_and_value(obs, deterministic=True)[0], action)


def test_agent_deterministic_is_the_mean(continuous):
    """The density of the mean is the largest, -sum log sigma - A/2 log 2 pi."""
    agent = randomize(make_agent(continuous))
    obs = make_obs(continuous)
    action, logprob, *_ = agent.get_action_and_value(obs, deterministic=True)
    expected = -agent.actor_logstd.sum() - 2 * math.log(2 * math.pi)
    assert torch.allclose(logprob, expected.expand(6), atol=1e-5)
    assert torch.allclose(action, agent.actor_mean(obs), atol=1e-5)
    assert torch.equal(agent.get_action_and_value(obs, deterministic=True)[0], action)


def test_agent_samples_actions_as_often_as_they_are_probable(categorical_script):
    """Pearson's chi-square of 1000 draws, 3 degrees of freedom; each row of the batch draws for itself."""
    agent, p = make_agent(categorical_script), torch.tensor([0.05, 0.15, 0.3, 0.5])
    set_policy(agent, p.log().tolist())
    obs = torch.zeros_like(make_obs(categorical_script, 1)).repeat_interleave(1000, dim=0)
    with torch.no_grad():
        action, logprob, entropy, _ = agent.get_action_and_value(obs)
    counts, expected = action.bincount(minlength=4), 1000 * p
    assert ((counts - expected) ** 2 / expected).sum() < 21  # exceeded by one seed in 10,000
    assert torch.allclose(logprob, p.log()[action], atol=1e-5)
    assert torch.allclose(entropy, -(p * p.log()).sum().expand(1000), atol=1e-5)


def test_agent_logprobs_are_of_one_distribution(categorical_script):
    """Probabilities of all actions sum to 1, and the entropy is theirs."""
    agent, obs = make_agent(categorical_script), make_obs(categorical_script)
    layers(policy_net(agent))[-1].weight.data *= 100
    logprobs = all_logprobs(agent, obs)
    *_, entropy, _ = agent.get_action_and_value(obs)
    assert torch.allclose(logprobs.exp().sum(1), torch.ones(6), atol=1e-5)
    assert torch.allclose(entropy, -(logprobs.exp() * logprobs).sum(1), atol=1e-5)


def test_agent_samples_a_normal_around_the_mean(continuous):
    """Mean, standard deviation and independence of 20,000 draws."""
    agent, means, stds = (
        make_agent(continuous, 3),
        torch.tensor([1.0, -2.0, 0.0]),
        torch.tensor([0.5, 1.0, 3.0]),
    )
    set_policy(agent, means.tolist())
    agent.actor_logstd.data = stds.log()
    with torch.no_grad():
        z = (agent.get_action_and_value(torch.randn(20_000, 5))[0] - means) / stds
    assert z.mean(0).abs().max() < 0.04 and (z.std(0) - 1).abs().max() < 0.03
    assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 0.04


def test_b12_log_probability_is_summed_over_the_action(continuous):
    """-1/2 sum ((a - mu) / sigma)^2 - sum log sigma - 1.5 log 2 pi."""
    agent, mu, logstd = (
        make_agent(continuous, 3),
        torch.tensor([1.0, -2.0, 0.5]),
        torch.tensor([-0.5, 0.3, 1.0]),
    )
    set_policy(agent, mu.tolist())
    agent.actor_logstd.data = logstd
    action = torch.randn(6, 3)
    _, logprob, *_ = agent.get_action_and_value(torch.randn(6, 5), action)
    z = (action - mu) / logstd.exp()
    expected = -0.5 * (z**2).sum(1) - logstd.sum() - 1.5 * math.log(2 * math.pi)
    assert logprob.shape == (6,) and torch.allclose(logprob, expected, atol=1e-5)


def test_b13_entropy_is_summed_over_the_action(continuous):
    """sum of 1/2 log (2 pi e) + log sigma."""
    agent, logstd = make_agent(continuous, 3), torch.tensor([-0.5, 0.3, 1.0])
    agent.actor_logstd.data = logstd
    _, _, entropy, _ = agent.get_action_and_value(torch.randn(6, 5))
    expected = 1.5 * math.log(2 * math.pi * math.e) + logstd.sum()
    assert torch.allclose(entropy, expected.expand(6), atol=1e-5)


def test_b13_a_step_on_the_bonus_raises_the_entropy(script):
    agent, obs = make_agent(script), make_obs(script)
    set_policy(agent, [0.0, 1.0, 2.0, 3.0])
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    zeros = torch.zeros(6)
    inputs = logprob, entropy, value, logprob.detach(), zeros, zeros, zeros
    script.ppo_loss(*inputs, loss_args(script, ent_coef=1.0))[0].backward()
    with torch.no_grad():
        for x in agent.parameters():
            x -= 0.01 * (0 if x.grad is None else x.grad)
    assert agent.get_action_and_value(obs, action)[2].mean() > entropy.mean() + 1e-4


@pytest.mark.parametrize("sizes", [(), (7,), (7, 3), (2, 9, 4)])
def test_hidden_sizes_are_the_widths_of_actor_and_critic(mlp_script, sizes):
    agent = make_agent(mlp_script, hidden_sizes=sizes)
    for net, outputs in (policy_net(agent), 4), (agent.critic, 1):
        widths = [5, *sizes, outputs]
        expected = list(zip(widths, widths[1:], strict=False))
        assert [(x.in_features, x.out_features) for x in layers(net)] == expected


@pytest.mark.parametrize("sizes", [(), (7,), (7, 3)])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "gelu"])
def test_activation_follows_every_hidden_layer_and_no_output(mlp_script, activation, sizes):
    """Outputs equal a forward pass written out: also of the actor's log-probabilities and means."""
    agent, obs = (
        randomize(make_agent(mlp_script, hidden_sizes=sizes, activation=activation)),
        torch.randn(6, 5),
    )
    function = getattr(nn.functional, activation)

    def forward(net):
        *hidden, output = layers(net)
        x = obs
        for layer in hidden:
            x = function(x @ layer.weight.T + layer.bias)
        return x @ output.weight.T + output.bias

    policy = forward(policy_net(agent))
    assert torch.allclose(agent.get_value(obs), forward(agent.critic)[:, 0], atol=1e-4)
    if mlp_script.__name__ == "ppo_discrete":
        assert torch.allclose(all_logprobs(agent, obs), policy.log_softmax(1), atol=1e-4)
    else:
        mean = agent.get_action_and_value(obs, deterministic=True)[0]
        assert torch.allclose(mean, policy, atol=1e-4)


# --- several discrete actions at once ---

BRANCHES = [3, 1, 4]


@torch.no_grad()
def branch_logprobs(agent, obs):
    """Log-probabilities of each branch by its own rows of the output layer: a list of (N, n)."""
    weight, bias = (x.view(len(BRANCHES), max(BRANCHES), -1) for x in agent.actor[-2].parameters())
    features = agent.actor[:-2](obs)
    rows = [(w[:n], b[:n, 0]) for w, b, n in zip(weight, bias, BRANCHES, strict=True)]
    return [(features @ w.T + b).log_softmax(-1) for w, b in rows]


def test_b12_log_probability_is_summed_over_the_branches(discrete):
    agent, obs = make_agent(discrete, BRANCHES), 3 * torch.randn(50, 5)
    nn.init.normal_(agent.actor[-2].weight)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    assert action.shape == (50, 3) and value.shape == logprob.shape == entropy.shape == (50,)
    logprobs = branch_logprobs(agent, obs)
    expected = sum(x.gather(1, action[:, [k]])[:, 0] for k, x in enumerate(logprobs))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(agent.get_action_and_value(obs, action)[1], expected)
    torch.testing.assert_close(entropy, sum(-(x.exp() * x).sum(-1) for x in logprobs))  # B13
    best, *_ = agent.get_action_and_value(obs, deterministic=True)
    assert torch.equal(best, torch.stack([x.argmax(-1) for x in logprobs], 1))


def test_branches_are_sampled_as_often_as_they_are_probable_and_never_beyond_their_size(discrete):
    agent = make_agent(discrete, BRANCHES)
    nn.init.normal_(agent.actor[-2].weight)
    obs = torch.randn(1, 5)
    actions, *_ = agent.get_action_and_value(obs.expand(20_000, 5))
    for k, logprobs in enumerate(branch_logprobs(agent, obs)):
        frequencies = torch.bincount(actions[:, k]) / len(actions)
        torch.testing.assert_close(frequencies, logprobs[0].exp(), rtol=0, atol=0.02)


def test_a_table_of_branches_is_as_good_as_a_row(discrete):
    """MultiDiscrete([[2, 3], [4, 1]]): actions (N, 2, 2), log-probabilities summed over all four."""
    agent, obs = make_agent(discrete, [[2, 3], [4, 1]]), torch.randn(2000, 5)
    action, logprob, entropy, _ = agent.get_action_and_value(obs)
    assert action.amax(0).tolist() == [[1, 2], [3, 0]] and logprob.shape == entropy.shape == (2000,)
    assert entropy.mean().item() == pytest.approx(
        math.log(2 * 3 * 4 * 1), rel=0.01
    )  # almost uniform at first


def test_no_gradient_moves_what_a_branch_lacks(discrete):
    """Surplus outputs keep their weights and their bias, and no gradient is nan."""
    agent, obs = make_agent(discrete, BRANCHES), torch.randn(50, 5)
    action, *_ = agent.get_action_and_value(obs)
    _, logprob, entropy, _ = agent.get_action_and_value(obs, action)
    (logprob.mean() + entropy.mean()).backward()
    lacking = torch.arange(4) >= torch.tensor(BRANCHES)[:, None]  # (3, 4)
    for x in agent.actor[-2].parameters():
        norms = x.grad.view(3, 4, -1).norm(dim=-1)
        assert norms.isfinite().all() and (norms[lacking] == 0).all() and (norms[~lacking][:3] > 0).all()


# --- standard deviation ---


def test_init_log_std_is_the_log_of_the_standard_deviation(continuous):
    assert make_agent(continuous, init_log_std=-1).actor_logstd.tolist() == [-1.0] * 4  # an int from Python
    agent = make_agent(continuous, init_log_std=-0.5)
    set_policy(agent, [1.0, -1.0, 0.0, 0.0])
    action, logprob, entropy, _ = agent.get_action_and_value(torch.randn(20_000, 5))
    assert action.std(0).tolist() == pytest.approx([math.exp(-0.5)] * 4, rel=0.03)
    assert entropy[0].item() == pytest.approx(4 * (0.5 * math.log(2 * math.pi * math.e) - 0.5), rel=1e-5)


@pytest.mark.parametrize("learn_std", [True, False])
def test_learn_std_decides_whether_gradients_move_it(continuous, learn_std):
    agent, obs = make_agent(continuous, init_log_std=-0.5, learn_std=learn_std), torch.randn(6, 5)
    _, logprob, entropy, _ = agent.get_action_and_value(obs)
    (logprob + entropy).sum().backward()
    assert (agent.actor_logstd.grad is not None) == learn_std
    assert "actor_logstd" in agent.state_dict()


# --- running statistics ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,)])
@pytest.mark.parametrize("sizes", [(1, 7, 50, 2), (16, 16, 16), (200, 1, 1, 1)])
def test_b32_running_statistics_equal_numpy(mlp_script, dtype, shape, sizes):
    """After every batch, for data far from 0 and with a drift."""
    agent, rows = mlp_script.Agent(shape, 1, mlp_script.Args(norm_obs=True)), []
    for i, size in enumerate(sizes):
        batch = (torch.randn(size, *shape, dtype=torch.float64) * (i + 1) + 100 * (i + 1)).to(dtype)
        rows.append(batch.double().numpy())
        agent.normalize(batch, update=True)
        seen = np.concatenate(rows)
        assert agent.obs_count == len(seen) and agent.obs_mean.shape == agent.obs_var.shape == shape
        np.testing.assert_allclose(agent.obs_mean.numpy(), seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(agent.obs_var.numpy(), seen.var(0), rtol=1e-9, atol=1e-9)


def test_b32_first_batch_of_one_row(mlp_script):
    """Nothing of the start values is left: no pseudo-count."""
    agent = mlp_script.Agent((2,), 1, mlp_script.Args(norm_obs=True))
    agent.normalize(torch.tensor([[3.0, -5.0]]), update=True)
    assert agent.obs_mean.tolist() == [3, -5] and agent.obs_var.tolist() == [0, 0] and agent.obs_count == 1


def test_normalize_changes_nothing_without_statistics(mlp_script):
    agent, obs = make_agent(mlp_script, norm_obs=False), 50 * torch.randn(6, 5, dtype=torch.float64)
    for update in (False, True):
        normalized = agent.normalize(obs, update=update)
        assert normalized.dtype == torch.float32 and torch.equal(normalized, obs.float())


def test_normalize_leaves_frames_as_they_are(atari):
    agent, obs = make_agent(atari), make_obs(atari)
    for update in (False, True):
        assert agent.normalize(obs, update=update).dtype == torch.uint8
        assert torch.equal(agent.normalize(obs, update=update), obs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_subtracts_the_mean_divides_by_the_std_and_clips_at_10(mlp_script, dtype):
    agent, seen = make_agent(mlp_script, norm_obs=True), 3 * torch.randn(30, 5, dtype=torch.float64) + 7
    normalized = agent.normalize(seen, update=True)
    mean, std = seen.mean(0), seen.std(0, correction=0)
    assert torch.allclose(normalized.double(), (seen - mean) / std, rtol=0, atol=1e-5)
    z = torch.tensor([[-11.0, -9.9, 0.0, 9.9, 1000.0]])
    normalized = agent.normalize((mean + std * z).to(dtype))
    assert normalized.dtype == torch.float32
    assert torch.allclose(normalized, torch.tensor([[-10, -9.9, 0.0, 9.9, 10.0]]), rtol=0, atol=1e-4)


def test_normalize_survives_a_constant_observation(mlp_script):
    agent = make_agent(mlp_script, norm_obs=True)
    assert (agent.normalize(torch.ones(4, 5), update=True) == 0).all()
    assert agent.normalize(torch.zeros(4, 5)).tolist() == [[-10.0] * 5] * 4


def test_normalize_moves_the_statistics_only_where_told(mlp_script):
    """Not by default, not by a network's pass; update=True does."""
    agent, obs = make_agent(mlp_script, norm_obs=True), torch.randn(6, 5) + 3
    agent.normalize(obs, update=True)
    before = {key: x.clone() for key, x in agent.named_buffers()}
    for _ in range(3):
        agent.get_action_and_value(agent.normalize(100 * obs))
        agent.get_value(agent.normalize(100 * obs, update=False))
    assert before and all(torch.equal(x, before[key]) for key, x in agent.named_buffers())
    agent.normalize(100 * obs, update=True)
    assert agent.obs_count == 12 and not torch.equal(agent.obs_mean, before["obs_mean"])
