"""The scripts as somebody at a terminal meets them: refusals, run directories, signals, summary, --help."""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
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
from conftest import HANDLERS, MLP, NAMES, SCRIPTS, TINY, commands, copied, saved, tiny

# --- refusals: one line that names the flag and the fix, exit code 2, nothing written ---


@pytest.mark.parametrize(
    "flag, value",
    [
        *[("--gamma", x) for x in ("1.5", "-0.1", "nan")],
        *[("--gae-lambda", x) for x in ("1.01", "-1", "inf")],
        *[("--learning-rate", x) for x in ("-1.0", "nan", "inf")],
        *[("--num-envs", x) for x in ("0", "-4")],
        *[("--num-steps", x) for x in ("0", "-1")],
        *[("--num-minibatches", x) for x in ("0", "-2")],
        *[("--update-epochs", x) for x in ("0", "-1")],
        *[("--total-timesteps", x) for x in ("0", "-1")],
        *[("--save-every", x) for x in ("0", "-1")],
        *[("--seed", x) for x in ("-1", "4294967296")],
        ("--clip-coef", "-0.1"),
        ("--kl-penalty-coef", "-1"),
        ("--kl-penalty-target", "nan"),
        ("--ent-coef", "nan"),
        ("--vf-coef", "inf"),
        ("--max-grad-norm", "-0.5"),
        ("--target-kl", "nan"),
        ("--num-threads", "-1"),
        ("--max-episode-steps", "-1"),
        ("--eval-episodes", "-1"),
    ],
)
def test_a_number_out_of_its_range_is_refused(discrete, refused, flag, value):
    kind = type(getattr(discrete.Args, flag[2:].replace("-", "_")))
    refused(discrete, [flag, value], f"{flag} {kind(value)}:")


def test_every_number_has_a_range(script, refused):
    """Numbers that no flag takes, for each flag of each script."""
    numbers = [f for f in dataclasses.fields(script.Args) if type(f.default) in (int, float, tuple)]
    assert len(numbers) >= 20
    for field in numbers:
        flag, whole = f"--{field.name.replace('_', '-')}", type(field.default) is not float
        for value in ("-1000000",) if whole else ("-1000000.0", "nan", "inf", "-inf"):
            refused(script, [flag, value], flag, value)


@pytest.mark.parametrize("value", ["nan", "-21", "21"])
def test_a_standard_deviation_without_meaning_is_refused(continuous, refused, value):
    refused(continuous, ["--init-log-std", value], f"--init-log-std {float(value)}")


@pytest.mark.parametrize("sizes", [["0"], ["64", "0"], ["-3"]])
def test_hidden_layers_of_no_units_are_refused(mlp_script, refused, sizes):
    refused(mlp_script, ["--hidden-sizes", *sizes], "--hidden-sizes", sizes[-1])


def test_sizes_that_do_not_divide_are_refused_with_the_numbers(discrete, refused):
    sizes = ["--num-steps", "10", "--num-envs", "3", "--num-minibatches", "7"]
    refused(discrete, sizes, "--num-minibatches 7", "--num-steps 10", "--num-envs 3", "30")


ONES = ["--num-steps", "2", "--num-envs", "2", "--num-minibatches", "4", "--total-timesteps", "4"]


def test_minibatches_of_one_have_no_std(discrete, refused, cli):
    refused(discrete, tiny("ppo_discrete", *ONES), "--num-minibatches 4", "--no-norm-adv")


def test_minibatches_of_one_without_normalisation(discrete, cli):
    code, _, err = cli(discrete, *tiny("ppo_discrete", *ONES, "--no-norm-adv", "--eval-episodes", "0"))
    assert code == 0, err


def test_fewer_steps_than_one_iteration_are_refused_with_the_numbers(discrete, refused):
    sizes = ["--num-steps", "16", "--num-envs", "2", "--num-minibatches", "2", "--total-timesteps", "31"]
    refused(discrete, sizes, "--total-timesteps 31", "32")


def test_a_device_that_is_not_there(script, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(script, ["--device", "cuda"], "--device cuda", "use cpu")


def test_apples_device_where_it_is_not_there(atari, refused, monkeypatch):
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    refused(atari, ["--device", "mps"], "--device mps", "use cpu")


def without(monkeypatch, package):
    """As if the package were not installed: find_spec finds nothing, and importing it fails."""
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("flag, package", [("--track", "wandb"), ("--capture-video", "moviepy")])
def test_a_missing_optional_package_is_named_with_its_pip_line(script, refused, monkeypatch, flag, package):
    """Before the training, not after it."""
    without(monkeypatch, package)
    message = refused(script, tiny(script.__name__, flag), "pip install")
    assert package in message.lower()


def test_a_script_starts_without_moviepy():
    """None in sys.modules makes Python raise ImportError, as if it were not installed."""
    code = f"import sys; sys.modules['moviepy'] = None; import {', '.join(NAMES)}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_evaluating_with_video_needs_moviepy_too(script, refused, monkeypatch, checkpoints):
    without(monkeypatch, "moviepy")
    path = copied(checkpoints[script.__name__])
    message = refused(script, ["--evaluate", path, "--capture-video"], "pip install")
    assert "moviepy" in message.lower()


@pytest.mark.parametrize(
    "name, env_id, use",
    [
        ("ppo_discrete", "Pendulum-v1", "ppo_continuous.py"),
        ("ppo_discrete", "HalfCheetah-v5", "ppo_continuous.py"),
        ("ppo_continuous", "CartPole-v1", "ppo_discrete.py"),
        ("ppo_continuous", "Acrobot-v1", "ppo_discrete.py"),
        ("ppo_atari", "CartPole-v1", "ppo_discrete.py"),
        ("ppo_discrete", "BreakoutNoFrameskip-v4", "ppo_atari.py"),
        ("ppo_discrete", "ALE/Breakout-v5", "ppo_atari.py"),
        ("ppo_discrete", "CartPol-v1", "CartPole"),
        ("ppo_discrete", "CartPole-v7", "v1"),
        ("ppo_continuous", "HalfCheeta-v5", "HalfCheetah"),
        ("ppo_continuous", "HalfCheetah-v9", "v5"),
        ("ppo_discrete", "no_such_package:Env-v0", "no_such_package"),
        ("ppo_continuous", "no_such_package:Env-v0", "no_such_package"),
        ("ppo_discrete", "two words", "two words"),
        ("ppo_atari", "Breakout-v4", "<Game>NoFrameskip-v4"),
        ("ppo_atari", "BreakoutDeterministic-v4", "`BreakoutNoFrameskip`"),
        ("ppo_atari", "SpaceInvaders-v0", "<Game>NoFrameskip-v4"),
        ("ppo_atari", "ALE/Pong", "ALE/<Game>-v5"),
        ("ppo_atari", "pong", "<Game>NoFrameskip-v4"),
        ("ppo_atari", "BrekoutNoFrameskip-v4", "`BreakoutNoFrameskip`"),
        ("ppo_atari", "ALE/Brekout-v5", "`Breakout`"),
        ("ppo_atari", "ALE/Breakout-ram-v5", "<Game>NoFrameskip-v4"),
    ],
)
def test_an_environment_that_is_unknown_or_not_for_this_script(name, env_id, use, refused):
    refused(importlib.import_module(name), ["--env-id", env_id], f"--env-id {env_id}", use)


@pytest.mark.parametrize("name", MLP)
def test_async_refuses_the_wrong_space_in_one_line_too(name, refused):
    env_id, use = [("CartPole-v1", "ppo_discrete.py"), ("Pendulum-v1", "ppo_continuous.py")][name == MLP[0]]
    argv = ["--env-id", env_id, "--vectorization", "async", "--num-envs", "2"]
    refused(importlib.import_module(name), argv, f"--env-id {env_id}", use)


@pytest.mark.parametrize("name, env_id", [("ppo_discrete", "Pendulum-v1"), ("ppo_continuous", "CartPole-v1")])
def test_a_video_of_a_wrong_environment_is_refused_before_its_folder_is_made(refused, name, env_id):
    argv = tiny(name, "--env-id", env_id, "--capture-video")
    message = refused(importlib.import_module(name), argv, env_id, "acts in")
    assert message.count("--env-id") == 1 and not list(Path().iterdir())


@pytest.mark.parametrize(
    "argv", ["--gamma abc", "--no-such-flag", "--device tpu", "--total-timesteps 1e6", "--precision auto"]
)
def test_what_tyro_refuses_keeps_its_form_and_exits_with_2(script, cli, argv):
    code, out, err = cli(script, *argv.split())
    assert code == 2 and argv.split()[0] in err and "Traceback" not in err
    assert not out and not list(Path().iterdir())


def test_only_atari_knows_apples_device(mlp_script, cli):
    code, _, err = cli(mlp_script, "--device", "mps")
    assert code == 2 and "--device" in err and "Traceback" not in err


def test_values_from_python_are_made_plain(discrete, train):
    """A checkpoint holds no numbers of numpy and no paths, and is read without running code."""
    odd = {"learning_rate": np.float32(0.5), "seed": np.int64(3), "gamma": 1, "norm_adv": np.bool_(False)}
    odd |= {"run_dir": Path("here"), "hidden_sizes": [np.int64(8), 4]}
    args = saved(train(discrete, "CartPole-v1", **odd)["run_dir"] / "checkpoint.pt")["args"]
    plain = {"learning_rate": 0.5, "seed": 3, "gamma": 1.0, "norm_adv": False}
    plain |= {"run_dir": "here", "hidden_sizes": (8, 4)}
    assert {name: args[name] for name in odd} == plain
    assert all(type(args[name]) is type(value) for name, value in plain.items())


def test_in_process_bad_input_is_a_value_error_of_one_line(script, no_training):
    assert issubclass(script.UsageError, ValueError)
    with pytest.raises(ValueError, match=r"^--gamma 2[^\n]*$"):
        script.train(script.Args(gamma=2.0))
    with pytest.raises(ValueError, match=r"^--env-id NoSuchGame-v3[^\n]*$"):
        script.train(script.Args(env_id="NoSuchGame-v3"))
    assert not list(Path().iterdir())


def test_a_refusal_as_a_program_has_no_traceback():
    program = [sys.executable, SCRIPTS / "ppo_discrete.py", "--env-id", "Pendulum-v1"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout and not list(Path().iterdir())
    assert done.stderr.count("\n") == 1 and "--env-id Pendulum-v1" in done.stderr


def test_not_a_number_exits_with_1(discrete, cli):
    """In one line; what was saved before is kept."""
    flags = ["--env-id", "stub_envs:NanReward-v0", "--num-steps", "8", "--save-every", "1"]
    code, out, err = cli(discrete, *tiny("ppo_discrete", *flags, "--run-dir", "run"))
    assert code == 1 and "Traceback" not in err
    assert re.search(r"^error: nan or infinity in .*v_loss.* by step 32: .*--learning-rate", err, re.M), err
    assert saved("run/checkpoint.pt")["global_step"] == 16 and "--resume" not in out


def test_a_fault_of_the_environment_keeps_its_traceback(discrete, cli, monkeypatch):
    """Only bad input and numbers that are not finite become one line; what nobody foresaw must be seen."""

    def step(self, actions):
        raise RuntimeError("a fault of the environment")

    monkeypatch.setattr(discrete.LearningEnvs, "step", step)
    with pytest.raises(RuntimeError, match="a fault of the environment"):
        cli(discrete, *tiny("ppo_discrete"))


# --- run directories ---


@pytest.mark.parametrize("name, env_id", [("ppo_discrete", "CartPole-v1"), ("ppo_atari", "ALE/Breakout-v5")])
def test_a_run_directory_is_named_after_the_run(name, env_id):
    script = importlib.import_module(name)
    before = time.time_ns() // 10**6
    argv = tiny(name, "--env-id", env_id, "--exp-name", "a/b", "--seed", "7")
    run_dir = script.train(tyro.cli(script.Args, args=argv))["run_dir"]
    assert [run_dir] == list(Path("runs").iterdir())
    *parts, stamp = run_dir.name.split("__")
    assert parts == [env_id.replace("/", "-"), "a-b", "7"]
    assert before <= int(stamp) <= time.time_ns() // 10**6


def test_runs_that_start_at_the_same_moment_do_not_share_a_directory(discrete, monkeypatch):
    asked = []
    monkeypatch.setattr(time, "time_ns", lambda: asked.append(1) or 10**18)
    args = tyro.cli(discrete.Args, args=tiny("ppo_discrete"))
    first = discrete.train(args)["run_dir"]
    before = (first / "checkpoint.pt").read_bytes()
    assert asked and first.name.endswith(f"__{10**12}"), "the name has the time that is patched here"
    with pytest.raises(discrete.UsageError, match="--run-dir"):
        discrete.train(args)
    assert (first / "checkpoint.pt").read_bytes() == before


def test_a_run_dir_with_a_checkpoint_is_refused(discrete, refused, checkpoints):
    path = checkpoints["ppo_discrete"]
    before = path.read_bytes()
    argv = tiny("ppo_discrete", "--run-dir", str(path.parent))
    refused(discrete, argv, f"--run-dir {path.parent}", f"--resume {path.parent}")
    assert path.read_bytes() == before


# --- --resume ---


def test_what_was_typed_beside_resume_wins_and_nothing_else_changes(script, cli, monkeypatch, checkpoints):
    """A value that is the default of the script counts too, if it was typed."""
    calls = []

    def train(args, **_):
        calls.append(args)
        raise script.UsageError("this is all the test needs")

    monkeypatch.setattr(script, "train", train)
    path, default = checkpoints[script.__name__], script.Args()
    typed = {"total_timesteps": default.total_timesteps, "eval_episodes": default.eval_episodes}
    typed |= {
        "gamma": 0.5,
        "save_every": 7,
        "deterministic": True,
        "anneal_lr": False,
        "run_dir": "elsewhere",
    }
    argv = ["--resume", path]
    for name, value in typed.items():
        flag = name.replace("_", "-")
        argv += [f"--no-{flag}" if value is False else f"--{flag}", *([] if type(value) is bool else [value])]
    assert cli(script, *argv)[0] == 2
    before = saved(path)["args"]
    assert all(before[name] != value for name, value in typed.items())
    assert vars(calls[0]) == before | typed | {"resume": str(path)}


def test_what_was_typed_beside_resume_is_what_the_run_goes_on_with(discrete, cli, checkpoints):
    path = copied(checkpoints["ppo_discrete"])
    argv = ["--total-timesteps", "128", "--save-every", "7", "--gamma", "0.5"]
    argv += ["--eval-episodes", "3", "--deterministic"]
    code, out, err = cli(discrete, "--resume", path, *argv)
    assert code == 0 and "mean return of 3 deterministic" in out, err
    args = saved(path)["args"]
    assert (args["save_every"], args["deterministic"], args["gamma"]) == (7, True, 0.5)
    assert args["num_steps"] == 16 and args["seed"] == 3, "what was not typed stays"


def test_resume_cannot_change_the_network(mlp_script, cli, checkpoints):
    path = copied(checkpoints[mlp_script.__name__])
    before = path.read_bytes()
    argv = ["--resume", path, "--total-timesteps", "128", "--hidden-sizes", "8"]
    code, out, err = cli(mlp_script, *argv)
    assert code == 2 and not out and err.count("\n") == 1 and "--resume" in err and "network" in err, err
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_name_begins_a_new_run(discrete, cli, checkpoints):
    """The checkpoint.pt beside it stays as it is, and may not be named as the place to write to."""
    newest = copied(checkpoints["ppo_discrete"])
    best = newest.with_name("best.pt")
    best.write_bytes(newest.read_bytes())
    before, argv = newest.read_bytes(), ["--resume", best, "--total-timesteps", "128"]
    code, out, err = cli(discrete, *argv, "--run-dir", newest.parent)
    assert code == 2 and "holds a checkpoint" in err and not out
    code, out, err = cli(discrete, *argv)
    assert code == 0, err
    (run_dir,) = Path("runs").iterdir()
    assert saved(run_dir / "checkpoint.pt")["global_step"] == 128
    assert newest.read_bytes() == best.read_bytes() == before
    assert {path.name for path in Path().iterdir()} == {"runs", "checkpoint.pt", "best.pt"}


def test_resume_of_a_finished_run_names_total_timesteps(discrete, refused, checkpoints):
    path = checkpoints["ppo_discrete"]
    before = path.read_bytes()
    refused(discrete, ["--resume", path], "--total-timesteps 64", "96")
    assert path.read_bytes() == before


def test_resume_goes_on_in_the_same_directory(discrete, cli):
    """Wherever it is by now."""
    cli(discrete, *tiny("ppo_discrete", "--run-dir", "run"))
    Path("run").rename("moved")
    code, out, err = cli(discrete, "--resume", "moved", "--total-timesteps", "128", "--save-every", "1")
    assert code == 0, err
    checkpoint = saved("moved/checkpoint.pt")
    assert checkpoint["global_step"] == 128 and checkpoint["args"]["save_every"] == 1
    assert checkpoint["args"]["num_steps"] == 16 and checkpoint["args"]["total_timesteps"] == 128
    assert "4 iterations" in out and [path.name for path in Path().iterdir()] == ["moved"]
    assert len(list(Path("moved").glob("events*"))) == 2, "the curves go on there, too"


# --- --evaluate ---


def test_the_cli_evaluates_what_evaluate_does(script, cli, checkpoints):
    path = checkpoints[script.__name__]
    limit = 100 if script.__name__ == "ppo_discrete" else 20  # within 20 steps, no pole has fallen
    argv = ["--eval-episodes", 3, "--deterministic", "--seed", 4, "--max-episode-steps", limit]
    code, out, err = cli(script, "--evaluate", path, *argv)
    first = out.splitlines()[0]
    found = re.match(r"(\S+) \+- (\S+): mean return of 3 deterministic episodes$", first)
    assert code == 0 and found, (out, err)
    returns = script.evaluate(path, 3, deterministic=True, seed=2**30 + 4, max_episode_steps=limit)
    mean, margin = map(float, found.groups())
    assert abs(mean - returns.mean()) <= 0.05 + 1e-9
    assert margin == pytest.approx(1.96 * returns.std(ddof=1) / 3**0.5, abs=0.05 + 1e-9)
    assert cli(script, "--evaluate", path.parent, *argv)[1].splitlines()[0] == first, "a directory will do"
    _, out, _ = cli(script, "--evaluate", path, "--eval-episodes", 7, "--max-episode-steps", limit)
    mean = script.evaluate(path, 7, seed=2**30 + 3, max_episode_steps=limit).mean()  # TINY has --seed 3
    assert out.startswith(f"{mean:.1f} +- "), out


def test_the_margin_is_that_of_the_mean(discrete, cli, monkeypatch, checkpoints):
    """Of 400 returns, half of them 0 and half 100: 50 with a standard error of 2.5. Of one there is none."""
    monkeypatch.setattr(discrete, "evaluate", lambda *args, **changes: np.repeat([0.0, 100.0], 200))
    _, out, _ = cli(discrete, "--evaluate", checkpoints["ppo_discrete"])
    assert out.startswith("50.0 +- 4.9: mean return of 400 sampled episodes\n"), out
    monkeypatch.setattr(discrete, "evaluate", lambda *args, **changes: np.array([7.0]))
    _, out, err = cli(discrete, "--evaluate", checkpoints["ppo_discrete"])
    assert out.startswith("7.0 +- 0.0: mean return of 1 sampled") and not err, err


def test_evaluating_no_episodes_is_refused(discrete, refused, checkpoints):
    path = checkpoints["ppo_discrete"]
    refused(discrete, ["--evaluate", path, "--eval-episodes", "0"], "--eval-episodes 0")


def test_what_was_typed_beside_evaluate_wins(discrete, cli, checkpoints):
    path = copied(checkpoints["ppo_discrete"])
    argv = ["--eval-episodes", "2", "--max-episode-steps", "5", "--capture-video", "--deterministic"]
    code, out, err = cli(discrete, "--evaluate", path, *argv)
    assert code == 0 and out.startswith("5.0 +- 0.0: mean return of 2 deterministic"), (out, err)
    assert len(list(path.parent.rglob("*.mp4"))) == 1
    _, out, _ = cli(discrete, "--evaluate", path, "--eval-episodes", 2)
    assert re.match(r"(?!5\.0)\S+ \+- \S+: mean return of 2 sampled", out), out


def test_evaluate_plays_the_environment_that_was_typed(discrete, cli, checkpoints):
    """As the name of one that is not there shows."""
    argv = ["--evaluate", checkpoints["ppo_discrete"], "--env-id", "Nowhere-v0"]
    code, out, err = cli(discrete, *argv)
    assert code == 2 and "Nowhere" in err and not out, (out, err)


def test_what_the_training_evaluated_with_is_the_default_of_evaluate(discrete, cli):
    flags = ["--run-dir", "run", "--deterministic", "--eval-episodes", "3", "--seed", "8"]
    trained = cli(discrete, *tiny("ppo_discrete", *flags))[1].splitlines()
    first = cli(discrete, "--evaluate", "run")[1].splitlines()[0]
    assert "3 deterministic" in first and first in trained
    assert "2 deterministic" in cli(discrete, "--evaluate", "run", "--eval-episodes", "2")[1]


@pytest.mark.parametrize("flags", [{"device": "cuda"}, {"compile": True}, {"track": True}], ids=str)
def test_what_only_the_training_needed_may_be_missing(discrete, cli, monkeypatch, checkpoints, flags):
    """Evaluation is on the CPU, neither compiled nor tracked: what is missing for that is no obstacle."""
    checkpoint = saved(checkpoints["ppo_discrete"])
    torch.save(checkpoint | {"args": checkpoint["args"] | flags}, "checkpoint.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", None)
    without(monkeypatch, "wandb")
    code, out, err = cli(discrete, "--evaluate", "checkpoint.pt", "--eval-episodes", 1)
    assert code == 0 and "1 sampled" in out, err


def test_an_episode_without_end_names_the_flag_to_use(discrete, cli, train, monkeypatch):
    """The line says what works."""
    path = train(discrete, "CountEndless")["run_dir"]
    step = discrete.LearningEnvs.step

    def later(self, actions):
        assert self.episode_lengths[0] < 10**6, "nothing stops it"
        self.episode_lengths += 9_999
        return step(self, actions)

    with monkeypatch.context() as patch:
        patch.setattr(discrete.LearningEnvs, "step", later)
        code, _, err = cli(discrete, "--evaluate", path, "--eval-episodes", 1)
    (flags,) = re.findall(r"--max-episode-steps \d+", err)
    assert code == 2 and "Traceback" not in err
    code, out, err = cli(discrete, "--evaluate", path, "--eval-episodes", 1, *flags.split())
    assert code == 0 and out.startswith(f"{flags.split()[1]}.0 +- 0.0:"), err


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


def stop_after_one_iteration(monkeypatch, script):
    train = script.train
    monkeypatch.setattr(script, "train", lambda args, **_: train(args, stop_requested=lambda: True))


def default_signals():
    """Whoever started pytest may have told it to ignore some, as nohup does."""
    for number in HANDLERS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    "name, signum",
    [("ppo_continuous", signal.SIGINT), ("ppo_atari", signal.SIGTERM), ("ppo_discrete", signal.SIGHUP)],
)
def test_a_signal_ends_the_iteration_and_saves(name, signum, cli, monkeypatch):
    flags = tiny(name, "--total-timesteps", "100000000", "--save-every", "1000000", "--run-dir", "run")
    flags += [] if name == "ppo_atari" else ["--vectorization", "async"]
    program = [sys.executable, "-u", SCRIPTS / f"{name}.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, **pipes, start_new_session=True, preexec_fn=default_signals)
    limit = threading.Timer(120, os.killpg, [process.pid, signal.SIGKILL])  # it would run for hours
    limit.start()
    try:
        start = process.stdout.readline()
        assert "iterations" in start
        time.sleep(0.5)  # some iterations
        if signum == signal.SIGTERM:
            process.send_signal(signum)
        else:  # as a terminal does: to the workers of async, too
            os.killpg(process.pid, signum)
        out, err = process.communicate(timeout=60)
    finally:
        limit.cancel()
        process.kill()
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err and "Exception" not in err, err
    (resume,) = commands(out)
    assert "--resume" in resume and "run" in resume
    global_step = saved("run/checkpoint.pt")["global_step"]
    assert global_step >= 32 and global_step % 32 == 0

    script = importlib.import_module(name)
    stop_after_one_iteration(monkeypatch, script)
    code, out, err = cli(script, *resume)
    assert code == 0 and saved("run/checkpoint.pt")["global_step"] == global_step + 32, err
    assert [path.name for path in Path().iterdir()] == ["run"]


@pytest.mark.parametrize("signum", HANDLERS)
@pytest.mark.parametrize("more", [[], ["--vectorization", "async"]], ids=["sync", "async"])
def test_a_signal_while_metrics_are_written_does_not_lose_the_iteration(
    discrete, caught, cli, monkeypatch, signum, more
):
    """One that comes after the decision to save: then the next iteration is the last."""

    class Writer(discrete.SummaryWriter):
        def add_scalar(self, *args, **kwargs):
            if not Path("sent").exists():
                Path("sent").touch()
                os.kill(os.getpid(), signum)
            super().add_scalar(*args, **kwargs)

    monkeypatch.setattr(discrete, "SummaryWriter", Writer)
    monkeypatch.setattr(discrete, "evaluate", None)
    flags = ["--total-timesteps", "320", "--save-every", "1000", "--run-dir", "run", *more]
    code, out, err = cli(discrete, *tiny("ppo_discrete", *flags))
    assert code == 128 + signum and "Traceback" not in err, err
    assert saved("run/checkpoint.pt")["global_step"] == 64
    ((*_, flag, path),) = commands(out)
    assert (flag, path) == ("--resume", "run")


def test_a_second_signal_is_not_held_back(discrete, caught, cli, monkeypatch):
    """After the first signal the second one ends the process, as ever."""
    seen = []

    def train(args, stop_requested):
        seen.append(stop_requested())
        os.kill(os.getpid(), signal.SIGTERM)
        seen.extend([stop_requested(), signal.getsignal(signal.SIGTERM)])
        return {"episodic_return": 0.0, "global_step": 0, "run_dir": Path("run"), "agent": None}

    monkeypatch.setattr(discrete, "train", train)
    code, out, _ = cli(discrete)
    assert seen == [False, True, signal.SIG_DFL] and code == 143 and "--resume" in out


def test_signals_do_as_ever_during_the_final_evaluation(discrete, caught, cli, monkeypatch):
    seen = []

    def evaluate(*args, **kwargs):
        seen.extend(signal.getsignal(signum) for signum in HANDLERS)
        return np.zeros(1)

    monkeypatch.setattr(discrete, "evaluate", evaluate)
    assert cli(discrete, *tiny("ppo_discrete"))[0] == 0
    assert seen == [signal.SIG_DFL] * len(HANDLERS)


def test_a_signal_that_is_ignored_stays_ignored(discrete, caught, cli, monkeypatch):
    """As after nohup, whose runs outlive their terminal."""
    seen = []

    def train(args, stop_requested):
        seen.append(signal.getsignal(signal.SIGHUP))
        raise discrete.UsageError("this is all the test needs")

    monkeypatch.setattr(discrete, "train", train)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert cli(discrete)[0] == 2 and seen == [signal.SIG_IGN]


# --- start line, progress bar, summary, next commands ---


def logdir(out):
    """Where tensorboard is to look, as a shell reads it."""
    (line,) = re.findall(r"tensorboard --logdir .*", out)
    (path,) = shlex.split(line)[2:]
    return Path(path).resolve()


def test_a_run_ends_with_a_summary_whose_commands_work(script, cli):
    code, out, err = cli(script, *tiny(script.__name__, "--eval-episodes", "2"))
    assert code == 0, err
    (run_dir,) = Path("runs").iterdir()
    start = out.splitlines()[0]
    assert str(run_dir) in start and "2 iterations" in start and "64" in start and "cpu" in start
    assert re.search(r"^-?\d+\.\d \+- \d+\.\d: mean return of 2 sampled episodes$", out, re.M), out
    assert logdir(out) == run_dir.resolve()
    assert {path.suffix for path in run_dir.iterdir()} >= {".pt"} and list(run_dir.glob("events*"))
    (command,) = commands(out)
    evaluate = tyro.cli(script.Args, args=command)
    assert Path(evaluate.evaluate) == run_dir and evaluate.eval_episodes == 100
    code, out, err = cli(script, *command, "--eval-episodes", "1")
    assert code == 0 and len(out.splitlines()) == 1, err
    assert list(run_dir.rglob("*.mp4")) and list(Path("runs").iterdir()) == [run_dir]


def test_commands_work_for_a_directory_with_a_space_in_its_name(discrete, cli):
    _, out, _ = cli(discrete, *tiny("ppo_discrete", "--run-dir", "my run"))
    (command,) = commands(out)
    assert tyro.cli(discrete.Args, args=command).evaluate == "my run"
    assert logdir(out) == Path("my run").resolve()


def test_the_start_line_says_what_rounding_leaves(discrete, cli):
    _, out, _ = cli(discrete, *tiny("ppo_discrete", "--total-timesteps", "95", "--eval-episodes", "0"))
    assert re.search(r"\b2 iterations of 32 steps = 64\b", out.splitlines()[0])


def test_no_evaluation_where_none_is_asked_for(discrete, cli, monkeypatch):
    monkeypatch.setattr(discrete, "evaluate", None)
    code, out, _ = cli(discrete, *tiny("ppo_discrete", "--eval-episodes", "0"))
    assert code == 0 and "mean return" not in out and len(commands(out)) == 1


@pytest.fixture
def terminal(capfd, monkeypatch):
    """The bars take stderr for a terminal, wide enough for all they show."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    for name in "COLUMNS", "TQDM_DISABLE":
        monkeypatch.delenv(name, raising=False)


def test_progress_on_a_terminal_is_one_bar(discrete, terminal, cli):
    """stdout has the start line and the summary; stderr one bar of training and one of evaluation."""
    _, out, err = cli(discrete, *tiny("ppo_discrete", "--total-timesteps", "320"))
    assert len(out.splitlines()) == 4, out
    assert len([line for line in err.splitlines() if line.strip()]) <= len(re.findall(r"\d+%", err))
    assert err.count("\n") == 2, "each bar stays in its line"
    assert "step/s" in err and re.search(r"return \d+\.\d", err) and "320/320" in err and "1/1" in err


def test_the_bar_of_a_resumed_run_starts_where_the_run_stood(discrete, terminal, cli, checkpoints):
    path = copied(checkpoints["ppo_discrete"])
    _, _, err = cli(discrete, "--resume", path, "--total-timesteps", 128)
    assert re.search(r" 50%.*64\.0/128", err) and "128/128" in err


def test_progress_in_a_file_is_lines_of_text(script, cli):
    """One for each 5 %, and no bar; 40 iterations here, of which every other one has a line."""
    sizes = ["--num-steps", "4", "--total-timesteps", "320", "--eval-episodes", "0"]
    _, out, err = cli(script, *tiny(script.__name__, *sizes))
    assert "%" not in err and "\r" not in out + err
    lines = re.findall(r"^step (\d+) of 320: return (?:nan|-?\d+\.\d), \d+ steps/s$", out, re.M)
    assert list(map(int, lines)) == list(range(16, 321, 16)), out
    assert len(out.splitlines()) == 1 + 20 + 2


# --- --track ---


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for wandb; calls: the arguments of each init; events: the files there were then."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.calls, module.events = [], []

    def init(**kwargs):
        module.calls.append(kwargs)
        module.events.append(list(Path().rglob("events*")))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_track_starts_a_run_of_wandb(script, cli, wandb):
    """Before the first TensorBoard file is opened: wandb copies what is written to those opened later."""
    flags = ["--track", "--wandb-project-name", "mine", "--wandb-entity", "us", "--run-dir", "here/run"]
    code, _, err = cli(script, *tiny(script.__name__, *flags, "--eval-episodes", "0"))
    assert code == 0, err
    (call,), (events,) = wandb.calls, wandb.events
    assert (call["project"], call["entity"], call["name"]) == ("mine", "us", "run")
    assert call["sync_tensorboard"] is True and not events
    assert call["config"] == saved("here/run/checkpoint.pt")["args"]
    assert call["config"]["track"] is True and call["config"]["num_steps"] == 16


def test_track_leaves_the_entity_to_wandb_by_default(discrete, cli, wandb):
    assert cli(discrete, *tiny("ppo_discrete", "--track", "--eval-episodes", "0"))[0] == 0
    (call,) = wandb.calls
    assert not call["entity"] and call["project"] == discrete.Args().wandb_project_name


def test_wandb_is_left_alone_without_track(discrete, cli, wandb):
    assert cli(discrete, *tiny("ppo_discrete"))[0] == 0 and not wandb.calls
    cli(discrete, *tiny("ppo_discrete", "--track", "--run-dir", "run", "--eval-episodes", "0"))
    code, _, err = cli(discrete, "--evaluate", "run", "--eval-episodes", "1")
    assert code == 0 and len(wandb.calls) == 1, f"nor for an evaluation {err}"


# --- imports, process-wide settings ---


def test_importing_a_script_does_nothing_else():
    code = f"""
import os, random, signal, sys
import numpy, torch
state = lambda: (
    [signal.getsignal(s) for s in {list(map(int, HANDLERS))}], torch.get_num_threads(), os.listdir(),
    random.getstate(), numpy.random.get_state()[2], torch.get_rng_state().tolist(), sys.argv[:],
    torch.backends.cudnn.deterministic, torch.get_default_dtype(), os.environ.get("MUJOCO_GL"),
)
before = state()
import {", ".join(NAMES)}
assert state() == before
from ppo_atari import Args, train
assert Args().env_id and callable(train)
"""
    program = [sys.executable, "-c", code, "--no-such-flag"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
    assert not list(Path().iterdir())


def test_train_leaves_the_handlers_of_signals_alone(script):
    handlers = [signal.getsignal(s) for s in HANDLERS]
    script.train(tyro.cli(script.Args, args=tiny(script.__name__)))
    assert handlers == [signal.getsignal(s) for s in HANDLERS]


def test_train_sets_the_number_of_threads(script):
    """0 leaves what torch has chosen, or what was set before."""
    before, seen = torch.get_num_threads(), []
    try:
        for number in (2, 0, 1):
            argv = tiny(script.__name__, "--num-threads", str(number))
            look = lambda: seen.append(torch.get_num_threads()) or True  # noqa: E731
            script.train(tyro.cli(script.Args, args=argv), stop_requested=look)
    finally:
        torch.set_num_threads(before)
    assert seen == [2, 2, 1]


# --- flags ---


def test_help_explains_every_flag(script, cli):
    code, out, _ = cli(script, "--help")
    assert code == 0 and not list(Path().iterdir())
    blocks = re.split(r"\n(?=\W*--)", out)  # a flag, its type and what it does, over some lines
    for field in dataclasses.fields(script.Args):
        (block,) = [b for b in blocks if re.match(rf"\W*--{field.name.replace('_', '-')}[, ]", b)]
        text = re.sub(r"\(default:.*", "", block, flags=re.DOTALL)
        words = [
            x for x in text.split() if re.match(r"[a-z<(]\S*[a-z]", x, re.IGNORECASE) and not x.isupper()
        ]
        assert len(words) >= 2, block


CLEANRL = """exp_name seed torch_deterministic track wandb_project_name wandb_entity capture_video
env_id total_timesteps learning_rate num_envs num_steps anneal_lr gamma gae_lambda num_minibatches
update_epochs norm_adv clip_coef clip_vloss ent_coef vf_coef max_grad_norm target_kl"""
OURS = """device num_threads max_episode_steps run_dir save_every resume evaluate eval_episodes
deterministic objective kl_penalty_coef kl_penalty_target"""


def test_flags_have_cleanrls_names(script):
    fields = {field.name for field in dataclasses.fields(script.Args)}
    assert fields >= {*CLEANRL.split(), *OURS.split()}
    assert not fields & {"cuda", "batch_size", "minibatch_size", "num_iterations"}
    flags = "--no-anneal-lr --no-norm-adv --no-clip-vloss --no-torch-deterministic --target-kl 0.02 --seed 2"
    args = tyro.cli(script.Args, args=flags.split())
    assert not (args.anneal_lr or args.norm_adv or args.clip_vloss) and args.target_kl == 0.02
    assert tyro.cli(script.Args, args=["--total_timesteps", "7"]).total_timesteps == 7, "as CleanRL's take it"


def test_what_is_off_by_default(script):
    """Whatever is installed and however the file was started; 0 and the empty string are off."""
    args = tyro.cli(script.Args, args=[])
    assert args == script.Args()
    assert not (args.track or args.capture_video or args.deterministic)
    assert not (args.compile if script.__name__ in MLP else args.cuda_graphs)
    assert args.target_kl == 0 and args.max_episode_steps == 0 and args.wandb_entity == ""
    assert args.run_dir == args.resume == args.evaluate == ""


def test_a_copied_script_runs_from_another_folder(discrete, cli):
    """One file is enough: nothing is imported from its siblings. The original reads its runs."""
    Path("elsewhere").mkdir()
    Path("elsewhere/mine.py").write_text((SCRIPTS / "ppo_discrete.py").read_text())
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = [sys.executable, "elsewhere/mine.py", *TINY, "--exp-name", "mine", "--run-dir", "run"]
    done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0 and "elsewhere/mine.py --evaluate" in done.stdout, done.stderr
    assert cli(discrete, "--evaluate", "run")[0] == 0
