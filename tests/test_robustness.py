"""What may go wrong around a training: kills, workers that die, odd numbers, memory.

LONG=1 python -m pytest tests/test_robustness.py runs more and longer; docs/contributing.md has the results.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL, SCRIPTS, TINY, resume, same, saved, scalars

LONG = bool(os.environ.get("LONG"))


def test_a_kill_while_saving_leaves_a_checkpoint_that_opens_and_resumes(script, train):
    """Processes that save all the time, killed while they write: the file is never half of one."""
    result = train(script, "Count")
    path = result["run_dir"] / "checkpoint.pt"
    checkpoint = script.load_checkpoint(path)
    args, agent = checkpoint["args"], checkpoint["trained"]
    optimizer = torch.optim.Adam(script.load_agent(path).requires_grad_(True).parameters())
    optimizer.load_state_dict(saved(path)["optimizer"])
    envs = SimpleNamespace(reward_stats=(0.0, 1.0, 0.0))
    random_times, halves = random.Random(0), 0
    temporary = path.with_suffix(".tmp")
    for _ in range(50 if LONG else 8):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    script.save_checkpoint(args, 16, agent, optimizer, envs)
            finally:
                os._exit(1)
        until = time.time() + 20
        while not temporary.exists() and time.time() < until:
            pass
        time.sleep(random_times.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        halves += temporary.exists()
        temporary.unlink(missing_ok=True)  # the next run writes over it
        assert same(script.load_agent(path).state_dict(), agent.state_dict())
    assert halves > 0, "no kill met a file that was being written"
    assert resume(script, result, total_timesteps=2 * result["global_step"])["global_step"] == 32


@pytest.mark.parametrize("seed", [1, 2])
def test_a_worker_that_dies_ends_the_run(seed):
    """At once, although the other one still waits for its next step, or has given its result before."""
    argv = ["--env-id", "stub_envs:Dies-v0", *TINY, "--run-dir", "run", "--vectorization", "async"]
    argv += ["--seed", str(seed)]
    program = [sys.executable, SCRIPTS / "ppo_discrete.py", *argv]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "EOFError" in done.stderr, done.stderr
    assert not Path("run/checkpoint.pt").exists()


def test_a_policy_that_is_certain_stays_finite(discrete, train):
    """Entropy 0: 0 * log 0 appears in it, and ratios of actions that have probability 0."""
    flags = {"learning_rate": 0.1, "ent_coef": 0.0, "max_grad_norm": 0.0, "anneal_lr": False}
    logged = scalars(train(discrete, "ActionProbe", iterations=40, **flags))
    assert np.isfinite(logged["losses/policy_loss"]).all()
    assert min(logged["losses/entropy"]) < 1e-3


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000  # MB


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(script):
    """For three seconds; with LONG=1 for an hour (30 minutes of Atari), to within 2 %."""
    minutes = (30 if script.__name__ == "ppo_atari" else 60) if LONG else 0.05
    samples, start_time = [], time.time()

    def stop():
        samples.append((time.time() - start_time, resident(), len(os.listdir("/proc/self/fd"))))
        return samples[-1][0] > 60 * minutes

    small = {"num_envs": 2, "num_steps": 64} if script.__name__ == "ppo_atari" else {}
    env_id = REAL[script.__name__]
    script.train(script.Args(env_id=env_id, total_timesteps=10**9, num_threads=1, **small), stop)
    warm = [x for x in samples if x[0] > 0.1 * samples[-1][0]]
    first, last = warm[0], warm[-1]
    ends = [f"{megabytes:.1f} MB and {files} files" for _, megabytes, files in (first, last)]
    print(f"{script.__name__}: {' after a tenth, '.join(ends)} after {len(samples)} iterations")
    assert last[2] <= first[2] and last[1] <= first[1] * (1.02 if LONG else 1.05)
