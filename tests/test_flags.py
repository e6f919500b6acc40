"""Any combination of flags trains two iterations, or is refused in one line that names a flag: no traceback.

LONG=1 python -m pytest tests/test_flags.py tries 300 combinations per script instead of 40.
"""

import dataclasses
import importlib
import math
import os
import re
import tempfile
from typing import get_args

import pytest
from conftest import NAMES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TRIES = 300 if os.environ.get("LONG") else 40
TUNED = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
ENVS = {
    "ppo_discrete": ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "Nothing-v0", "stub_envs:ActionProbe-v0"],
    "ppo_continuous": ["Pendulum-v1", "CartPole-v1", "", "stub_envs:CountBox-v0"],
    "ppo_atari": ["BreakoutNoFrameskip-v4", "PongNoFrameskip-v4", "ALE/Breakout-v5", "Breakout-v4", "pong"],
}
# what is drawn for a field instead of anything of its type; sizes are small, and now and then impossible
SIZES = {
    "num_envs": [1, 2, 3, 0],
    "num_steps": [1, 4, 8, 16],
    "num_minibatches": [1, 2, 4, 5],
    "update_epochs": [1, 2],
    "total_timesteps": [0, 1, 64, 128],
    "hidden_sizes": [(), (1,), (8, 8), (0,), (4, -1)],
    "max_episode_steps": [0, 1, 3, 20],
    "num_threads": [0, 1, 2],
    "save_every": [0, 1, 2, 3],
    "seed": [0, 1, 10**9, 10**12, -1],
    "exp_name": ["x", "a/b", ""],
    "resume": ["", "nowhere"],
    "vectorization": ["sync", "sync", "sync", "async"],
    "device": ["auto", "cpu", "cpu", "cuda"],
    "track": [False],
    "compile": [False],  # 10 s a try
    "capture_video": [False],
}
NUMBERS = [0.0, 1.0, 0.5, 1e-3, 1e-30, 3.0, 1e30, -1.0, math.inf, math.nan]


def choices(name, field):
    if field.name == "env_id":
        return ENVS[name]
    if field.name in SIZES:
        return SIZES[field.name]
    if get_args(field.type):
        return get_args(field.type)  # tyro refuses others
    if isinstance(field.default, bool):
        return [True, False]
    if isinstance(field.default, float):
        return NUMBERS
    return [field.default]


def arguments(name):
    """Up to six fields that differ from a small run that works: with all of them drawn, none would train."""
    fields = dataclasses.fields(importlib.import_module(name).Args)
    small = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "total_timesteps": 32}
    small |= {"env_id": ENVS[name][0], "device": "cpu", "num_threads": 1}
    values = {field.name: st.sampled_from(choices(name, field)) for field in fields}
    some = st.lists(st.sampled_from(list(values)), max_size=6, unique=True)
    drawn = some.flatmap(lambda names: st.fixed_dictionaries({x: values[x] for x in names}))
    return drawn.map(lambda changes: small | changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_flags_train_or_are_refused_in_one_line(name):
    script = importlib.import_module(name)
    trained = refused = 0

    @settings(TUNED, max_examples=TRIES)
    @given(arguments(name))
    def check(changes):
        nonlocal trained, refused
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = script.train(script.Args(**changes | {"run_dir": f"{folder}/run"}))
            except (script.UsageError, FloatingPointError) as error:
                assert re.search("--|^nowhere", str(error)) and "\n" not in str(error)
                refused += 1
            else:
                assert result["global_step"] > 0
                trained += 1

    check()
    assert trained > TRIES / 10 and refused > TRIES / 10
    print(f"{name}: {trained} trained, {refused} refused")
