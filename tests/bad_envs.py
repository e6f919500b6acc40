"""Environments that break in one way each: `--env-id bad_envs:Raises-v0`, or RaisesBox-v0 for Box actions."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


class Good(gym.Env):
    """Two random numbers, reward 1, episodes of 20 steps, no render_mode. Others break in their 30th step."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, box=False, number=1.0):
        self.action_space = Box(-1, 1, (1,), np.float32) if box else Discrete(2)
        self.total, self.count, self.number = 0, 0, number

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def observe(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def reward(self):
        return self.number

    def step(self, action):
        self.total, self.count = self.total + 1, self.count + 1
        if self.total == 30:
            self.break_down()
        return self.observe(), self.reward(), self.count == 20, False, {}

    def break_down(self):
        pass


class Raises(Good):
    def break_down(self):
        raise KeyError("a mistake of the environment")


class RaisesOSError(Good):
    """As an environment does that reads a file."""

    def break_down(self):
        raise OSError("a file of the environment")


class WrongShape(Good):
    def observe(self):
        return np.zeros(3 if self.total >= 30 else 2, np.float32)


class WrongType(Good):
    """Python's numbers in a list, where an array was announced."""

    def observe(self):
        return [1.0, 2.0]


class FirstStep(Good):
    def step(self, action):
        return self.observe(), 1.0, True, False, {}


class Dies(Good):
    """As a process does that is out of memory."""

    def break_down(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(Good):
    def step(self, action):
        time.sleep(0.01)
        return super().step(action)


class Constant(Good):
    def observe(self):
        return np.full(2, 1e4, np.float32)


class HalfConstant(Good):
    """One dimension moves, the other one does not."""

    def observe(self):
        return np.array([self.np_random.normal(), -3.3e7], np.float32)


class Wanted(Good):
    """Reward 1 for action 0 and nothing else: a policy may become certain of it."""

    def step(self, action):
        obs, _, terminated, truncated, infos = super().step(action)
        return obs, float(np.sum(action) < 0.5), terminated, truncated, infos


for kind in (
    Good,
    Raises,
    RaisesOSError,
    WrongShape,
    WrongType,
    FirstStep,
    Dies,
    Slow,
    Constant,
    HalfConstant,
    Wanted,
):
    for suffix, box in ("", False), ("Box", True):
        gym.register(f"{kind.__name__}{suffix}-v0", entry_point=kind, kwargs={"box": box})
