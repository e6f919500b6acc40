"""The patches of variants/: each fits its script, runs as its page says, and does what it is for."""

import importlib.util
import shutil
import subprocess
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, saved, scalars
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

VARIANTS = {
    "action-mask": "ppo_discrete",
    "lstm": "ppo_discrete",
    "dict-observations": "ppo_discrete",
    "pixels": "ppo_atari",
}


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """The module of a patched script."""
    folder, modules = tmp_path_factory.mktemp("variants"), {}

    def get(name):
        if name not in modules:
            path = folder / f"{name.replace('-', '_')}.py"
            patch = ROOT / "variants" / f"{name}.patch"
            script = SCRIPTS / f"{VARIANTS[name]}.py"
            command = ["patch", "--fuzz", "0", "-o", path, script, patch]
            if shutil.which("patch") is None:
                shutil.copy(script, folder)
                command = ["git", "apply", patch]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
            if not path.exists():
                (folder / script.name).rename(path)
            assert done.returncode == 0, done.stdout + done.stderr
            spec = importlib.util.spec_from_file_location(path.stem, path)
            modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        return modules[name]

    return get


def test_every_patch_has_its_test_and_its_page():
    names = {path.stem for path in (ROOT / "variants").glob("*.patch")}
    assert names == set(VARIANTS)
    page = (ROOT / "variants/README.md").read_text()
    assert all(f"## {name}\n" in page and f"variants/{name}.patch" in page for name in names)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_patch_is_short(name):
    """At most 60 lines added, and few taken away, but for pixels: what is of Atari goes."""
    lines = (ROOT / f"variants/{name}.patch").read_text().splitlines()
    added = [x for x in lines if x.startswith("+") and not x.startswith("+++")]
    removed = [x for x in lines if x.startswith("-") and not x.startswith("---")]
    assert len(added) <= 60 and (len(removed) <= 20 or name == "pixels")
    assert max(map(len, added)) <= 111


class Toy(gym.Env):
    """Samples of its observation space; reward 1; episodes of 5 steps, or without end (for a time limit)."""

    def __init__(self, observation_space, action_space, ends=True):
        self.observation_space, self.action_space, self.ends = observation_space, action_space, ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), self.infos()

    def step(self, action):
        self.check(action)
        self.count += 1
        end = self.ends and self.count == 5
        return self.observation_space.sample(), 1.0, end, False, self.infos()

    def infos(self):
        return {}

    def check(self, action):
        assert self.action_space.contains(action)


VECTOR = Box(-3, 3, (4,), np.float32)
SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}


def train(script, monkeypatch, run_dir, entry_point, *, iterations=2, **flags):
    """A run of the toy in run_dir; kwargs: of the toy."""
    kwargs = flags.pop("kwargs")
    spec = gym.envs.registration.EnvSpec("Toy-v0", entry_point=entry_point, kwargs=kwargs)
    monkeypatch.setitem(gym.registry, "Toy-v0", spec)
    flags = SMALL | {"device": "cpu", "run_dir": str(run_dir), "env_id": "Toy-v0"} | flags
    steps = iterations * flags["num_envs"] * flags["num_steps"]
    return script.train(script.Args(total_timesteps=steps, **flags))


def goes_on_and_is_evaluated(script, result, returns=5.0):
    """After training: --resume, --evaluate with samples and with best actions."""
    args = script.load_checkpoint(result["run_dir"])["args"]
    args.resume, args.total_timesteps = str(result["run_dir"]), 2 * args.total_timesteps
    assert script.train(args)["global_step"] == 2 * result["global_step"]
    for deterministic in (False, True):
        assert script.evaluate(result["run_dir"], 2, deterministic).tolist() == [returns] * 2
    assert all(torch.isfinite(x).all() for x in saved(result["run_dir"] / "checkpoint.pt")["agent"].values())


# --- action-mask ---


class Masked(Toy):
    """Which actions may be taken changes from step to step; others are an error."""

    def infos(self):
        sizes = getattr(self.action_space, "nvec", None)
        sizes = [self.action_space.n] if sizes is None else sizes
        masks = [self.np_random.integers(0, 2, size) for size in sizes]
        for mask in masks:
            mask[self.np_random.integers(len(mask))] = 1
        self.masks = masks
        return self.given(np.concatenate(masks).astype(np.int8))

    def given(self, mask):
        return {"action_mask": mask}

    def check(self, action):
        assert all(mask[x] == 1 for mask, x in zip(self.masks, np.ravel(action), strict=True)), "invalid"


class MaskedByMethod(Masked):
    def given(self, mask):
        self.mask = mask
        return {}

    def action_masks(self):
        return self.mask


@pytest.mark.parametrize("kind", [Masked, MaskedByMethod])
@pytest.mark.parametrize("actions", [Discrete(5), MultiDiscrete([2, 4, 3])], ids=str)
@pytest.mark.parametrize("norm_obs", [True, False])
def test_a_masked_action_is_never_taken(variant, monkeypatch, tmp_path, kind, actions, norm_obs):
    script = variant("action-mask")
    kwargs = {"observation_space": VECTOR, "action_space": actions}
    result = train(script, monkeypatch, tmp_path / "run", kind, kwargs=kwargs, norm_obs=norm_obs)
    assert result["episodic_return"] == 5.0, "the environment raises at an invalid action"
    goes_on_and_is_evaluated(script, result)


def test_masked_environments_are_made_without_a_reset(variant, monkeypatch):
    """It would begin an episode, and the film of the first one would end there."""
    script, resets = variant("action-mask"), []
    monkeypatch.setattr(Masked, "reset", lambda self, **kwargs: resets.append(self))
    spec = {"entry_point": Masked, "kwargs": {"observation_space": VECTOR, "action_space": Discrete(5)}}
    monkeypatch.setitem(gym.registry, "Toy-v0", gym.envs.registration.EnvSpec("Toy-v0", **spec))
    with closing(script.make_envs(script.Args(env_id="Toy-v0"), 1)) as envs:
        assert envs.single_observation_space.shape == (9,) and not resets


@pytest.mark.parametrize("nvec", [(4,), (2, 4)])
def test_the_probability_of_a_masked_action_is_0(variant, nvec):
    """And of the others it is what a softmax over them alone gives; so is the entropy."""
    script = variant("action-mask")
    space = Discrete(4) if len(nvec) == 1 else MultiDiscrete(nvec)
    agent = script.Agent(Box(-9, 9, (3 + sum(nvec),)), space, script.Args())
    mask = torch.tensor([1.0, 0, 1, 1] if len(nvec) == 1 else [0.0, 1, 1, 0, 1, 1]).expand(500, -1)
    obs = torch.cat([torch.randn(500, 3), mask], dim=1)
    with torch.no_grad():
        action, logprob, entropy, _ = agent.get_action_and_value(obs)
        logits = agent.actor(obs[:, :3])
    last = action if len(nvec) == 1 else action[:, 1]
    assert set(last.tolist()) == {0, 2, 3}
    if len(nvec) == 2:
        assert (action[:, 0] == 1).all()
        logits = logits.unflatten(1, (2, 4))[:, 1]  # the first branch is certain, and adds nothing
        mask = mask[:, 2:]
    allowed = torch.distributions.Categorical(logits=logits[:, [0, 2, 3]])
    index = torch.tensor([0, -1, 1, 2])[last]
    assert torch.allclose(logprob, allowed.log_prob(index), atol=1e-5)
    assert torch.allclose(entropy, allowed.entropy(), atol=1e-5)


# --- lstm ---


@pytest.mark.parametrize("ends", [True, False])
def test_the_update_sees_the_states_of_the_rollout(variant, monkeypatch, tmp_path, ends):
    """With one step per iteration, ratios are 1: each state was made again, across resets and iterations."""
    script = variant("lstm")
    kwargs = {"observation_space": VECTOR, "action_space": Discrete(3), "ends": ends}
    one_step = {"num_minibatches": 1, "update_epochs": 1, "learning_rate": 0.1, "max_episode_steps": 7}
    result = train(script, monkeypatch, tmp_path / "run", Toy, iterations=4, kwargs=kwargs, **one_step)
    for name in ("losses/approx_kl", "losses/clipfrac"):
        assert max(abs(x) for x in scalars(result)[name]) < 1e-6


def test_an_episode_begins_with_an_empty_memory(variant):
    """What came before the start of an episode makes no difference to it; what came after, does."""
    script = variant("lstm")
    agent = script.Agent(VECTOR, Discrete(3), script.Args())
    obs, empty = torch.randn(6, 2, 4), [torch.zeros(2, agent.size)] * 2
    starts = torch.zeros(6, 2)
    starts[3, 0] = 1  # in the first environment only
    features, _ = agent.recall(obs, empty, starts)
    fresh, _ = agent.recall(obs[3:], empty, torch.zeros(3, 2))
    assert torch.allclose(features[3:, 0], fresh[:, 0])
    assert not torch.allclose(features[3:, 1], fresh[:, 1])


def test_the_value_at_a_time_limit_remembers_the_episode(variant, monkeypatch, tmp_path):
    """Where a state counts the steps of its episode and V is that count, V of what is cut off is one more."""
    script, seen = variant("lstm"), []

    def recall(self, obs, state, starts):
        h, count = state
        counts = []
        for start in starts:
            count = count * (1 - start).unsqueeze(-1) + 1
            counts.append(count)
        return torch.stack(counts), (h, count)

    def compute_gae(*args):
        seen.extend(args)
        raise InterruptedError

    monkeypatch.setattr(script.Agent, "recall", recall)
    monkeypatch.setattr(script.Agent, "get_value", lambda self, features: features[:, 0])
    monkeypatch.setattr(script, "compute_gae", compute_gae)
    kwargs = {"observation_space": VECTOR, "action_space": Discrete(2), "ends": False}
    flags = {"max_episode_steps": 5, "norm_reward": False, "gamma": 0.5}
    with pytest.raises(InterruptedError):
        train(script, monkeypatch, tmp_path / "run", Toy, kwargs=kwargs, **flags)
    rewards, values, dones, next_value = seen[:4]
    assert values[:, 0].tolist() == [1, 2, 3, 4, 5] * 3 + [1]
    assert dones[:, 0].tolist() == [0, 0, 0, 0, 1] * 3 + [0]
    assert rewards[:, 0].tolist() == [1, 1, 1, 1, 1 + 0.5 * 6] * 3 + [1]
    assert next_value.tolist() == [2.0] * 4


def test_lstm_resumes_and_is_evaluated(variant, monkeypatch, tmp_path):
    script = variant("lstm")
    kwargs = {"observation_space": VECTOR, "action_space": Discrete(3)}
    result = train(script, monkeypatch, tmp_path / "run", Toy, kwargs=kwargs)
    assert {x.split(".")[0] for x in result["agent"].state_dict()} >= {"lstm", "actor", "critic"}
    goes_on_and_is_evaluated(script, result)


def test_lstm_wants_whole_environments(variant):
    script = variant("lstm")
    with pytest.raises(script.UsageError, match="divide --num-envs"):
        script.prepare(script.Args(num_envs=4, num_minibatches=8))


@pytest.mark.parametrize("flag", [{"objective": "kl-penalty"}, {"compile": True}, {"hidden_sizes": ()}])
def test_lstm_refuses_what_it_cannot_do(variant, flag):
    script = variant("lstm")
    with pytest.raises(script.UsageError, match=r"^the LSTM needs --objective clip"):
        script.prepare(script.Args(**flag))


# --- dict-observations, pixels ---


def test_a_picture_beside_a_vector(variant, monkeypatch, tmp_path):
    """The picture reaches the convolutions as it was, channels first; the rest goes past them."""
    script = variant("dict-observations")
    picture = Box(0, 255, (7, 7, 3), np.uint8)
    both = Dict({"direction": Discrete(4), "image": picture})
    kwargs = {"observation_space": both, "action_space": Discrete(3)}
    result = train(script, monkeypatch, tmp_path / "run", Toy, kwargs=kwargs)
    goes_on_and_is_evaluated(script, result)
    encoder = script.Encoder(4 + 7 * 7 * 3)
    image = np.arange(7 * 7 * 3, dtype=np.uint8).reshape(7, 7, 3)
    obs = torch.tensor(gym.spaces.flatten(both, {"direction": 2, "image": image}))
    seen = []
    encoder.convolutions.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = encoder(obs.float().unsqueeze(0))
    assert features[0, :4].tolist() == [0, 0, 1, 0] and features.shape == (1, encoder.num_features)
    assert np.allclose(seen[0][0].numpy(), image.transpose(2, 0, 1))


def test_another_picture_or_another_place_is_refused(variant, monkeypatch, tmp_path):
    script = variant("dict-observations")
    larger = Dict({"image": Box(0, 255, (9, 9, 3), np.uint8)})
    first = Dict({"image": Box(0, 255, (7, 7, 3), np.uint8), "state": Discrete(4)})  # keys are sorted
    for space, words in ((larger, "change PICTURE"), (first, "not the last entry")):
        kwargs = {"observation_space": space, "action_space": Discrete(3)}
        with pytest.raises(script.UsageError, match=words):
            train(script, monkeypatch, tmp_path / "run", Toy, kwargs=kwargs)


@pytest.mark.parametrize("shape", [(96, 96, 3), (40, 60, 1)])
def test_pictures_of_any_environment(variant, monkeypatch, tmp_path, shape):
    script = variant("pixels")
    kwargs = {"observation_space": Box(0, 255, shape, np.uint8), "action_space": Discrete(3)}
    small = {"num_envs": 2, "num_steps": 8}
    result = train(script, monkeypatch, tmp_path / "run", Toy, kwargs=kwargs, **small)
    goes_on_and_is_evaluated(script, result)
    assert result["agent"].shapes[0] == (4, shape[2], *shape[:2])


def test_pixels_refuses_what_is_no_picture(variant):
    script = variant("pixels")
    for env_id in ("CartPole-v1", "NoSuch-v0"):
        with pytest.raises(script.UsageError, match=f"--env-id {env_id}: "):
            script.make_envs(script.Args(env_id=env_id), 1)


@pytest.mark.parametrize("space", [Box(0, 255, (3, 48, 40), np.uint8), Box(0, 1, (48, 40, 3), np.float32)])
def test_pixels_refuses_pictures_that_it_would_misread(variant, monkeypatch, tmp_path, space):
    """Channels first, of which it would take the width for them, and numbers from 0 to 1."""
    script = variant("pixels")
    kwargs = {"observation_space": space, "action_space": Discrete(3)}
    with pytest.raises(script.UsageError, match="not one picture of uint8"):
        train(script, monkeypatch, tmp_path / "run", Toy, kwargs=kwargs)
