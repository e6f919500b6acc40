"""Generalised advantage estimation by hand, by the paper's sums and in its limits.

compute_gae is the same in the three scripts, which test_siblings.py proves: one of them is tested.
"""

import itertools

import numpy as np
import pytest
import torch

from ppo_discrete import compute_gae

pytestmark = pytest.mark.usefixtures("seeded")


def double(x):
    return torch.tensor(x, dtype=torch.float64)


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


def random_rollout(rows, columns, dtype=torch.float64):
    """Random rewards and values, (rows, columns), and next_value, (columns,)."""
    rewards, values = torch.randn(2, rows, columns, dtype=torch.float64).to(dtype)
    return rewards, values, torch.randn(columns, dtype=torch.float64).to(dtype)


def gae_of_column(rewards, values, dones, next_value, gamma=0.9, lam=0.8):
    """Advantages of one environment, from lists: (T,)."""
    columns = [double(x).unsqueeze(1) for x in (rewards, values, dones)]
    advantages, returns = compute_gae(*columns, double([next_value]), gamma, lam)
    assert torch.equal(returns, advantages + columns[1])
    return advantages.squeeze(1).tolist()


def test_b02_truncation_counts_what_was_to_come_and_termination_does_not():
    """A truncated row carries gamma * V(final observation) in its reward: 1 + 0.9 * 10."""
    assert gae_of_column([1 + 0.9 * 10], [0.0], [1.0], 55.0) == pytest.approx([10.0])
    assert gae_of_column([1.0], [0.0], [1.0], 55.0) == pytest.approx([1.0])


@pytest.mark.parametrize("reset_value", [100.0, -100.0])
def test_b03_value_of_the_reset_observation_is_not_used(reset_value):
    """V(final) = 10 comes with the reward; the next row, or next_value, belongs to the next episode."""
    last = gae_of_column([1 + 0.9 * 10], [0.0], [1.0], reset_value)
    middle = gae_of_column([1 + 0.9 * 10, 0.0], [0.0, reset_value], [1.0, 1.0], 0.0)
    assert last == pytest.approx([10.0]) and middle[0] == pytest.approx(10.0)


def test_b04_td_error_takes_the_value_of_the_next_observation():
    """V(s_t) = 7 and V(s_{t+1}) = 10, once within the rollout and once after it."""
    within = gae_of_column([1.0, 0.0], [7.0, 10.0], [0.0, 1.0], 55.0, lam=0.0)
    assert within[0] == pytest.approx(1 + 0.9 * 10 - 7)
    assert gae_of_column([1.0], [7.0], [0.0], 10.0) == pytest.approx([1 + 0.9 * 10 - 7])


@pytest.mark.parametrize("length", [1, 3, 6])
def test_b05_two_episodes_in_a_row_equal_each_of_them_alone(length):
    """Nothing of a later episode reaches back over a done."""
    rewards, values, next_value = random_rollout(7, 3)
    dones = torch.zeros_like(values)
    dones[length - 1] = 1
    both, _ = compute_gae(rewards, values, dones, next_value, 0.99, 0.95)
    parts = []
    for part in (slice(0, length), slice(length, 7)):
        parts += compute_gae(rewards[part], values[part], dones[part], next_value, 0.99, 0.95)[:1]
    assert torch.allclose(both, torch.cat(parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_b06_a_truncated_episode_equals_one_that_is_still_running(length):
    """Nothing leaks over a truncation: gamma * V(final) within the reward equals V(final) as next_value."""
    rewards, values, next_value = random_rollout(7, 3)
    final_value, running = torch.randn(3, dtype=torch.float64), torch.zeros(7, 3)
    alone, _ = compute_gae(rewards[:length], values[:length], running[:length], final_value, 0.99, 0.95)
    after, _ = compute_gae(rewards[length:], values[length:], running[length:], next_value, 0.99, 0.95)
    cut = running.clone()
    cut[length - 1] = 1
    rewards[length - 1] += 0.99 * final_value
    both, _ = compute_gae(rewards, values, cut, next_value, 0.99, 0.95)
    assert torch.allclose(both, torch.cat([alone, after]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.5, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 4e-6)])
def test_b07_gae_equals_the_sum_in_the_paper_for_every_pattern_of_dones(dtype, tolerance, gamma, lam):
    """T = 7 rows, a column for each of the 2^7 patterns: episodes end in every row, first and last too."""
    dones = torch.tensor(list(itertools.product([0, 1], repeat=7))).T
    rewards, values, next_value = random_rollout(*dones.shape, dtype)
    advantages, returns = compute_gae(rewards, values, dones.to(dtype), next_value, gamma, lam)
    expected = slow_gae(rewards, values, dones, next_value, gamma, lam)
    assert advantages.dtype == returns.dtype == dtype and advantages.shape == (7, 128)
    assert torch.allclose(advantages.double(), expected, rtol=0, atol=tolerance)
    assert torch.allclose(returns.double(), expected + values.double(), rtol=0, atol=tolerance)


def test_b07_gae_with_random_dones_of_any_dtype():
    """Done flags may be bool, int or float and do not change the dtype of the result."""
    rewards, values, next_value = random_rollout(40, 3, torch.float32)
    dones = torch.rand(40, 3) < 0.2
    expected = slow_gae(rewards, values, dones, next_value, 0.97, 0.9)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64):
        advantages, _ = compute_gae(rewards, values, dones.to(dtype), next_value, 0.97, 0.9)
        assert advantages.dtype == torch.float32
        assert torch.allclose(advantages.double(), expected, rtol=0, atol=1e-5)


def test_b08_last_row_of_the_rollout():
    """The rollout ends with a termination, a truncation (V(final) = 10), or mid-episode (next_value = 4)."""
    values, gl = [0.5, 2.0], 0.9 * 0.8
    for last_reward, done, next_value, last in (
        (1.0, 1.0, 55.0, 1 - 2),
        (1 + 0.9 * 10, 1.0, 55.0, 1 + 0.9 * 10 - 2),
        (1.0, 0.0, 4.0, 1 + 0.9 * 4 - 2),
    ):
        first = 3 + 0.9 * 2 - 0.5 + gl * last
        got = gae_of_column([3.0, last_reward], values, [0.0, done], next_value)
        assert got == pytest.approx([first, last], abs=1e-12)


def test_b09_lambda_1_is_the_discounted_return_minus_the_value():
    """Ends of episodes cut the return too."""
    rewards, values, next_value = random_rollout(9, 3)
    dones = torch.zeros(9, 3)
    dones[3, 0] = dones[8, 1] = dones[0, 2] = 1  # within, in the last row, in the first
    discounted, G = torch.zeros_like(values), next_value
    for t in reversed(range(9)):
        G = discounted[t] = rewards[t] + 0.9 * G * (1 - dones[t])
    advantages, returns = compute_gae(rewards, values, dones, next_value, 0.9, 1.0)
    assert torch.allclose(advantages, discounted - values, rtol=0, atol=1e-12)
    assert torch.allclose(returns, discounted, rtol=0, atol=1e-12)


def test_b09_lambda_0_is_the_td_error():
    """Of one step each: r + gamma V(next) - V."""
    rewards, values, next_value = random_rollout(2, 1)
    advantages, _ = compute_gae(rewards, values, torch.zeros(2, 1), next_value, 0.9, 0.0)
    following = torch.stack([values[1], next_value])
    assert torch.allclose(advantages, rewards + 0.9 * following - values, rtol=0, atol=1e-12)


def test_b09_gamma_0_is_the_reward_minus_the_value():
    """Nothing to come counts."""
    rewards, values, next_value = random_rollout(9, 3)
    advantages, returns = compute_gae(rewards, values, torch.zeros(9, 3), next_value, 0.0, 0.95)
    assert torch.equal(advantages, rewards - values)
    assert torch.allclose(returns, rewards, rtol=0, atol=1e-12)


def test_gae_leaves_its_inputs_alone():
    """The buffers keep what the rollout wrote."""
    rewards, values, next_value = random_rollout(5, 2)
    inputs = rewards, values, torch.ones(5, 2), next_value
    before = [x.clone() for x in inputs]
    compute_gae(*inputs, 0.99, 0.95)
    assert all(map(torch.equal, inputs, before))
