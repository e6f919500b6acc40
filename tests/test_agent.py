"""The networks: weights at the start, outputs, how actions are drawn; what normalises observations."""

import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import nn

pytestmark = pytest.mark.usefixtures("seeded")


def make_agent(script, num_actions=4, obs_dim=5, **flags):
    """A fresh agent for vectors of obs_dim numbers, or frames. num_actions: also the length of a Box action,
    or a list, of the branches of MultiDiscrete."""
    if script.__name__ == "ppo_continuous":
        action_space = Box(-1, 1, (num_actions,))
    elif isinstance(num_actions, list):
        action_space = MultiDiscrete(num_actions)
    else:
        action_space = Discrete(num_actions)
    frames = script.__name__ == "ppo_atari"
    obs_space = Box(0, 255, (4, 84, 84), np.uint8) if frames else Box(-math.inf, math.inf, (obs_dim,))
    return script.Agent(obs_space, action_space, script.Args(**flags))


def make_obs(script, rows=6):
    """Observations as the buffer stores them."""
    if script.__name__ == "ppo_atari":
        return torch.randint(0, 256, (rows, 4, 84, 84), dtype=torch.uint8)
    return torch.randn(rows, 5)


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


def test_b24_fresh_policy_is_almost_uniform(categorical_script):
    """Its entropy is log n."""
    agent = make_agent(categorical_script, 6)
    *_, entropy, _ = agent.get_action_and_value(make_obs(categorical_script))
    assert torch.allclose(entropy, torch.full((6,), math.log(6)), rtol=0, atol=1e-3)


def test_b24_fresh_policy_is_normal_around_0(continuous):
    """Means near 0, and the entropy of a standard deviation of exp(-0.5), the default."""
    agent = make_agent(continuous)
    mean, _, entropy, _ = agent.get_action_and_value(make_obs(continuous), deterministic=True)
    assert mean.abs().max() < 0.05
    of_each = 0.5 * math.log(2 * math.pi * math.e * math.exp(-0.5) ** 2)
    assert torch.allclose(entropy, torch.full((6,), 4 * of_each))


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
    """The gradient of V reaches everything but the head of the policy."""
    agent = make_agent(atari)
    agent.get_value(make_obs(atari, 2)).sum().backward()
    without = {name for name, x in agent.named_parameters() if x.grad is None}
    assert without == {"actor.weight", "actor.bias"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_b25_pixels_reach_the_cnn_divided_by_255_once(atari, precision):
    """And the buffer keeps them as uint8, unchanged."""
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


@pytest.mark.parametrize("rows", [1, 6])
def test_agent_shapes_and_dtypes(script, rows):
    """The contract: action, log-probability, entropy and value, a row of each for each observation. V depends
    on what is observed, and get_value gives the same."""
    agent, obs = make_agent(script), make_obs(script, rows)
    action, logprob, entropy, value = agent.get_action_and_value(obs)
    if script.__name__ == "ppo_continuous":
        assert action.shape == (rows, 4) and action.dtype == torch.float32
    else:
        assert action.shape == (rows,) and action.dtype == torch.int64
    for x in (logprob, entropy, value, agent.get_value(obs)):
        assert x.shape == (rows,) and x.dtype == torch.float32
    assert torch.allclose(agent.get_value(obs), value, rtol=1e-5)
    assert len(set(value.tolist())) == rows


def test_agent_scores_a_given_action_and_does_not_sample_it_again(script):
    """The update asks for the actions of the rollout."""
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
    """Of all actions, each scored by itself."""
    agent = make_agent(categorical_script)
    layers(policy_net(agent))[-1].weight.data *= 100
    obs = make_obs(categorical_script, 20)
    action, logprob, *_ = agent.get_action_and_value(obs, deterministic=True)
    best, index = all_logprobs(agent, obs).max(dim=1)
    assert torch.equal(action, index) and torch.allclose(logprob, best, rtol=1e-5)
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


def test_agent_samples_a_normal_around_the_mean(continuous):
    """Mean, standard deviation and independence of 20,000 draws."""
    agent = make_agent(continuous, 3)
    means, stds = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 1.0, 3.0])
    set_policy(agent, means.tolist())
    agent.actor_logstd.data = stds.log()
    with torch.no_grad():
        z = (agent.get_action_and_value(torch.randn(20_000, 5))[0] - means) / stds
    assert z.mean(0).abs().max() < 0.04 and (z.std(0) - 1).abs().max() < 0.03
    assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 0.04


def test_b12_log_probability_is_summed_over_the_action(continuous):
    """-1/2 sum ((a - mu) / sigma)^2 - sum log sigma - 1.5 log 2 pi."""
    agent = make_agent(continuous, 3)
    mu, logstd = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-0.5, 0.3, 1.0])
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


def test_act_counts_the_observation_and_returns_what_the_buffers_keep(script):
    """(obs as the networks took it, action, log-probability, value), statistics moved once."""
    flags = {} if script.__name__ == "ppo_atari" else {"norm_obs": True}
    agent, raw = make_agent(script, **flags), make_obs(script)
    if flags:
        agent.normalize(raw + 1, update=True)
    torch.manual_seed(1)
    obs, action, logprob, value = agent.act(raw + 2)
    torch.manual_seed(1)
    expected_action, expected_logprob, _, expected_value = agent.get_action_and_value(obs)
    assert torch.equal(obs, agent.normalize(raw + 2)) and torch.equal(action, expected_action)
    assert torch.equal(logprob, expected_logprob) and torch.equal(value, expected_value)
    if flags:
        assert agent.obs_count == 12
        torch.testing.assert_close(agent.obs_mean, (raw + 1.5).double().mean(0))


@pytest.mark.parametrize("sizes", [(), (2, 9, 4)])
def test_hidden_sizes_are_the_widths_of_actor_and_critic(mlp_script, sizes):
    """Also without any hidden layer."""
    agent = make_agent(mlp_script, hidden_sizes=sizes)
    for net, outputs in (policy_net(agent), 4), (agent.critic, 1):
        widths = [5, *sizes, outputs]
        expected = list(itertools.pairwise(widths))
        assert [(x.in_features, x.out_features) for x in layers(net)] == expected


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "gelu"])
def test_activation_follows_every_hidden_layer_and_no_output(mlp_script, activation):
    """Outputs equal a forward pass written out: also of the actor's log-probabilities and means."""
    agent = randomize(make_agent(mlp_script, hidden_sizes=(7, 3), activation=activation))
    obs = torch.randn(6, 5)
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
    weight, bias = (x.view(len(BRANCHES), max(BRANCHES), -1) for x in agent.actor[-1].parameters())
    features = agent.actor[:-1](obs)
    rows = [(w[:n], b[:n, 0]) for w, b, n in zip(weight, bias, BRANCHES, strict=True)]
    return [(features @ w.T + b).log_softmax(-1) for w, b in rows]


def test_b12_log_probability_is_summed_over_the_branches(discrete):
    """And the entropy (B13); the best action is the best of each branch."""
    agent, obs = make_agent(discrete, BRANCHES), 3 * torch.randn(50, 5)
    nn.init.normal_(agent.actor[-1].weight)
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
    """20,000 draws of each branch."""
    agent = make_agent(discrete, BRANCHES)
    nn.init.normal_(agent.actor[-1].weight)
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
    assert entropy.mean().item() == pytest.approx(math.log(2 * 3 * 4 * 1), rel=0.01)  # almost uniform


def test_no_gradient_moves_what_a_branch_lacks(discrete):
    """Surplus outputs keep their weights and their bias, and no gradient is nan."""
    agent, obs = make_agent(discrete, BRANCHES), torch.randn(50, 5)
    action, *_ = agent.get_action_and_value(obs)
    _, logprob, entropy, _ = agent.get_action_and_value(obs, action)
    (logprob.mean() + entropy.mean()).backward()
    lacking = torch.arange(4) >= torch.tensor(BRANCHES)[:, None]  # (3, 4)
    for x in agent.actor[-1].parameters():
        norms = x.grad.view(3, 4, -1).norm(dim=-1)
        assert norms.isfinite().all() and (norms[lacking] == 0).all() and (norms[~lacking][:3] > 0).all()


# --- standard deviation ---


@pytest.mark.parametrize("learn_std", [True, False])
def test_learn_std_decides_whether_gradients_move_it(continuous, learn_std):
    """It is saved with the agent either way; -1 as somebody writes it in Python becomes a float."""
    agent, obs = make_agent(continuous, init_log_std=-1, learn_std=learn_std), torch.randn(6, 5)
    _, logprob, entropy, _ = agent.get_action_and_value(obs)
    (logprob + entropy).sum().backward()
    assert (agent.actor_logstd.grad is not None) == learn_std
    assert agent.state_dict()["actor_logstd"].tolist() == [-1.0] * 4


# --- running statistics ---


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("sizes", [(1, 7, 50, 2), (16, 16, 16), (200, 1, 1, 1)])
def test_b32_running_mean_var_equals_numpy(discrete, kind, shape, sizes):
    """After every batch, for data far from 0 and with a drift; of arrays and of tensors."""
    generator, rows, statistics = np.random.default_rng(0), [], (0.0, 1.0, 0.0)
    for i, size in enumerate(sizes):
        rows.append(generator.normal(100.0 * (i + 1), i + 1.0, (size, *shape)))
        statistics = discrete.running_mean_var(*statistics, kind(rows[-1]))
        seen = np.concatenate(rows)
        assert statistics[2] == len(seen) and np.shape(statistics[0]) == np.shape(statistics[1]) == shape
        np.testing.assert_allclose(statistics[0], seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics[1], seen.var(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constant", [-7000.3, 54321.9, 1e8 / 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_b32_variance_of_a_large_constant_is_never_negative(discrete, constant, size):
    """Means of 3 or 7 equal numbers are off by a rounding error, of which no square root may be taken."""
    statistics = (np.zeros(1), np.ones(1), 0.0)
    for _ in range(500):
        statistics = discrete.running_mean_var(*statistics, np.full((size, 1), constant))
        assert 0 <= statistics[1] <= (1e-15 * constant) ** 2 * 100
        assert statistics[0] == pytest.approx(constant, rel=1e-14)


def test_b32_statistics_of_the_agent_equal_numpy(discrete):
    """Of all rows that it was told to count, in float64 although the observations are in float32."""
    agent, rows = make_agent(discrete, obs_dim=3, norm_obs=True), []
    for i, size in enumerate((1, 7, 50, 2)):
        batch = torch.randn(size, 3) * (i + 1) + 100 * (i + 1)
        rows.append(batch.double().numpy())
        agent.normalize(batch, update=True)
        seen = np.concatenate(rows)
        assert agent.obs_count == len(seen) and agent.obs_mean.shape == agent.obs_var.shape == (3,)
        np.testing.assert_allclose(agent.obs_mean.numpy(), seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(agent.obs_var.numpy(), seen.var(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_obs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16])
def test_normalize_takes_every_dtype(discrete, dtype, norm_obs):
    """Differences of booleans or of unsigned integers are none: numbers first."""
    agent, raw = make_agent(discrete, norm_obs=norm_obs), torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 1, 0]])
    obs = agent.normalize(raw.to(dtype), update=True)
    expected = [[0, 1, -1, 0, 1], [0, -1, 1, 0, -1]] if norm_obs else raw.tolist()
    assert obs.dtype == torch.float32
    torch.testing.assert_close(obs, torch.tensor(expected).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_subtracts_the_mean_divides_by_the_std_and_clips_at_10(discrete, dtype):
    """The statistics of 30 rows, then rows of up to 1000 standard deviations."""
    agent, seen = make_agent(discrete, norm_obs=True), 3 * torch.randn(30, 5, dtype=torch.float64) + 7
    normalized = agent.normalize(seen, update=True)
    mean, std = seen.mean(0), seen.std(0, correction=0)
    assert torch.allclose(normalized.double(), (seen - mean) / std, rtol=0, atol=1e-5)
    z = torch.tensor([[-11.0, -9.9, 0.0, 9.9, 1000.0]])
    normalized = agent.normalize((mean + std * z).to(dtype))
    assert normalized.dtype == torch.float32
    assert torch.allclose(normalized, torch.tensor([[-10, -9.9, 0.0, 9.9, 10.0]]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("constant", [1.0, 100000.1])
def test_normalize_survives_a_constant_observation(discrete, constant):
    """A std of 0 gives 0, and what differs from it is clipped."""
    agent, raw = make_agent(discrete, norm_obs=True), torch.full((3, 5), constant)
    for _ in range(300):
        assert agent.normalize(raw, update=True).abs().max() < 1e-3
    assert agent.normalize(torch.zeros(4, 5)).tolist() == [[-10.0] * 5] * 4


def test_normalize_moves_the_statistics_only_where_told(discrete):
    """Not by default, not by a network's pass; update=True does."""
    agent, obs = make_agent(discrete, norm_obs=True), torch.randn(6, 5) + 3
    agent.normalize(obs, update=True)
    before = {key: x.clone() for key, x in agent.named_buffers()}
    for _ in range(3):
        agent.get_action_and_value(agent.normalize(100 * obs))
        agent.get_value(agent.normalize(100 * obs, update=False))
    assert before and all(torch.equal(x, before[key]) for key, x in agent.named_buffers())
    agent.normalize(100 * obs, update=True)
    assert agent.obs_count == 12 and not torch.equal(agent.obs_mean, before["obs_mean"])
