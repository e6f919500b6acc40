"""Tests call the shipped functions; PPO_SCRIPTS=<folder> points them at another copy (see mutants.py)."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(os.environ.get("PPO_SCRIPTS", ROOT))
NAMES = ("ppo_discrete", "ppo_continuous", "ppo_atari")
sys.path[:0] = [
    str(SCRIPTS),
    str(Path(__file__).parent),
]  # the scripts, and stub_envs for --env-id stub_envs:Name-v0
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for the scripts that tests start as programs
torch.set_num_threads(1)


@pytest.fixture(params=NAMES)
def script(request):
    """Each of the three scripts in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=NAMES[:2])
def mlp_script(request):
    """The two scripts whose observations are vectors."""
    return importlib.import_module(request.param)


@pytest.fixture
def discrete():
    return importlib.import_module("ppo_discrete")


@pytest.fixture
def continuous():
    return importlib.import_module("ppo_continuous")


@pytest.fixture
def atari():
    return importlib.import_module("ppo_atari")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Runs write to runs/ in the current folder: make that a temporary one."""
    monkeypatch.chdir(tmp_path)
