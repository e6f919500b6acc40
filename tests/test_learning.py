"""B43, whether it learns at all: probe environments, CartPole, HalfCheetah."""

import math

import pytest
import torch
from conftest import normalised, resume, scalars

# --- probe environments: each needs one more part of the algorithm ---

PROBE = {"num_envs": 8, "num_steps": 16, "num_minibatches": 4, "update_epochs": 8, "learning_rate": 5e-3}
PROBE |= {"gamma": 0.5}


@pytest.mark.parametrize(
    ("kind", "obs", "value"),
    [("Constant", [0], [1]), ("Obs", [-1, 1], [-1, 1]), ("Delay", [0, 1], [0.5, 1])],
)
def test_b43_values_of_probe_environments(mlp_script, kind, obs, value, train):
    """A constant reward; one that the observation tells; one that comes a step later, worth gamma before."""
    agent = train(mlp_script, f"{kind}Probe", 25, **PROBE)["agent"]
    with torch.no_grad():
        values = agent.get_value(agent.normalize(torch.tensor(obs, dtype=torch.float32)[:, None]))
    assert values.tolist() == pytest.approx(value, abs=0.1)


@pytest.mark.parametrize("objective", ["clip", pytest.param("kl-penalty", marks=pytest.mark.slow)])
def test_b43_probe_environment_with_a_best_action(mlp_script, train, objective):
    """Action 2, or 0.1 in both components of a Box."""
    iterations = 40 if objective == "clip" else 80
    agent = train(mlp_script, "ActionProbe", iterations, objective=objective, **PROBE)["agent"]
    action, *_ = agent.get_action_and_value(torch.zeros(1, 1), deterministic=True)
    if mlp_script.__name__ == "ppo_discrete":
        assert action.item() == 2
    else:
        assert action[0].tolist() == pytest.approx([0.1, 0.1], abs=0.05)


def test_b43_best_actions_of_several_branches(discrete, train):
    """MultiDiscrete, through training, a checkpoint, resuming and evaluation."""
    result = train(discrete, "stub_envs:Branches-v0", 40, eval_episodes=0, **PROBE)
    assert result["agent"].shapes[1] == [3, 1, 4]
    assert result["episodic_return"] > 0.9
    assert discrete.evaluate(result["run_dir"], 3, deterministic=True).tolist() == [1.0] * 3
    more = resume(discrete, result, total_timesteps=42 * 128)
    assert more["global_step"] == 42 * 128
    assert more["episodic_return"] > 0.9


@pytest.mark.parametrize("learn_std", [True, False])
def test_a_fixed_standard_deviation_stays_fixed(continuous, train, learn_std):
    flags = {"init_log_std": -0.5, "learn_std": learn_std, "learning_rate": 0.01}
    result = train(continuous, "ActionProbe", 3, **flags)
    for agent in result["agent"], continuous.load_agent(result["run_dir"]):
        assert ((agent.actor_logstd == -0.5).all().item()) != learn_std
    logged = scalars(result)["charts/action_std"][-1]
    assert logged == pytest.approx(math.exp(-0.5), abs=0.2 if learn_std else 1e-6)


# --- tasks ---


@pytest.mark.slow
def test_b43_halfcheetah_stops_falling_over_with_the_kl_penalty(continuous, train):
    """A fresh policy returns about -300; the returns after a million steps are in the README."""
    flags = {"num_envs": 8, "num_steps": 128, "num_minibatches": 16, "update_epochs": 10}
    flags |= {"learning_rate": 1e-3, "objective": "kl-penalty", "kl_penalty_target": 0.02}
    result = train(continuous, "HalfCheetah-v5", 64, **normalised(continuous) | flags)
    assert continuous.evaluate(result["run_dir"], 5).mean() > -150


@pytest.mark.slow
def test_b43_cartpole_is_solved_within_100k_steps(discrete, train):
    """With these flags seeds 1, 2 and 3 all end at 500."""
    flags = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 10, "ent_coef": 0.0}
    flags |= {"learning_rate": 2e-3, "gamma": 0.98, "clip_vloss": False}
    result = train(discrete, "CartPole-v1", total_timesteps=100_000, **flags)
    assert result["episodic_return"] > 400  # of the last 100 episodes of the training
    assert discrete.evaluate(result["run_dir"], 20).mean() >= 475
