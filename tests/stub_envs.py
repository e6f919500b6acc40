"""Environments whose every number a test can predict: `--env-id stub_envs:Count-v0`; games for ppo_atari.

STORIES are told by gymnasium environments, with Discrete(3) actions (Count-v0) or Box ones (CountBox-v0), and
by FakeAtari, which stands in for ale_py.AtariVectorEnv. All of them refuse an action outside their space.
"""

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import ale_py
import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.vector import AutoresetMode


def reward_of(step, tag):
    """-1, 0 or 1, different in the next step and in the next environment."""
    return (step + tag) % 3 - 1


# ends: the length of each episode and how it ends, over and over; none: no episode ever ends.
# reward: of (step, tag), the step before the action and the seed of the environment. lives: after each step.
# in_place: observations are written into the same array each time.
THREE = [(3, "terminated")]
STORIES = {
    "Count": {"ends": THREE},
    "CountTruncated": {"ends": [(3, "truncated")]},
    "CountBoth": {"ends": [(3, "terminated truncated")]},
    "CountMixed": {"ends": [(2, "truncated"), (3, "terminated")]},
    "CountEndless": {"ends": []},
    "CountMinus": {"ends": [(3, "truncated")], "reward": lambda step, tag: -1},
    "CountScale": {"ends": [], "reward": lambda step, tag: 10**tag},
    "InPlace": {"ends": [(3, "truncated")], "in_place": True},
    "Ids": {"ends": [], "reward": reward_of},
    "Points": {"ends": [(2, "terminated")], "reward": lambda step, tag: (4, 7)[step]},
    "Lives": {
        "ends": [(6, "terminated")],
        "reward": lambda step, tag: (5, 0, 2, 0, 4, 0)[step],
        "lives": (3, 2, 2, 1, 1, 3),
    },
}


class Stub(gym.Env):
    """Constant observation (1, -2), a reward that depends on the action alone, no end, no inner state."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = Box(-math.inf, math.inf, (2,), np.float32)

    def __init__(self, box=False, render_mode=None, space=None):
        self.action_space = space or (Box(-0.3, 0.3, (2,), np.float32) if box else Discrete(3))
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.tag = seed
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        return self.observe(), 1.0 - float(np.sum(np.square(action))), False, False, {}

    def observe(self):
        return np.array([1, -2], np.float32)


class Count(Stub):
    """Observes (step of the episode + 1000 * number of the episode, seed that it was first reset with)."""

    def __init__(self, ends, reward=lambda step, tag: 1, lives=(), in_place=False, **kwargs):
        super().__init__(**kwargs)
        self.ends, self.reward, self.episode = ends, reward, -1
        self.array = np.zeros(2, np.float32) if in_place else None

    def reset(self, *, seed=None, options=None):
        self.count, self.episode = 0, self.episode + 1
        return super().reset(seed=seed)

    def step(self, action):
        super().step(action)
        reward = self.reward(self.count, self.tag)
        self.count += 1
        length, how = self.ends[self.episode % len(self.ends)] if self.ends else (math.inf, "")
        over = self.count >= length
        return self.observe(), float(reward), over and "term" in how, over and "trunc" in how, {}

    def observe(self):
        array = np.zeros(2, np.float32) if self.array is None else self.array
        array[:] = self.count + 1000 * self.episode, self.tag
        return array


class OddInfos(Count):
    """Reports in infos what nobody can stack, merge or trust: ragged arrays, an int or None, "episode"."""

    def odd(self):
        return {
            "ragged": np.zeros(self.count % 2 + 1 + self.tag % 2),
            "sometimes": None if (self.count + self.tag) % 2 else self.count,
            "episode": {"r": 1000.0, "l": -1},
            "final_obs": "?",
        }

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, self.odd()

    def step(self, action):
        *results, _ = super().step(action)
        return *results, self.odd()


class Dies(Count):
    """That with an odd seed does, in its second step, as a process that is out of memory."""

    def step(self, action):
        if self.count == 1 and self.tag % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Closes(Count):
    """Leaves a file when it is closed, so that a test sees it, in whatever process."""

    def close(self):
        if hasattr(self, "tag"):  # gymnasium makes one more, only to look at its spaces
            Path(f"closed-{self.tag}").touch()


class Nan(Count):
    """From step 12 on, over all episodes, rewards or observations are not finite, and any action will do."""

    def __init__(self, what, bad=math.nan, **kwargs):
        super().__init__(THREE, **kwargs)
        self.what, self.bad, self.total = what, bad, 0

    def step(self, action):
        self.total += 1
        obs, reward, *ends = super().step(action if self.total <= 12 else self.action_space.sample())
        if self.total >= 12 and self.what == "reward":
            reward = self.bad
        if self.total >= 12 and self.what == "observation":
            obs = obs * np.float32(self.bad)
        return obs, reward, *ends


class Probe(Stub):
    """Tasks that need one more part of the algorithm each; episodes of one step, two for the delay."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        self.count, self.sign = 0, 1
        super().reset(seed=seed)
        self.sign = self.np_random.choice([-1, 1])
        return self.observe(), {}

    def step(self, action):
        super().step(action)
        self.count += 1
        box = isinstance(self.action_space, Box)
        good = 1 - 10 * np.sum((action - 0.1) ** 2) if box else action == 2
        reward = {"constant": 1, "obs": self.sign, "delay": self.count - 1, "action": good}[self.kind]
        return self.observe(), float(reward), self.kind != "delay" or self.count == 2, False, {}

    def observe(self):
        value = {"constant": 0, "obs": self.sign, "delay": self.count % 2, "action": 0}[self.kind]
        return np.array([value], np.float32)


class Branches(Stub):
    """Pays for each of the three actions that is right; episodes of one step."""

    def step(self, action):
        obs, *_ = super().step(action)
        return obs, float(np.mean(action == [2, 0, 3])), True, False, {}


class ShortLong(Stub):
    """Episodes of 1 or of 20 steps at random, reward 100 per step."""

    def reset(self, *, seed=None, options=None):
        obs, infos = super().reset(seed=seed)
        self.left = self.np_random.choice([1, 20])
        return obs, infos

    def step(self, action):
        obs, *_ = super().step(action)
        self.left -= 1
        return obs, 100.0, self.left == 0, False, {}


class Nudge(Stub):
    """Pays the action itself, so that returns show what was acted; 5 steps per episode."""

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return super().reset(seed=seed)

    def step(self, action):
        obs, *_ = super().step(action)
        self.count += 1
        return obs, float(np.sum(action)), self.count == 5, False, {}


class FakeAtari(gym.vector.VectorEnv):
    """AtariVectorEnv with a story in place of a game; three pixels of a frame say step, episode and seed.

    story None: black frames, a reward that depends on the action alone, no end, no inner state.
    """

    story = None

    def __init__(self, game, num_envs, *, autoreset_mode=AutoresetMode.NEXT_STEP, **options):
        assert autoreset_mode == AutoresetMode.SAME_STEP, "the only mode that this stub plays"
        wrong = options["episodic_life"] or options["life_loss_info"] or options["reward_clipping"]
        assert not wrong, "each of them hides something from the script"
        self.num_envs, self.autoreset_mode = num_envs, autoreset_mode
        self.metadata = {"autoreset_mode": autoreset_mode}
        self.limit = options["max_num_frames_per_episode"] // options["frameskip"]
        buttons = [ale_py.Action.NOOP, ale_py.Action.FIRE, ale_py.Action.RIGHT]
        self.ale = SimpleNamespace(get_action_set=lambda: buttons)
        self.single_action_space = Discrete(len(buttons))
        self.single_observation_space = Box(0, 255, (4, 84, 84), np.uint8)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.frames = np.zeros((num_envs, 4, 84, 84), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.games = [Count(**self.story) for _ in range(self.num_envs)] if self.story else []
        for i, game in enumerate(self.games):
            game.reset(seed=seed + i)
        self.lives = np.full(self.num_envs, 3, np.int32)
        return self.observe(), self.infos()

    def step(self, actions):
        assert self.action_space.contains(actions), f"{actions!r} is not in {self.action_space}"
        rewards, ends = actions.astype(np.int32) - 1, np.zeros((2, self.num_envs), bool)
        for i, (game, action) in enumerate(zip(self.games, actions, strict=bool(self.games))):
            _, rewards[i], *ends[:, i], _ = game.step(int(action))
            self.lives[i] = self.story.get("lives", [3] * 1000)[game.count - 1]
            ends[1, i] |= game.count >= self.limit
        done, final_obs = ends[0] | ends[1], np.full_like(self.frames, 255)
        final_obs[done] = self.observe().copy()[done]
        for i in np.flatnonzero(done):
            self.games[i].reset()
        infos = self.infos() | ({"final_obs": final_obs} if done.any() else {})
        return self.observe(), rewards, *ends, infos

    def observe(self):
        in_place = self.story and self.story.get("in_place")
        frames = self.frames if in_place else np.zeros_like(self.frames)
        for i, game in enumerate(self.games):
            frames[i, :, 0, :3] = game.count, game.episode, game.tag % 256
        return frames

    def infos(self):
        return {"env_id": np.arange(self.num_envs), "lives": self.lives.copy()}


def ids(obs):
    """Step, episode and seed of each observation of a story that a network received: (N, 3) integers."""
    if obs.ndim == 4:
        return obs[:, -1, 0, :3].numpy().astype(int)
    count, tag = obs.numpy().T
    return np.stack([count % 1000, count // 1000, tag], -1).astype(int)


STUBS = {"Stateless": (Stub, {})}
STUBS |= {name: (Count, story) for name, story in STORIES.items()}
STUBS |= {"OddInfos": (OddInfos, {"ends": THREE}), "Dies": (Dies, {"ends": THREE})}
STUBS |= {"Closes": (Closes, {"ends": THREE})}
STUBS |= {
    f"{name}{what.title()}": (Nan, {"what": what, "bad": bad})
    for what in ("reward", "observation")
    for name, bad in (("Nan", math.nan), ("Inf", math.inf))
}
STUBS |= {f"{kind.title()}Probe": (Probe, {"kind": kind}) for kind in ("constant", "obs", "delay", "action")}
for name, (stub, kwargs) in STUBS.items():
    for suffix, box in ("", False), ("Box", True):
        gym.register(f"{name}{suffix}-v0", entry_point=stub, kwargs=kwargs | {"box": box})
gym.register("Branches-v0", entry_point=Branches, kwargs={"space": MultiDiscrete([3, 1, 4])})
gym.register("ShortLong-v0", entry_point=ShortLong)
gym.register("NudgeBox-v0", entry_point=Nudge, kwargs={"space": Box(-0.1, 0.1, (2,), np.float32)})
