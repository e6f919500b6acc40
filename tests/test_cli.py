"""The scripts as somebody at a terminal meets them: refusals, run directories, signals, summary, --help.

prepare, main, open_log and write_log are the same in the two scripts for vectors, which test_siblings.py
proves, and nearly so in the third: most tests take one script.
"""

import dataclasses
import importlib
import importlib.machinery
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import HANDLERS, NAMES, SCRIPTS, TINY, commands, copied, default_signals, saved, tiny

# --- refusals: one line that names the flag and the fix, exit code 2, nothing written ---


def test_every_number_has_a_range(script, no_training):
    """Numbers that no flag takes, for each flag of each script."""
    numbers = [f for f in dataclasses.fields(script.Args) if type(f.default) in (int, float, tuple)]
    assert len(numbers) >= 20
    for field in numbers:
        flag, whole = f"--{field.name.replace('_', '-')}", type(field.default) is not float
        for number in (-(10**6),) if whole else (-1e6, np.nan, np.inf, -np.inf):
            value = [8, number] if type(field.default) is tuple else number
            with pytest.raises(ValueError, match=rf"^{flag} {re.escape(str(value))}: use [^\n]*$"):
                script.train(script.Args(**{field.name: value}))
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--gamma 1.5", "--gamma 1.5: use 0 to 1"),
        ("--num-envs 0", "--num-envs 0: use 1 or more"),
        ("--seed 4294967296", "--seed 4294967296"),
        ("--hidden-sizes 64 0", "--hidden-sizes"),
        ("--num-steps 10 --num-envs 3 --num-minibatches 7", "10 x --num-envs 3 = 30 in --num-minibatches 7"),
        ("--num-steps 16 --num-envs 2 --num-minibatches 2 --total-timesteps 31", "31: use at least 32"),
        ("--kl-penalty-target 0", "--kl-penalty-target 0.0: use 1e-06 or more"),
        ("--device cuda", "use cpu"),
        ("--track", "--track: pip install wandb"),
    ],
)
def test_bad_input_is_refused(discrete, refused, monkeypatch, flags, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    refused(discrete, flags.split(), words)


@pytest.mark.parametrize(("field", "value"), [("objective", "kl"), ("device", "cuda:0")])
def test_an_unknown_choice_from_python_is_refused(script, no_training, field, value):
    """With another objective it would train with the clipped one, and say nothing."""
    with pytest.raises(script.UsageError, match=rf"^--{field} {value}: use one of \([^\n]*\)$"):
        script.train(script.Args(**{field: value}))


def test_a_video_without_moviepy_is_refused_before_the_training(script, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    refused(script, tiny(script.__name__, "--capture-video"), "--capture-video: pip install moviepy")


@pytest.mark.parametrize(
    "name, flags, words",
    [
        ("ppo_discrete", "Pendulum-v1", "ppo_continuous.py"),
        ("ppo_discrete", "Pendulum-v1 --capture-video", "acts in"),
        ("ppo_discrete", "Pendulum-v1 --vectorization async", "ppo_continuous.py"),
        ("ppo_discrete", "ALE/Breakout-v5", "ppo_atari.py"),
        ("ppo_discrete", "CartPol-v1", "CartPole"),
        ("ppo_discrete", "CartPole-v7", "v1"),
        ("ppo_discrete", "no_such_package:Env-v0", "no_such_package"),
        ("ppo_continuous", "CartPole-v1", "ppo_discrete.py"),
        ("ppo_continuous", "HalfCheeta-v5", "HalfCheetah"),
        ("ppo_atari", "CartPole-v1", "or try ppo_discrete.py"),
        ("ppo_atari", "Breakout-v4", "<Game>NoFrameskip-v4"),
        ("ppo_atari", "BrekoutNoFrameskip-v4", "`BreakoutNoFrameskip`"),
        ("ppo_atari", "ALE/Brekout-v5", "`Breakout`"),
        ("ppo_atari", "ALE/Breakout-ram-v5", "<Game>NoFrameskip-v4"),
        ("ppo_atari", "ALE/Combat-v5", "<Game>NoFrameskip-v4"),  # for two: its emulator would end the process
        ("ppo_atari", "BreakoutNoFrameskip-v4 --device mps", "--device mps: torch finds none, use cpu"),
    ],
)
def test_an_environment_that_is_unknown_or_not_for_this_script(refused, monkeypatch, name, flags, words):
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    refused(importlib.import_module(name), ["--env-id", *flags.split()], words)


def test_games_and_minibatches_are_shared_by_the_processes_of_torchrun(atari, refused, monkeypatch):
    """32 steps of 4 games are 64 rows for each of two processes: too few for 64 minibatches of two."""
    monkeypatch.setattr(atari, "WORLD_SIZE", 2)
    refused(atari, ["--num-envs", "3"], "--num-envs 3: use a multiple of 2")
    sizes = ["--num-envs", "4", "--num-steps", "32", "--num-minibatches", "64", "--device", "cpu"]
    refused(atari, sizes, "--num-envs 4 / 2 processes = 64 in --num-minibatches 64")


def test_each_process_of_torchrun_has_a_gpu_of_its_own(atari, monkeypatch):
    """It is chosen before anything is put on "cuda", which means the first GPU otherwise."""
    chosen = []

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(atari, "WORLD_SIZE", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(atari, "prepare", lambda args: (args, None))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(atari, "Agent", stop)
    with pytest.raises(InterruptedError):
        atari.train(atari.Args(device="cuda", num_envs=2))
    assert chosen == [1]


def test_not_a_number_exits_with_1(discrete, cli):
    """In one line; what was saved before is kept."""
    flags = ["--env-id", "stub_envs:NanReward-v0", "--num-steps", "8", "--save-every", "1"]
    code, out, err = cli(discrete, *tiny("ppo_discrete", *flags, "--run-dir", "run"))
    assert code == 1 and "Traceback" not in err
    assert re.search(r"^error: nan or infinity in .*v_loss.* by step 32: .*--learning-rate", err, re.M), err
    assert saved("run/checkpoint.pt")["global_step"] == 16 and "--resume" not in out


# --- run directories ---


def test_a_run_directory_is_named_after_the_run(atari):
    argv = tiny("ppo_atari", "--env-id", "ALE/Breakout-v5", "--exp-name", "a/b", "--seed", "7")
    run_dir = atari.train(tyro.cli(atari.Args, args=argv))["run_dir"]
    assert [run_dir] == list(Path("runs").iterdir())
    *parts, milliseconds = run_dir.name.split("__")
    assert parts == ["ALE-Breakout-v5", "a-b", "7"]
    assert 0 <= time.time() - int(milliseconds) / 1000 < 60


def test_a_run_dir_with_a_checkpoint_is_refused(discrete, refused, checkpoints):
    path = checkpoints["ppo_discrete"]
    before = path.read_bytes()
    argv = tiny("ppo_discrete", "--run-dir", str(path.parent))
    refused(discrete, argv, f"--run-dir {path.parent}", f"--resume {path.parent}")
    assert path.read_bytes() == before


# --- --resume and --evaluate ---


def test_what_was_typed_beside_resume_wins_and_nothing_else_changes(discrete, cli, monkeypatch, checkpoints):
    """A value that is the default of the script counts too, if it was typed."""
    calls = []

    def train(args, **_):
        calls.append(args)
        raise discrete.UsageError("this is all the test needs")

    monkeypatch.setattr(discrete, "train", train)
    path, default = checkpoints["ppo_discrete"], discrete.Args()
    typed = {"total_timesteps": default.total_timesteps, "gamma": 0.5, "run_dir": "elsewhere"}
    argv = [x for name, value in typed.items() for x in (f"--{name.replace('_', '-')}", value)]
    assert cli(discrete, "--resume", path, *argv, "--no-anneal-lr", "--deterministic")[0] == 2
    typed |= {"anneal_lr": False, "deterministic": True}
    before = saved(path)["args"]
    assert all(before[name] != value for name, value in typed.items())
    assert vars(calls[0]) == before | typed | {"resume": str(path)}


def test_resume_goes_on_in_the_same_directory(discrete, cli):
    """Wherever it is by now."""
    cli(discrete, *tiny("ppo_discrete", "--run-dir", "run"))
    Path("run").rename("moved")
    code, out, err = cli(discrete, "--resume", "moved", "--total-timesteps", "128", "--save-every", "7")
    assert code == 0, err
    checkpoint = saved("moved/checkpoint.pt")
    assert checkpoint["global_step"] == 128 and checkpoint["args"]["save_every"] == 7
    assert checkpoint["args"]["num_steps"] == 16 and checkpoint["args"]["total_timesteps"] == 128
    assert "4 iterations" in out and [path.name for path in Path().iterdir()] == ["moved"]
    assert len(list(Path("moved").glob("events*"))) == 2, "the curves go on there, too"


def test_the_cli_evaluates_what_evaluate_does(discrete, cli, checkpoints):
    path = checkpoints["ppo_discrete"]
    argv = ["--eval-episodes", 3, "--deterministic", "--seed", 4, "--max-episode-steps", 100]
    code, out, err = cli(discrete, "--evaluate", path, *argv)
    found = re.match(r"(\S+) \+- (\S+): mean return of 3 deterministic episodes, 95 % interval\n", out)
    assert code == 0 and found, (out, err)
    returns = discrete.evaluate(path, 3, deterministic=True, seed=2**30 + 4, max_episode_steps=100)
    mean, margin = map(float, found.groups())
    assert abs(mean - returns.mean()) <= 0.05 + 1e-9
    assert margin == pytest.approx(1.96 * returns.std(ddof=1) / 3**0.5, abs=0.05 + 1e-9)
    assert cli(discrete, "--evaluate", path.parent, *argv)[1] == out, "a directory will do"
    code, _, err = cli(discrete, "--evaluate", path, "--env-id", "Nowhere-v0")
    assert code == 2 and "Nowhere" in err, "it plays the environment that was typed"


def test_a_run_that_was_trained_without_an_evaluation_is_evaluated(discrete, cli):
    cli(discrete, *tiny("ppo_discrete", "--run-dir", "run", "--eval-episodes", "0"))
    code, out, err = cli(discrete, "--evaluate", "run")
    assert code == 0 and "mean return of 10 sampled" in out, err
    with pytest.raises(discrete.UsageError, match=r"^--eval-episodes 0: use 1 or more$"):
        discrete.evaluate("run", 0)


def test_one_episode_has_no_interval(discrete, cli, checkpoints):
    argv = ["--eval-episodes", 1, "--seed", 5 * 10**9]  # of no range, since nothing is trained
    out = cli(discrete, "--evaluate", checkpoints["ppo_discrete"], *argv)[1]
    assert re.match(r"\S+ \+- nan: mean return of 1 sampled episodes", out), out


def test_what_the_training_evaluated_with_is_the_default_of_evaluate(discrete, cli):
    flags = ["--run-dir", "run", "--deterministic", "--eval-episodes", "3", "--seed", "8"]
    trained = cli(discrete, *tiny("ppo_discrete", *flags))[1].splitlines()
    first = cli(discrete, "--evaluate", "run")[1].splitlines()[0]
    assert "3 deterministic" in first and first in trained
    assert "2 deterministic" in cli(discrete, "--evaluate", "run", "--eval-episodes", "2")[1]


def test_what_only_the_training_needed_may_be_missing(discrete, cli, monkeypatch, checkpoints):
    """Evaluation is on the CPU, neither compiled nor tracked: what is missing for that is no obstacle."""
    checkpoint = saved(checkpoints["ppo_discrete"])
    checkpoint["args"] |= {"device": "cuda", "compile": True, "track": True}
    torch.save(checkpoint, "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, out, err = cli(discrete, "--evaluate", "checkpoint.pt")
    assert code == 0 and "1 sampled" in out, err


# --- signals ---


@pytest.fixture
def caught():
    """A signal that main has no handler for fails the test, not the whole of pytest."""

    def unexpected(number, frame):
        raise AssertionError(f"nobody handles signal {number}")

    before = [signal.signal(number, unexpected) for number in HANDLERS]
    yield
    for number, handler in zip(HANDLERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "name, signum",
    [("ppo_continuous", signal.SIGINT), ("ppo_discrete", signal.SIGTERM), ("ppo_atari", signal.SIGTERM)],
)
def test_a_signal_ends_the_iteration_and_saves(name, signum, cli, monkeypatch):
    """Workers leave it to main. They are started as from Python 3.14 on; forked ones inherit its handlers."""
    flags = tiny(name, "--total-timesteps", "100000000", "--save-every", "1000000", "--run-dir", "run")
    flags += [] if name == "ppo_atari" else ["--vectorization", "async"]
    path = str(SCRIPTS / f"{name}.py")
    code = "import multiprocessing, runpy, sys; multiprocessing.set_start_method('forkserver'); "
    code += f"sys.argv[0] = {path!r}; runpy.run_path({path!r}, run_name='__main__')"
    program = [sys.executable, "-u", "-c", code, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, **pipes, start_new_session=True, preexec_fn=default_signals)
    limit = threading.Timer(120, os.killpg, [process.pid, signal.SIGKILL])  # it would run for hours
    limit.start()
    try:
        assert "iterations" in process.stdout.readline()
        time.sleep(0.5)  # some iterations
        os.killpg(process.pid, signum)  # as a terminal does, or `timeout`: to the workers of async, too
        out, err = process.communicate(timeout=60)
    finally:
        limit.cancel()
        process.kill()
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err and "Exception" not in err, err
    (resume,) = commands(out)
    global_step = saved("run/checkpoint.pt")["global_step"]
    assert "--resume" in resume and global_step >= 32 and global_step % 32 == 0

    script = importlib.import_module(name)
    train = script.train
    monkeypatch.setattr(script, "train", lambda args, **_: train(args, stop_requested=lambda: True))
    code, out, err = cli(script, *resume)
    assert code == 0 and saved("run/checkpoint.pt")["global_step"] == global_step + 32, err
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_a_second_signal_is_not_held_back(discrete, caught, cli, monkeypatch):
    """The first one asks train to stop; the next one ends the process. One that is ignored stays ignored."""
    seen = []

    def train(args, stop_requested):
        seen.append(stop_requested())
        os.kill(os.getpid(), signal.SIGTERM)
        seen.extend([stop_requested(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)])
        return {"run_dir": Path("run")}

    monkeypatch.setattr(discrete, "train", train)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as after nohup, whose runs outlive their terminal
    code, out, _ = cli(discrete)
    assert seen == [False, True, signal.SIG_DFL, signal.SIG_IGN] and code == 143 and "--resume" in out


def test_signals_do_as_ever_during_the_final_evaluation(discrete, caught, cli, monkeypatch):
    seen = []

    def evaluate(*args, **kwargs):
        seen.extend(signal.getsignal(signum) for signum in HANDLERS)
        return np.zeros(1)

    monkeypatch.setattr(discrete, "evaluate", evaluate)
    assert cli(discrete, *tiny("ppo_discrete"))[0] == 0
    assert seen == [signal.SIG_DFL] * len(HANDLERS)


# --- start line, progress, summary, next commands ---


def test_a_run_ends_with_a_summary_whose_commands_work(discrete, cli):
    """Also in a directory with a space in its name."""
    code, out, err = cli(discrete, *tiny("ppo_discrete", "--eval-episodes", "2", "--run-dir", "my run"))
    assert code == 0, err
    assert out.startswith("my run: 2 iterations of 32 steps = 64 on cpu\n")
    interval = r"^\d+\.\d \+- \d+\.\d: mean return of 2 sampled episodes, 95 % interval$"
    assert re.search(interval, out, re.M), out
    assert shlex.split(re.findall(r"tensorboard .*", out)[0]) == ["tensorboard", "--logdir", "my run"]
    (command,) = commands(out)
    code, out, err = cli(discrete, *command, "--eval-episodes", "1")
    assert code == 0 and len(out.splitlines()) == 1, err
    assert list(Path("my run").rglob("*.mp4")) and [path.name for path in Path().iterdir()] == ["my run"]


def test_progress_on_a_terminal_is_one_bar(discrete, cli, monkeypatch, checkpoints):
    """Of training, and one of evaluation; that of a resumed run starts where the run stood."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    for name in "COLUMNS", "TQDM_DISABLE":
        monkeypatch.delenv(name, raising=False)
    path = copied(checkpoints["ppo_discrete"])
    _, out, err = cli(discrete, "--resume", path, "--total-timesteps", 128)
    assert len(out.splitlines()) == 4, out
    assert err.count("\n") == 2, "each bar stays in its line"
    assert re.search(r" 50%.*64\.0/128", err) and "128/128" in err and "1/1" in err
    assert "step/s" in err and re.search(r"return \d+\.\d", err)


def test_progress_in_a_file_is_lines_of_text(discrete, cli):
    """One for each 5 %, and no bar; 40 iterations here, of which every other one has a line."""
    sizes = ["--num-steps", "4", "--total-timesteps", "320", "--eval-episodes", "0"]
    _, out, err = cli(discrete, *tiny("ppo_discrete", *sizes))
    assert "%" not in err and "\r" not in out + err
    lines = re.findall(r"^step (\d+) of 320: return (?:nan|-?\d+\.\d), \d+ steps/s$", out, re.M)
    assert list(map(int, lines)) == list(range(16, 321, 16)), out
    assert len(out.splitlines()) == 1 + 20 + 2 and "mean return" not in out


def test_track_starts_a_run_of_wandb(discrete, cli, monkeypatch):
    """Before the first TensorBoard file is opened: wandb copies what is written to those opened later."""
    calls, wandb = [], types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **kwargs: calls.append(kwargs | {"events": list(Path().rglob("events*"))})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = ["--track", "--wandb-project-name", "mine", "--run-dir", "here/run", "--eval-episodes", "0"]
    code, _, err = cli(discrete, *tiny("ppo_discrete", *flags))
    assert code == 0, err
    (call,) = calls
    assert (call["project"], call["entity"], call["name"]) == ("mine", None, "run")
    assert call["reinit"] == "finish_previous", "a second training in one process is a run of its own"
    assert call["sync_tensorboard"] is True and not call["events"]
    assert call["config"] == saved("here/run/checkpoint.pt")["args"]


# --- imports, threads, flags ---


def test_importing_a_script_does_nothing_else():
    """Nor does it need moviepy."""
    code = f"""
import os, random, signal, sys
import numpy, torch
sys.modules["moviepy"] = None
state = lambda: (
    [signal.getsignal(s) for s in {list(map(int, HANDLERS))}], torch.get_num_threads(), os.listdir(),
    random.getstate(), numpy.random.get_state()[2], torch.get_rng_state().tolist(), sys.argv[:],
    torch.backends.cudnn.deterministic, torch.get_default_dtype(), os.environ.get("MUJOCO_GL"),
)
before = state()
import {", ".join(NAMES)}
assert state() == before
"""
    program = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
    assert not list(Path().iterdir())


def test_the_number_of_threads_is_set(discrete):
    """0 leaves what torch has chosen, or what was set before."""
    before, seen = torch.get_num_threads(), []
    for number in (2, 0, 1):
        discrete.prepare(discrete.Args(num_threads=number))
        seen.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert seen == [2, 2, 1]


CLEANRL = """exp_name seed torch_deterministic track wandb_project_name wandb_entity capture_video
env_id total_timesteps learning_rate num_envs num_steps anneal_lr gamma gae_lambda num_minibatches
update_epochs norm_adv clip_coef clip_vloss ent_coef vf_coef max_grad_norm target_kl"""


def test_flags_have_cleanrls_names(script):
    fields = {field.name for field in dataclasses.fields(script.Args)}
    assert fields >= {*CLEANRL.split()}
    assert not fields & {"cuda", "batch_size", "minibatch_size", "num_iterations"}
    assert tyro.cli(script.Args, args=["--total_timesteps", "7"]).total_timesteps == 7, "as CleanRL's take it"


def test_a_copied_script_runs_from_another_folder(discrete, cli):
    """One file is enough: nothing is imported from its siblings. The original reads its runs."""
    Path("elsewhere").mkdir()
    Path("elsewhere/mine.py").write_text((SCRIPTS / "ppo_discrete.py").read_text())
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = [sys.executable, "elsewhere/mine.py", *TINY, "--exp-name", "mine", "--run-dir", "run"]
    done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and "elsewhere/mine.py --evaluate" in done.stdout, done.stderr
    assert cli(discrete, "--evaluate", "run")[0] == 0
