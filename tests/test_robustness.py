"""What may go wrong around a training: kills, disks, environments, compilers, damaged files, odd numbers.

LONG=1 python -m pytest tests/test_robustness.py runs more and longer; docs/contributing.md has the results.
"""

import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bad_envs
import numpy as np
import pytest
import torch
from conftest import REAL, SCRIPTS, copied, resume, same, saved, scalars, state

LONG = bool(os.environ.get("LONG"))
FAST = ["--num-envs", "2", "--num-steps", "32", "--num-minibatches", "2", "--update-epochs", "1"]
FAST += ["--eval-episodes", "0", "--run-dir", "run"]
UNBUFFERED = {"PYTHONUNBUFFERED": "1"}


def bad_id(script, name):
    return f"bad_envs:{name}{'Box' if script.__name__ == 'ppo_continuous' else ''}-v0"


def start(name, *argv, launcher=None, **kwargs):
    """The script as a program in a process group of its own, as a terminal starts it."""
    command = [sys.executable, *(launcher or [SCRIPTS / f"{name}.py"]), *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes, **kwargs)


def wait_for(condition, process, seconds=180):
    until = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < until, "it takes too long"
        time.sleep(0.02)


# --- kills ---


def test_a_kill_while_saving_leaves_a_checkpoint_that_opens_and_resumes(script, train):
    """Processes that save all the time, killed while they write: the file is never half of one."""
    result = train(script, "Stateless" if script.__name__ != "ppo_atari" else "Count")
    path = result["run_dir"] / "checkpoint.pt"
    checkpoint = script.load_checkpoint(path)
    args, agent = checkpoint["args"], checkpoint["trained"]
    optimizer = torch.optim.Adam(script.load_agent(path).requires_grad_(True).parameters())
    optimizer.load_state_dict(saved(path)["optimizer"])
    envs = SimpleNamespace(reward_stats=(0.0, 1.0, 0.0))
    before, random_times, halves = saved(path), random.Random(0), 0
    temporary = path.with_suffix(".tmp")
    for _ in range(50 if LONG else 8):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    script.save_checkpoint(args, 16, agent, optimizer, envs, None)
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
        assert same(saved(path)["agent"], before["agent"])
        assert same(script.load_agent(path).state_dict(), agent.state_dict())
    assert halves > 0, "no kill met a file that was being written"
    assert resume(script, result, total_timesteps=2 * result["global_step"])["global_step"] == 32


# --- environments ---


@pytest.mark.parametrize("name", ["WrongType", "FirstStep"])
def test_odd_environments_train(mlp_script, train, name):
    """Lists for arrays, and episodes of one step."""
    result = train(mlp_script, bad_id(mlp_script, name), iterations=3)
    assert result["global_step"] == 48


# --- worker processes ---


def test_a_worker_that_dies_ends_the_run(mlp_script):
    """At once, although the others still wait for their next step."""
    argv = ["--env-id", bad_id(mlp_script, "Dies"), *FAST, "--vectorization", "async"]
    process = start(mlp_script.__name__, *argv)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1 and "EOFError" in err


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_ctrl_c_reaches_main_alone(discrete, method):
    """Workers leave it to main, which saves; forkserver is the default from Python 3.14 on."""
    code = f"import multiprocessing as m, runpy, sys; m.set_start_method({method!r}); "
    code += f"runpy.run_path({str(SCRIPTS / 'ppo_discrete.py')!r}, run_name='__main__')"
    argv = ["--env-id", "bad_envs:Slow-v0", *FAST, "--vectorization", "async", "--save-every", 1]
    process = start("", *argv, launcher=["-c", code])
    wait_for(Path("run/checkpoint.pt").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 130 and "stopped by signal 2" in out and "Traceback" not in err
    assert saved("run/checkpoint.pt")["global_step"] >= 64


def test_the_process_that_trains_keeps_its_signals_and_numbers(mlp_script, train):
    """Only workers are set up as workers."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    np.random.seed(7)
    expected = np.random.random()
    np.random.seed(7)
    mlp_script.make_envs(mlp_script.Args(env_id=bad_id(mlp_script, "Good")), 2).close()
    assert np.random.random() == expected
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


# --- damaged and foreign files ---


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(script, checkpoints, part):
    path = copied(checkpoints[script.__name__])
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(script.UsageError, match="damaged"):
        script.load_checkpoint(path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_code_of_a_file_is_executed(script, kind):
    if kind == "pickle":
        Path("checkpoint.pt").write_bytes(pickle.dumps(Malicious()))
    else:
        torch.save({"args": Malicious()}, "checkpoint.pt")
    with pytest.raises(script.UsageError, match="damaged"):
        script.load_checkpoint("checkpoint.pt")
    assert not Path("executed").exists()


# --- numbers ---


@pytest.mark.parametrize("name", ["Constant", "HalfConstant"])
def test_observations_that_never_change_stay_finite(mlp_script, train, name):
    """Their variance is 0: what is divided by is not."""
    result = train(mlp_script, bad_id(mlp_script, name), iterations=20, norm_obs=True, norm_reward=True)
    assert all(x.isfinite().all() for x in state(result["agent"]).values())
    assert np.isfinite(scalars(result)["losses/value_loss"]).all()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_rewards_of_any_size_train_or_are_named(mlp_script, train, size, norm, monkeypatch):
    """Scaled ones train. A squared error of 1e60 is none that float32 holds: the run stops and says so."""
    monkeypatch.setattr(bad_envs.Good, "reward", lambda self: size)
    flags = {"iterations": 5, "norm_reward": norm}
    if size > 1 and not norm:
        with pytest.raises(FloatingPointError, match="v_loss"):
            train(mlp_script, bad_id(mlp_script, "Good"), **flags)
    else:
        result = train(mlp_script, bad_id(mlp_script, "Good"), **flags)
        assert np.isfinite(scalars(result)["losses/value_loss"]).all()


def test_a_policy_that_is_certain_stays_finite(categorical_script, train):
    """Entropy 0: 0 * log 0 appears in it, and ratios of actions that have probability 0."""
    env = "Count" if categorical_script.__name__ == "ppo_atari" else "bad_envs:Wanted-v0"
    flags = {"learning_rate": 0.1, "ent_coef": 0.0, "max_grad_norm": 0.0, "anneal_lr": False}
    result = train(categorical_script, env, iterations=40, **flags)
    assert np.isfinite(scalars(result)["losses/policy_loss"]).all()
    assert min(scalars(result)["losses/entropy"]) < 1e-3


def test_a_schedule_of_a_billion_steps(script, train):
    """The learning rate falls by a hair, and stays above 0."""
    result = train(script, "Count", total_timesteps=10**9, stop_requested=lambda: True)
    (rate,) = scalars(result)["charts/learning_rate"]
    assert 0 < rate < 1.0001 * script.Args.learning_rate


# --- what stays the same ---


@pytest.mark.parametrize("flags", [{"save_every": 1}, {"eval_episodes": 0}, {"exp_name": "x"}])
def test_the_same_numbers_whatever_is_saved_or_logged(script, train, flags):
    """Bit for bit, with the same seed, as docs/usage.md says."""
    a = train(script, "Count", iterations=3)
    b = train(script, "Count", iterations=3, **flags)
    assert same(state(a["agent"]), state(b["agent"]))


# --- long runs ---


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000  # MB


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(script):
    """A minute's worth, in CI; with LONG=1 an hour (30 minutes of Atari), to within 2 %."""
    minutes = (30 if script.__name__ == "ppo_atari" else 60) if LONG else 0.1
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


@pytest.mark.parametrize("name", ["Raises", "RaisesOSError", "WrongShape"])
def test_an_environment_that_fails_keeps_its_traceback(mlp_script, cli, name):
    """It is the user's, whatever its kind: main takes only refusals and nan for its own."""
    with pytest.raises((KeyError, ValueError, OSError)):
        cli(mlp_script, "--env-id", bad_id(mlp_script, name), *FAST)
