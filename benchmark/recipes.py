"""Reads recipes.toml and numerics.json, for run.py, plots.py, update_docs.py and the tests."""

import importlib
import json
import platform
import re
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
# the groups of recipes.toml that plots.py draws, and whose curves run.py keeps
DRAWN = ("classic", "mujoco-v5", "atari", "atari-10m", "strong")


def read_recipes():
    """{recipe: {group, script, env_id, flags, seeds, patch, episodes, perhaps published, lines, note}}."""
    recipes = {}
    for group, entries in tomllib.loads((HERE / "recipes.toml").read_text()).items():
        for name, entry in (spread(group, entries) if "variants" in entries else entries).items():
            assert name not in recipes, f"{name} is in two groups of recipes.toml"
            usual = {"group": group, "flags": "", "seeds": [1, 2, 3], "patch": "", "episodes": 100}
            recipes[name] = usual | entry
            recipes[name]["flags"] = " ".join(recipes[name]["flags"].split())
    return recipes


def spread(group, grid):
    """{ablation-<task>-<variant>: its entry} of each variant on each task; of a selection: select-..."""
    kind = group.split("-")[0].replace("selection", "select")
    common = {key: x for key, x in grid.items() if key not in ("tasks", "variants")}
    recipes = {}
    for task, named in grid["tasks"].items():
        env_id, _, of_task = named.partition(" ")
        for variant, own in grid["variants"].items():
            flags = f"{grid['flags']} {of_task} {own.get('flags', '')}"
            recipes[f"{kind}-{task}-{variant}"] = common | own | {"env_id": env_id, "flags": flags}
    return recipes


def patch_of(script, patch):
    """Where it is in the repository: one of the variants, or a change that only an experiment needs."""
    variant = f"variants/{patch}.patch"
    return variant if (HERE.parent / variant).exists() else f"benchmark/ablations/{script}-{patch}.patch"


def read_numerics():
    """{script: {losses: of its first two iterations, commits: whose rows have these numerics}}."""
    return json.loads((HERE / "numerics.json").read_text())


def processor():
    """Its name, for instance `AMD EPYC`."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor()


def losses_of(script):
    """What a script logs as losses in two iterations of a small run: its fingerprint, to some four digits."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module = importlib.import_module(script)
    torch.set_num_threads(1)  # more of them round otherwise
    with tempfile.TemporaryDirectory() as folder:
        # with the default minibatches and epochs V moves beyond the clip range, and in so many rows one ratio
        # that rounding moves beyond clip_coef makes no difference
        small = {"num_envs": 2, "num_steps": 128, "total_timesteps": 512}
        if script == "ppo_atari":
            small = {"num_envs": 2, "num_steps": 64, "total_timesteps": 256}
            small |= {"num_minibatches": 2, "update_epochs": 2}
        small["max_episode_steps"] = 20  # so that episodes end, at time limits too
        module.train(module.Args(run_dir=folder, device="cpu", **small))
        events = EventAccumulator(folder)
        events.Reload()
        names = sorted(name for name in events.Tags()["scalars"] if name.startswith("losses/"))
        return {name.removeprefix("losses/"): [x.value for x in events.Scalars(name)] for name in names}


def same_losses(one, other):
    return one.keys() == other.keys() and all(np.allclose(one[x], other[x], 1e-2, 5e-4) for x in one)
