"""The rollout of train: what its rows hold where episodes end, what is counted, which rewards and returns."""

import itertools

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import stub_envs
import torch
from conftest import REAL, normalised, same, scalars, state, statistics
from stub_envs import ids


def set_value(monkeypatch, script, final=0.0, first=0.0, other=0.0, last_step=3):
    """A critic by hand: V of final observations, of the first ones of later episodes, of all others."""

    def value(self, obs):
        step, episode, _ = ids(obs).T
        v = np.where(step == last_step, final, np.where((step == 0) & (episode > 0), first, other))
        return torch.as_tensor(v, dtype=torch.float32)

    monkeypatch.setattr(script.Agent, "get_value", value)


def rows_of(observations):
    """(step, episode, seed) of each observation, in order of size."""
    return sorted(map(tuple, ids(torch.cat(observations)).tolist()))


# --- rows, ends of episodes, bootstrapping ---


@pytest.mark.parametrize("story", ["Count", "CountTruncated"])
def test_b01_no_row_belongs_to_a_reset(script, train, watch, story):
    seen = watch(script)
    train(script, story, num_steps=9, gamma=0.0)
    gae = seen.gae[0]
    assert torch.equal(gae.dones.float(), torch.tensor([0.0, 0, 1]).repeat(3)[:, None].expand(9, 2))
    assert gae.rewards.min() > 0  # the row of a NEXT_STEP reset has reward 0
    each_step_once = [(step, episode, tag) for step in range(3) for episode in range(3) for tag in (1, 2)]
    assert rows_of(seen.updated[:2]) == each_step_once  # final observations (step 3) are no rows


@pytest.mark.parametrize(
    ("story", "limit", "reward"),
    [
        ("CountTruncated", 0, 10.0),
        ("CountEndless", 3, 10.0),
        ("Count", 0, 1.0),
        ("CountBoth", 0, 1.0),
        ("Count", 3, 1.0),
    ],
)
def test_b02_truncation_bootstraps_and_termination_does_not(
    script, train, watch, monkeypatch, story, limit, reward
):
    """1 + 0.9 * V(final) = 10 by the environment's limit or --max-episode-steps; 1 where both ends meet."""
    seen = watch(script)
    set_value(monkeypatch, script, final=10.0)
    train(script, story, gamma=0.9, num_steps=6, max_episode_steps=limit)
    gae = seen.gae[0]
    expected = torch.tensor([1, 1, reward, 1, 1, reward])[:, None].expand(6, 2)
    torch.testing.assert_close(gae.rewards.float(), expected)
    assert gae.dones.sum() == 4


def test_b02_only_the_environment_that_was_truncated_bootstraps(script, train, watch, monkeypatch):
    """Of two environments the second, whose seed is 2, goes on while the first is truncated after 3 steps."""
    seen, step = watch(script), stub_envs.Count.step

    def endless(self, action):
        *others, truncated, infos = step(self, action)
        return *others, truncated and self.tag != 2, infos

    monkeypatch.setattr(stub_envs.Count, "step", endless)
    set_value(monkeypatch, script, final=10.0)
    train(script, "CountTruncated", gamma=0.9, num_steps=4)
    gae = seen.gae[0]
    torch.testing.assert_close(gae.rewards.float(), torch.tensor([[1, 1], [1, 1], [10.0, 1], [1, 1]]))
    assert gae.dones.tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]


def test_b03_bootstraps_from_the_final_observation_not_from_the_reset_one(script, train, watch, monkeypatch):
    seen = watch(script)
    set_value(monkeypatch, script, final=10.0, first=100.0)
    train(script, "CountTruncated", gamma=0.9, num_steps=3)
    assert seen.gae[0].rewards[2].tolist() == pytest.approx([10.0, 10.0])


def test_b03_final_frames_of_a_real_game(atari, train, watch, monkeypatch):
    """A second emulator that waits for the next step with the reset still shows the final frames."""
    valued, sent = [], []
    value, step = atari.Agent.get_value, ale_py.AtariVectorEnv.step

    def spied_value(self, obs):
        valued.append(obs.clone())
        return value(self, obs)

    def spied_step(self, actions):
        sent.append(actions.copy())
        return step(self, actions)

    monkeypatch.setattr(atari.Agent, "get_value", spied_value)
    monkeypatch.setattr(ale_py.AtariVectorEnv, "step", spied_step)
    train(atari, REAL["ppo_atari"], num_steps=5, max_episode_steps=5, seed=3)
    envs = ale_py.AtariVectorEnv("breakout", 2, max_num_frames_per_episode=4 * 5)
    envs.reset(seed=3)
    for actions in sent[:5]:
        frames, *_ = step(envs, actions)
    assert torch.equal(valued[0], torch.as_tensor(frames))
    assert not torch.equal(valued[0], valued[1])  # the last one is of the new game


def test_b04_bootstraps_from_the_observation_after_the_action(script, train, watch, monkeypatch):
    seen = watch(script)
    set_value(monkeypatch, script, final=10.0, other=7.0)
    train(script, "CountTruncated", gamma=0.9, num_steps=3)
    assert seen.gae[0].rewards[2].tolist() == pytest.approx([10.0, 10.0])


@pytest.mark.parametrize(
    ("story", "steps", "last_reward", "done"),
    [("Count", 3, 1, 1), ("CountTruncated", 3, 10, 1), ("CountTruncated", 4, 1, 0)],
)
def test_b08_last_row(script, train, watch, monkeypatch, story, steps, last_reward, done):
    """A rollout that ends with a termination, with a truncation and within an episode."""
    seen = watch(script)
    set_value(monkeypatch, script, final=10.0, first=100.0, other=7.0)
    train(script, story, gamma=0.9, gae_lambda=0.8, num_steps=steps)
    gae = seen.gae[0]
    assert gae.rewards[-1].tolist() == pytest.approx([last_reward] * 2)
    assert gae.dones[-1].tolist() == [done] * 2
    assert gae.next_value.tolist() == [100.0 if done else 7.0] * 2
    advantage = last_reward + (0 if done else 0.9 * 7.0) - gae.values[-1]
    torch.testing.assert_close(gae.advantages[-1], advantage)


def test_episodes_go_on_across_iterations(script, train, watch):
    """Iterations of 4 steps cut episodes of 3 anywhere; no step is lost, repeated or reset."""
    seen = watch(script)
    train(script, "Count", 3, num_steps=4)
    steps = [ids(obs)[0].tolist() for obs in seen.acted]  # of the first environment
    assert steps == [[t % 3, t // 3, 1] for t in range(12)]


# --- what the update receives is what the rollout saw ---


@pytest.mark.parametrize("env", ["Count", "real"])
def test_b11_ratio_is_1_before_any_step(script, train, watch, env):
    """With a learning rate of 0, every row keeps the log-probability and the value of the rollout."""
    seen = watch(script)
    env = REAL[script.__name__] if env == "real" else env
    result = train(script, env, 2, learning_rate=0.0, **normalised(script))
    for call in seen.loss:
        torch.testing.assert_close(call.newlogprob, call.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(call.newvalue, call.values, rtol=1e-5, atol=1e-5)
    assert sum(len(call.logprobs) for call in seen.loss) == 2 * 2 * 16
    logged = scalars(result)
    assert max(map(abs, logged["losses/approx_kl"])) < 1e-6
    assert logged["losses/clipfrac"] == [0.0, 0.0]


def test_b20_observations_and_rewards_are_flattened_alike(script, train, watch):
    """With gamma 0 the return is the reward, and the reward of a row follows from its observation."""
    seen = watch(script)
    train(script, "Ids", 2, num_envs=3, gamma=0.0)
    assert len(seen.updated) == len(seen.loss) == 8
    for obs, call in zip(seen.updated, seen.loss, strict=True):
        step, _, tag = ids(obs).T
        assert call.returns.tolist() == pytest.approx(stub_envs.reward_of(step, tag).tolist(), abs=1e-5)


def test_b31_the_update_sees_what_the_policy_saw(script, train, watch):
    """Bit for bit, although the statistics have moved since."""
    seen = watch(script)
    train(script, REAL[script.__name__], **normalised(script))
    assert len(seen.acted) == 8
    acted, updated = torch.cat(seen.acted).flatten(1), torch.cat(seen.updated[:2]).flatten(1)
    assert sorted(map(tuple, acted.tolist())) == sorted(map(tuple, updated.tolist()))


def test_b39_environment_that_reuses_its_array(script, train, watch, monkeypatch):
    """It writes its next observation into the array that it has returned: stored ones stay as they were, and
    a final one outlives the reset."""
    seen = watch(script)
    set_value(monkeypatch, script, final=10.0)
    train(script, "InPlace", gamma=0.9, num_steps=6)
    each_step_once = [(step, episode, tag) for step in range(3) for episode in range(2) for tag in (1, 2)]
    assert rows_of(seen.updated[:2]) == each_step_once
    assert seen.gae[0].rewards[:, 0].tolist() == pytest.approx([1, 1, 10, 1, 1, 10])


def test_b39_vector_environment_that_reuses_its_array(mlp_script, train, watch, monkeypatch):
    """As gymnasium's do with copy=False, and as an edited make_envs may ask for."""
    seen, make_vec = watch(mlp_script), gym.make_vec

    def without_copies(*args, vector_kwargs, **kwargs):
        return make_vec(*args, vector_kwargs=vector_kwargs | {"copy": False}, **kwargs)

    monkeypatch.setattr(gym, "make_vec", without_copies)
    train(mlp_script, "CountEndless")
    assert rows_of(seen.updated[:2]) == [(step, 0, tag) for step in range(8) for tag in (1, 2)]


def test_b40_actions_belong_to_the_space(mlp_script, train):
    """Stubs refuse others, in training and in evaluation; most samples of the policy leave the Box."""
    result = train(mlp_script, "Count", 2)
    assert result["episodic_return"] == 3.0
    assert mlp_script.evaluate(result["run_dir"], 3).tolist() == [3.0] * 3


def test_async_processes_give_the_same_run(continuous, train):
    flags = dict(iterations=2, max_episode_steps=6, **normalised(continuous))
    a, b = (train(continuous, "Pendulum-v1", vectorization=kind, **flags) for kind in ("sync", "async"))
    assert same(state(a["agent"]), state(b["agent"]))
    assert a["episodic_return"] == b["episodic_return"]


# --- statistics of observations ---


@pytest.mark.parametrize("story", ["CountEndless", "CountTruncated"])
def test_b29_b34_statistics_count_every_row_of_all_environments_once(mlp_script, train, watch, story):
    """Rows are what was acted on: neither final observations of episodes nor the one that bootstraps."""
    seen = watch(mlp_script)
    agent = train(mlp_script, story, 3, **normalised(mlp_script))["agent"]
    counts = range(3 * 8) if story == "CountEndless" else [t % 3 + 1000 * (t // 3) for t in range(3 * 8)]
    rows = np.array([(count, tag) for count in counts for tag in (1, 2)])
    assert len(seen.acted) == 3 * 8
    saved = statistics(agent)
    assert saved["count"] == 3 * 8 * 2
    np.testing.assert_allclose(saved["mean"], rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(saved["var"], rows.var(0), rtol=1e-9)


def test_b30_final_observations_are_normalised_like_all_others(mlp_script, train, monkeypatch):
    seen, value = [], mlp_script.Agent.get_value

    def spied(self, obs):
        seen.append((obs.clone(), statistics(self)))
        return value(self, obs)

    monkeypatch.setattr(mlp_script.Agent, "get_value", spied)
    train(mlp_script, "CountTruncated", num_envs=3, num_steps=6, **normalised(mlp_script))
    raw = torch.tensor([[3.0, tag] for tag in (1, 2, 3)])  # the final observations of the first episodes
    (_, _), (final, now) = [x for x in seen if x[1]["count"] == 9]  # 3 rows each: once acted, once valued
    expected = (raw - now["mean"]) / torch.sqrt(now["var"] + 1e-8)
    torch.testing.assert_close(final, expected.float())


# --- rewards and returns ---


def test_b27_learns_from_signs_or_scaled_rewards_and_logs_raw_ones(script, train, watch):
    seen = watch(script)
    result = train(script, "Points", **normalised(script))
    rewards = set(seen.gae[0].rewards.flatten().tolist())
    assert rewards == {1.0} if script.__name__ == "ppo_atari" else not {4.0, 7.0} & rewards
    assert result["episodic_return"] == 11.0 == scalars(result)["charts/episodic_return"][0]


def test_what_a_time_limit_adds_is_never_scaled_or_clipped(script, train, watch, monkeypatch):
    """The reward of the last step is scaled or made a sign; gamma * V(final observation) is added to that."""
    seen = watch(script)
    set_value(monkeypatch, script, final=1000.0)
    flags = {} if script.__name__ == "ppo_atari" else {"norm_reward": True}
    train(script, "CountTruncated", num_steps=3, gamma=0.9, **flags)
    rewards = seen.gae[0].rewards
    assert (rewards.abs()[:2] <= 10).all()
    assert ((rewards[2] - 900).abs() <= 10).all()


def test_b28_returns_are_not_carried_over_a_truncation(script, train):
    """Episodes of 2 and 3 steps with reward 1, the first truncated, the second terminated, and so on."""
    result = train(script, "CountMixed", num_steps=10, num_envs=1)
    assert result["episodic_return"] == 2.5
    assert scalars(result)["charts/episodic_length"] == [2.5]


# --- seeds ---


def test_b36_environments_and_episodes_differ(script, train, watch):
    seen = watch(script)
    train(script, REAL[script.__name__], num_envs=4, num_steps=10, max_episode_steps=5)
    obs = torch.stack(seen.acted)  # (T, N, ...)
    first, second = obs[0], obs[5]
    assert seen.gae[0].dones[4].all()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))
