"""Reads recipes.toml and numerics.toml, for run.py, plots.py, update_docs.py and the tests."""

import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def read_recipes():
    """{recipe: {group, script, env_id, flags, seeds, patch, and perhaps published, lines, note}}."""
    recipes = {}
    for group, entries in tomllib.loads((HERE / "recipes.toml").read_text()).items():
        for name, entry in entries.items():
            assert name not in recipes, f"{name} is in two groups of recipes.toml"
            recipes[name] = {"group": group, "flags": "", "seeds": [1, 2, 3], "patch": ""} | entry
            recipes[name]["flags"] = " ".join(recipes[name]["flags"].split())
    return recipes


def read_numerics():
    """{script: {losses: of its first two iterations, commits: whose rows have these numerics}}."""
    return tomllib.loads((HERE / "numerics.toml").read_text())
