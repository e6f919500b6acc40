"""Many processes: ppo_atari under torchrun, with two processes on a CPU, which talk to each other by gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ale_py
import pytest
import torch
from conftest import copied, default_signals, resume, same, saved, scalars, state
from torchrun_worker import LIMITS, Game

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("torchrun_worker.py")
SIZES = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2", "--update-epochs", "1"]
SIZES += ["--seed", "1", "--eval-episodes", "1", "--learning-rate", "1e-3", "--device", "cpu"]


def launch(folder, what, flags):
    """Two processes by torchrun, in a session of their own, as in a terminal."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    session = {"start_new_session": True, "preexec_fn": default_signals}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*torchrun, WORKER, what, *flags], cwd=folder, env=env, **session, **pipes)


def finish(process):
    """Its stdout and stderr."""
    try:
        return process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, by force after 30 s
        raise AssertionError(f"it hangs: {process.communicate()}") from None


def wait_for(process, path):
    """Until there is this file."""
    end = time.time() + 100
    while not path.exists():
        if process.poll() is not None or time.time() > end:
            process.terminate()
            raise AssertionError(f"no {path.name}: {process.communicate()}")
        time.sleep(0.02)


# --- two processes ---


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(folder, stdout, stderr, [what rank 0 found, what rank 1 found]) of all that a worker does."""
    folder = tmp_path_factory.mktemp("ended")
    process = launch(folder, "all", [*SIZES, "--total-timesteps", "256", "--objective", "kl-penalty"])
    wait_for(process, folder / "interrupted/logged")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun hands it on
    out, err = finish(process)
    assert process.returncode == 1, err  # of torchrun
    return folder, out, err, [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_all_processes_have_the_same_parameters(ended):
    """After a training, and after two processes went on with it."""
    *_, (first, second) = ended
    for what in ("agent", "resumed"):
        assert same(first[what], second[what]), what
    assert not same(first["agent"], first["resumed"])


def test_b46_each_process_has_its_own_environments_and_random_numbers(ended):
    """Environments are numbered on through the processes; the last iteration drew what no other one did."""
    *_, (first, second) = ended
    assert (first["seed"], second["seed"]) == (1, 3)
    assert first["drawn"] != second["drawn"]


def test_beta_is_that_of_the_first_process(ended):
    """In all minibatches, although the second one came to another."""
    *_, (first, second) = ended
    assert first["betas"] == second["betas"] == sorted(first["betas"], reverse=True)
    assert len(first["betas"]) == 8 and len(set(first["betas"])) == 4 and 77 not in first["betas"]


def test_returns_are_those_of_the_episodes_of_the_first_process(ended):
    """An episode pays three times the seed of its environment, which is 1 or 2 there, 3 or 4 in the other."""
    folder, _, _, (first, second) = ended
    assert (first["return"], second["return"]) == (3 * 1.5, 3 * 3.5)
    (run_dir,) = folder.glob("runs/*")
    assert scalars({"run_dir": run_dir})["charts/episodic_return"][:4] == [3 * 1.5] * 4


def test_one_process_writes_and_speaks(ended):
    """One directory with one file of events and one checkpoint; one start line, bar, evaluation, summary."""
    _, out, err, (found, _) = ended
    assert len({Path(file).parts[1] for file in found["files"]}) == 1
    for kind in ("/events", "/checkpoint"):
        assert sum(kind in file for file in found["files"]) == 1, found["files"]
    first = out.split("=====\n")[0].splitlines()
    first = [line for line in first if not line.startswith("step ")]  # progress, where there is no terminal
    assert len(first) == 4 and "4 iterations of 64 steps = 256" in first[0], out
    assert "step 256 of 256" in out
    assert 'ppo_atari.py", line' not in err  # torchrun writes a traceback of its own for every failure


def test_a_checkpoint_of_two_processes_resumes_on_one(ended, atari, monkeypatch):
    """With all four environments; its weights are those that both had."""
    folder, *_, (first, _) = ended
    monkeypatch.setattr(ale_py, "AtariVectorEnv", Game)
    (path,) = folder.glob("runs/*/checkpoint.pt")
    path = copied(path)
    assert same(saved(path)["agent"], first["resumed"]) and saved(path)["global_step"] == 320
    result = resume(atari, {"run_dir": path.parent}, total_timesteps=384)
    assert saved(path)["global_step"] == 384 and not same(state(result["agent"]), first["resumed"])


@pytest.mark.parametrize("limit", LIMITS)
def test_b44_b45_the_gradient_is_that_of_the_joined_minibatch(ended, limit):
    """Of two halves, one of which has much larger gradients: averaged first, clipped then. Stats likewise."""
    for found in (x["average"][limit] for x in ended[3]):
        assert found["difference"] < 1e-4
        ours, joined = found["norms"]
        assert ours == pytest.approx(joined, rel=1e-4)
        unclipped, _ = found["stats"]["grad_norm"]
        assert unclipped > 0.1 and ours == pytest.approx(limit if limit == 1e-3 else unclipped, rel=1e-3)
        for name, (mine, whole) in found["stats"].items():
            assert mine == pytest.approx(whole, rel=1e-3, abs=1e-5), name


def test_target_kl_ends_the_update_of_all_processes_at_once(ended):
    """The mean KL goes beyond it in the third minibatch, that of the first process already in the second."""
    *_, (first, second) = ended
    assert first["steps"] == second["steps"] == 2


# --- two processes that come to another end ---


def test_a_killed_process_ends_the_other_one(tmp_path, atari, monkeypatch):
    """Not for ever; the newest checkpoint is whole, and a run goes on from it."""
    endless = ["--total-timesteps", "1000000", "--save-every", "1", "--run-dir", "run"]
    process = launch(tmp_path, "main", [*SIZES, *endless])
    wait_for(process, tmp_path / "run/checkpoint.pt")
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    finish(process)
    assert process.returncode != 0
    monkeypatch.setattr(ale_py, "AtariVectorEnv", Game)
    steps = saved("run/checkpoint.pt")["global_step"]
    result = resume(atari, {"run_dir": "run"}, total_timesteps=steps + 64)
    assert result["global_step"] == saved("run/checkpoint.pt")["global_step"] == steps + 64 >= 128


def test_ctrl_c_ends_the_iteration_of_all_processes_and_saves(ended):
    """One of them answers; the command that it prints names the run."""
    folder, out, err, _ = ended
    (run_dir,) = folder.glob("interrupted/runs/*")
    assert out.count("stopped by signal") == 1 and "stopped by signal 2" in out, err
    assert f"--resume runs/{run_dir.name}\n" in out
    assert saved(run_dir / "checkpoint.pt")["global_step"] % 64 == 0
