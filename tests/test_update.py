"""The update of train: minibatches, optimiser steps, learning rate, target KL, beta, compiling, logs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, normalised, resume, same, saved, scalars, state
from stub_envs import ids

# --- minibatches and epochs ---


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 4)])
def test_minibatches_and_epochs_are_as_many_as_the_flags_say(script, train, watch, epochs, minibatches):
    """Equal parts, one optimiser step each; the rollout's rows are those of 2 iterations."""
    seen = watch(script)
    result = train(script, "Ids", 2, update_epochs=epochs, num_minibatches=minibatches)
    assert [len(call.returns) for call in seen.loss] == [16 // minibatches] * (2 * epochs * minibatches)
    assert len(seen.steps) == len(seen.loss)
    assert scalars(result)["charts/updates"] == [epochs * minibatches] * 2


def test_b16_advantages_are_normalised_per_minibatch_and_returns_never(script, train, watch):
    seen, loss = watch(script), script.ppo_loss
    train(script, "Ids", 2)
    everything = torch.cat([call.returns for call in seen.loss[:2]]).sort().values
    torch.testing.assert_close(everything, seen.gae[0].returns.flatten().sort().values, rtol=0, atol=0)
    calls = list(seen.loss)
    for call in calls:
        difference = call.advantages + call.values - call.returns
        assert difference.abs().max() < 1e-5  # not yet normalised by whoever calls
        logprob = call.logprobs.clone().requires_grad_()
        old = call.logprobs, call.advantages, call.returns, call.values
        total, _ = loss(logprob, call.entropy, call.newvalue, *old, call.args)
        (grad,) = torch.autograd.grad(total, logprob)
        weights = -grad * len(grad)  # at ratio 1 the normalised advantages themselves
        assert weights.mean().abs() < 1e-5
        assert weights.std().item() == pytest.approx(1, abs=1e-3)
    assert len(calls) == 8


def test_b17_minibatches_of_one_row_need_advantages_that_are_not_normalised(script, train):
    """The std of one number is nan: refused before anything is written."""
    with pytest.raises(script.UsageError, match=r"--num-minibatches 16 .*--no-norm-adv"):
        train(script, "Ids", num_minibatches=16, run_dir="x")
    assert not Path("x").exists()
    agent = train(script, "Ids", num_minibatches=16, norm_adv=False)["agent"]
    assert all(x.isfinite().all() for x in agent.parameters())


def test_b18_epochs_reuse_the_same_targets(script, train, watch):
    seen = watch(script)
    train(script, "Ids", update_epochs=3, learning_rate=0.01)
    epochs = []
    for calls in zip(seen.loss[::2], seen.loss[1::2], strict=True):
        names = ("logprobs", "advantages", "returns", "values")
        assert not any(getattr(call, name).requires_grad for call in calls for name in names)
        rows = torch.stack([torch.cat([getattr(call, name) for call in calls]) for name in names], 1)
        epochs.append(sorted(map(tuple, rows.tolist())))
    assert len(epochs) == 3
    assert epochs[0] == epochs[1] == epochs[2]


def test_b19_every_epoch_visits_every_row_once_in_a_new_order(script, train, watch):
    seen = watch(script)
    train(script, "Ids", update_epochs=3)
    pairs = zip(seen.updated[::2], seen.updated[1::2], strict=True)
    epochs = [list(map(tuple, ids(torch.cat(pair)))) for pair in pairs]
    assert all(sorted(epoch) == [(step, 0, tag) for step in range(8) for tag in (1, 2)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(epoch[:8]) for epoch in epochs}) == 3  # other minibatches, too


def test_all_that_belongs_to_a_row_stays_with_it(script, train, watch):
    """A row of a minibatch has the value, advantage, return and log-probability of its observation."""
    seen = watch(script)
    train(script, "Ids", num_minibatches=4, update_epochs=3, learning_rate=0.01)
    gae = seen.gae[0]
    first = zip(seen.updated[:4], seen.loss[:4], strict=True)  # one epoch shows all log-probabilities
    logprobs = {}
    for obs, call in first:
        logprobs |= zip(rows(obs), call.logprobs.tolist(), strict=True)
    assert len(logprobs) == 16
    assert len(set(logprobs.values())) > 1
    for obs, call in zip(seen.updated, seen.loss, strict=True):
        for i, (step, _, tag) in enumerate(rows(obs)):
            where = step, tag - 1
            assert call.values[i] == gae.values[where]
            assert call.advantages[i] == gae.advantages[where]
            assert call.returns[i] == gae.returns[where]
            assert call.logprobs[i].item() == logprobs[step, 0, tag]


def rows(obs):
    return list(map(tuple, ids(obs).tolist()))


# --- learning rate, gradients, optimiser ---


def test_b21_learning_rate_falls_to_one_step_above_zero(script, train, watch):
    seen = watch(script)
    result = train(script, "Ids", 4, learning_rate=0.4)
    rates = [step.lr for step in seen.steps]
    assert len(rates) == 16
    assert rates[::4] == pytest.approx([0.4, 0.3, 0.2, 0.1]) == rates[3::4]
    assert scalars(result)["charts/learning_rate"] == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("stop", [True, False])
def test_b21_learning_rate_follows_a_longer_schedule_on_resume(script, train, watch, stop):
    """--total-timesteps has grown from 4 to 8 iterations, after the first one or after all four."""
    one_step = {"num_minibatches": 1, "update_epochs": 1}
    half = train(script, "Ids", 4, stop_requested=lambda: stop, learning_rate=0.8, **one_step)
    done = 1 if stop else 4
    assert half["global_step"] == 16 * done
    seen = watch(script)
    resumed = resume(script, half, total_timesteps=8 * 16)
    rates = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [step.lr for step in seen.steps] == pytest.approx(rates[done:])
    assert scalars(resumed)["charts/learning_rate"][done:] == pytest.approx(rates[done:])


def test_no_anneal_lr(script, train, watch):
    seen = watch(script)
    train(script, "Ids", 2, learning_rate=0.4, anneal_lr=False)
    assert {step.lr for step in seen.steps} == {0.4}


@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_b22_clips_the_norm_of_the_whole_gradient(script, train, watch, limit):
    """0 switches it off; the logged norm is the one before clipping."""
    seen = watch(script)
    result = train(script, "Ids", max_grad_norm=limit, learning_rate=1e-6)
    norms = [torch.stack([g.norm() for g in step.grads]).norm().item() for step in seen.steps]
    logged = scalars(result)["losses/grad_norm"][0]
    assert len(norms) == 4
    assert logged > 0.02
    if limit:
        assert norms == pytest.approx([limit] * 4, rel=1e-3)
    else:
        assert np.mean(norms) == pytest.approx(logged, rel=1e-5)


def test_b22_gradients_do_not_add_up(script, train, watch):
    """One minibatch per epoch and a learning rate of 0: each epoch has the gradient of the first."""
    seen = watch(script)
    train(script, "Ids", num_minibatches=1, update_epochs=3, learning_rate=0.0, max_grad_norm=0.0)
    first, *others = [step.grads for step in seen.steps]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-5)
    assert len(others) == 2
    assert max(g.abs().max() for g in first) > 1e-3


def check_adam(monkeypatch):
    """Compare each step with the paper's, element by element, epsilon 1e-5; returns the list of steps."""
    steps, moments = [], {}

    class Watched(torch.optim.Adam):
        def step(self):
            (group,) = self.param_groups
            before = [x.detach().double() for x in group["params"]]
            super().step()
            t = len(steps) + 1
            for number, (x, y) in enumerate(zip(before, group["params"], strict=True)):
                m, v, grad = *moments.get(number, (0.0, 0.0)), y.grad.double()
                m, v = moments[number] = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
                step = group["lr"] * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
                expected = x - step
                assert torch.allclose(y.detach().double(), expected, rtol=1e-6, atol=1e-7), tuple(x.shape)
            steps.append(t)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    return steps


def test_b22_each_step_is_that_of_adams_paper(script, train, monkeypatch):
    """The fused kernel ignores strides, and gradients of filters may have their own."""
    steps = check_adam(monkeypatch)
    train(script, REAL[script.__name__], 2, num_threads=1)
    assert len(steps) == 8


# --- target KL ---


def test_b23_target_kl_stops_before_the_step_that_would_go_too_far(script, train, watch):
    """The first step is huge: the second minibatch sees its KL and ends the whole update."""
    seen = watch(script)
    result = train(script, "Ids", 1, learning_rate=0.1, target_kl=1e-3, update_epochs=3)
    assert seen.loss[1].stats["approx_kl"] > 1e-3
    assert (len(seen.loss), len(seen.steps)) == (2, 1)
    params = list(result["agent"].parameters())
    assert all(torch.equal(a, b) for a, b in zip(params, seen.steps[0].params, strict=True))
    logged = scalars(result)
    assert logged["charts/updates"] == [1]
    assert abs(logged["losses/approx_kl"][0]) < 1e-6  # of the minibatch that was used


def test_b23_target_kl_ends_one_update_and_not_the_run(script, train, watch, monkeypatch):
    """The next iteration starts afresh; an update whose second epoch goes too far keeps the steps before."""
    seen = watch(script)
    real, kls = script.ppo_loss, iter([0.0, 0.0, 0.5, *[0.0] * 4])

    def scripted(*args, **kwargs):
        loss, stats = real(*args, **kwargs)
        return loss, stats | {"approx_kl": torch.tensor(next(kls))}

    monkeypatch.setattr(script, "ppo_loss", scripted)
    result = train(script, "Ids", 2, target_kl=0.1)
    assert scalars(result)["charts/updates"] == [2, 4]
    assert len(seen.steps) == 6
    assert len(seen.loss) == 7  # the one that was too far off, and no more in its epoch


# --- the KL penalty: PPO paper, section 4 ---

PENALTY = {
    "objective": "kl-penalty",
    "kl_penalty_coef": 0.5,
    "kl_penalty_target": 0.02,
    "learning_rate": 2e-3,
}


def test_beta_doubles_and_halves_between_updates_and_is_constant_inside_one(
    script, train, watch, monkeypatch
):
    """Above 1.5 and below 1 / 1.5 times the target. The whole batch shows the KL of a log-ratio of 0.2."""
    seen, adapt, kl = watch(script), script.adapt_kl_coef, math.expm1(0.2) - 0.2
    coming = iter([3.0, 1.51, 1.49, 0.68, 0.66, 1.0])  # times the target

    def scripted(kl_coef, agent, batch, target):
        assert target == PENALTY["kl_penalty_target"]
        with torch.no_grad():
            _, now, _, _ = agent.get_action_and_value(batch["obs"], batch["actions"])
        return adapt(kl_coef, agent, batch | {"logprobs": now - 0.2}, kl / next(coming))

    monkeypatch.setattr(script, "adapt_kl_coef", scripted)
    logged = scalars(train(script, "Ids", 6, **PENALTY))
    betas = [0.5, 1.0, 2.0, 2.0, 2.0, 1.0]
    assert logged["charts/kl_coef"] == betas
    assert logged["charts/kl"] == pytest.approx([kl] * 6, rel=1e-3)
    assert [float(call.kl_coef) for call in seen.loss] == list(np.repeat(betas, 4))  # of all minibatches


def test_beta_follows_the_kl_of_the_whole_batch_after_the_update(script, train, monkeypatch):
    acted, get = [], script.Agent.get_action_and_value

    def spy(self, obs, action=None, *others):
        output = get(self, obs, action, *others)
        if action is None:
            acted.append((obs.clone(), output[0].clone(), output[1].detach()))
        return output

    monkeypatch.setattr(script.Agent, "get_action_and_value", spy)
    result = train(script, "Ids", **PENALTY)
    assert len(acted) == 8
    obs, actions, old = (torch.cat(x) for x in zip(*acted, strict=True))
    with torch.no_grad():
        logratio = get(result["agent"], obs, actions)[1] - old
    expected = (logratio.double().expm1() - logratio.double()).mean().item()
    assert expected > 1e-6
    assert scalars(result)["charts/kl"] == pytest.approx([expected], rel=1e-3, abs=1e-7)


def test_beta_goes_on_from_where_it_was_or_from_what_is_typed(script, train):
    half = train(script, "Ids", 2, **PENALTY | {"kl_penalty_target": 1e3})
    resume(script, half, total_timesteps=48)
    resume(script, half, total_timesteps=64, kl_penalty_coef=3.0)
    assert scalars(half)["charts/kl_coef"] == [0.5, 0.25, 0.125, 3.0]


@pytest.mark.parametrize(("target", "limit"), [(0.0, 1e6), (1e3, 1e-6)])
def test_beta_stays_where_it_can_come_back_from(mlp_script, train, monkeypatch, target, limit):
    monkeypatch.delitem(mlp_script.RANGES, "kl_penalty_target")  # each KL is beyond a target of 0
    flags = PENALTY | {"kl_penalty_target": target, "kl_penalty_coef": limit}
    assert scalars(train(mlp_script, "Ids", 3, **flags))["charts/kl_coef"] == pytest.approx([limit] * 3)


# --- what is logged and returned ---


def test_losses_are_means_over_all_minibatches(script, train, watch):
    seen = watch(script)
    logged = scalars(train(script, "Ids", 2, learning_rate=0.01))
    names = {"pg_loss": "policy_loss", "v_loss": "value_loss"}
    assert len(seen.loss) == 8
    for key in ("pg_loss", "v_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac"):
        values = [[call.stats[key].item() for call in calls] for calls in (seen.loss[:4], seen.loss[4:])]
        expected = pytest.approx(np.mean(values, 1), rel=1e-4, abs=1e-6)
        assert logged[f"losses/{names.get(key, key)}"] == expected, key
    assert logged["losses/value_loss"][0] != pytest.approx(seen.loss[3].stats["v_loss"].item(), rel=1e-4)


@pytest.mark.parametrize(("factor", "expected"), [(1, 1.0), (3, 5 / 9), (-1, -3.0), (0, None)])
def test_b41_explained_variance(script, train, monkeypatch, factor, expected):
    """Of returns that are a multiple of the values; constant ones leave nothing to explain."""
    real = script.compute_gae
    monkeypatch.setattr(script, "compute_gae", lambda *args: (real(*args)[0], factor * args[1]))
    result = train(script, "Ids", 1, num_minibatches=1, update_epochs=1)
    logged = scalars(result).get("losses/explained_variance", [None])
    assert logged == [expected if expected is None else pytest.approx(expected, abs=1e-4)]


def test_total_timesteps_is_rounded_down_to_whole_iterations(script, train, watch, capsys):
    seen = watch(script)
    result = train(script, "Count", total_timesteps=47)
    assert result["global_step"] == 32
    assert len(seen.gae) == 2
    assert "32" in capsys.readouterr().out
    assert saved(result["run_dir"] / "checkpoint.pt")["global_step"] == 32


def test_episodic_return_is_nan_if_no_episode_ended(script, train):
    result = train(script, "CountEndless")
    assert math.isnan(result["episodic_return"])
    assert "charts/episodic_return" not in scalars(result)


# --- compiling ---


# one objective each: the loss and what is compiled around it are the same in both scripts
COMPILED = {"ppo_discrete": "kl-penalty", "ppo_continuous": "clip"}


@pytest.fixture
def compiling(mlp_script, train):
    """compiling(stub, iterations, **flags): a run of many updates; they share shapes, hence compiled code."""

    def start(stub, iterations, **flags):
        flags = {"objective": COMPILED[mlp_script.__name__], "update_epochs": 8} | flags
        return train(mlp_script, stub, iterations, **normalised(mlp_script) | flags)

    return start


@pytest.mark.slow
def test_compiled_run_is_the_eager_one(compiling, monkeypatch):
    """48 updates: every layer has learned, and the same; each step of the compiled run is Adam's."""
    start = compiling("Ids", 1, learning_rate=0.0)["agent"]
    eager = compiling("Ids", 3)
    steps = check_adam(monkeypatch)
    compiled = compiling("Ids", 3, compile=True)
    assert len(steps) == 48
    for key, a in eager["agent"].named_parameters():
        b, c = compiled["agent"].get_parameter(key), start.get_parameter(key)
        assert (a - c).norm() > 0, key
        assert (a - b).norm() < 0.02 * (a - c).norm(), key  # Adam enlarges rounding errors
    for key, a in eager["agent"].named_buffers():
        assert torch.allclose(a, compiled["agent"].get_buffer(key), rtol=1e-6), key


@pytest.mark.slow
def test_compiled_run_goes_on_from_an_eager_one_and_from_itself(mlp_script, compiling):
    """With annealing and target_kl; the checkpoint is that of an eager run. No scaled rewards: their
    discounted returns begin anew on resume."""
    flags = {"learning_rate": 3e-3, "target_kl": 0.005, "norm_reward": False}
    whole = compiling("Stateless", 6, **flags)
    half = compiling("Stateless", 6, stop_requested=lambda: True, **flags)
    middle = resume(mlp_script, half, stop_requested=lambda: True, compile=True)
    resumed = resume(mlp_script, half)  # compiled, as the checkpoint says now
    assert [x["global_step"] for x in (half, middle, resumed)] == [16, 32, 96]
    assert 6 < sum(scalars(whole)["charts/updates"]) < 96  # target_kl stopped some
    for a, b in zip(whole["agent"].parameters(), resumed["agent"].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), (a - b).abs().max()
    logged = scalars(resumed)
    for name, numbers in scalars(whole).items():
        if "SPS" not in name:
            assert logged[name] == pytest.approx(numbers, rel=1e-2, abs=1e-4, nan_ok=True), name
    loaded = mlp_script.load_agent(resumed["run_dir"])
    assert type(resumed["agent"]) is mlp_script.Agent
    assert same(state(loaded), state(resumed["agent"]))


def test_a_run_compiles_on_request_only(mlp_script, train, monkeypatch):
    """And all of it that is worth it: what acts, and what makes the gradient."""
    compiled = []

    def fake(function, **options):
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    train(mlp_script, "Stateless", 1)
    assert not compiled
    train(mlp_script, "Stateless", 1, compile=True)
    assert compiled == ["act", "compute_gradients"]
