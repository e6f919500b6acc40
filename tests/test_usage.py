"""The scripts as somebody at a terminal meets them: refusals, signals, summary, video, evaluation, --help."""

import dataclasses
import importlib
import importlib.util
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ale_py
import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import tyro
from conftest import NAMES, ROOT, SCRIPTS
from PIL import Image

MLP = ("ppo_discrete", "ppo_continuous")
# two iterations of 2 x 16 steps, one evaluated episode of at most 20 steps
TINY = (
    "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 1 --total-timesteps 64 --seed 3".split()
)
TINY += ["--eval-episodes", "1", "--max-episode-steps", "20"]
PENDULUM = ["--env-id", "Pendulum-v1"]
HANDLERS = (signal.SIGINT, signal.SIGTERM)


class ShortLong(gym.Env):
    """Episodes of 1 or of 20 steps at random, reward 100 per step; complains about actions out of bounds."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, space, render_mode=None):
        self.action_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.choice([1, 20])
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.left -= 1
        return np.ones(2, np.float32), 100.0, self.left == 0, False, {}


class Nudge(gym.Env):
    """Pays the action itself, so that returns show what was acted; 5 steps per episode."""

    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)

    def __init__(self, space, render_mode=None):
        self.action_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, x = 0, self.np_random.normal(size=1).astype(np.float32)
        return x, {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), float(np.sum(action)), self.t == 5, False, {}


class Pixels(ShortLong):
    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)


DISCRETE, BOX = gym.spaces.Discrete(2), gym.spaces.Box(-0.1, 0.1, (2,), np.float32)
for kind, space in {"Discrete": DISCRETE, "Box": BOX}.items():
    for stub in (ShortLong, Nudge, Pixels):
        gym.register(f"{stub.__name__}{kind}-v0", stub, kwargs={"space": space})


def stub_id(script, name):
    return name + ("Discrete-v0" if script.__name__ == "ppo_discrete" else "Box-v0")


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli(script, *argv) -> (exit code, stdout, stderr) of main(); process-wide settings are put back."""
    handlers, threads = [signal.getsignal(s) for s in HANDLERS], torch.get_num_threads()

    def call(script, *argv):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        code = 0
        try:
            script.main()
        except SystemExit as error:
            code = error.code
        out, err = capfd.readouterr()
        return code, out, err

    yield call
    for signum, handler in zip(HANDLERS, handlers, strict=True):
        signal.signal(signum, handler)
    torch.set_num_threads(threads)


@pytest.fixture
def no_training(monkeypatch):
    """A training that begins, instead of being refused, fails the test at once."""

    def begin(*args, **kwargs):
        raise AssertionError("training began")

    for name in NAMES:
        monkeypatch.setattr(importlib.import_module(name), "SummaryWriter", begin)


@pytest.fixture
def refused(cli, recwarn, no_training):
    """refused(script, argv, *words): exit code 2, one line on stderr with all the words, nothing written."""

    def call(script, argv, *words):
        before = {path: path.stat().st_size for path in Path().rglob("*")}
        code, out, err = cli(script, *argv)
        err = re.sub(r"A\.L\.E: .*\n\[Powered by Stella\]\n", "", err)  # once per process that loads ale_py
        assert code == 2, (code, out, err)
        assert err.count("\n") == 1 and err.endswith("\n") and not out, (out, err)
        for word in words:
            assert word in err, f"no {word!r} in {err!r}"
        assert before == {path: path.stat().st_size for path in Path().rglob("*")}
        noise = [w.message for w in recwarn if issubclass(w.category, UserWarning)]
        assert not noise, "a terminal would show these as well"
        return err

    return call


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name of a script: checkpoint.pt of a tiny run of it}."""
    paths = {}
    for name in NAMES:
        script, run_dir = importlib.import_module(name), tmp_path_factory.mktemp(name) / "run"
        script.train(tyro.cli(script.Args, args=tiny(name, "--run-dir", str(run_dir))))
        paths[name] = run_dir / "checkpoint.pt"
    return paths


def tiny(name, *more):
    return [*TINY, *(PENDULUM if name == "ppo_continuous" else []), *more]


def commands(out):
    """The argument lists of the commands `python script ...` in a printed text."""
    return [shlex.split(line)[2:] for line in re.findall(r"python \S+\.py .*", out)]


def saved(path):
    return torch.load(path, weights_only=True)


# --- bad input ---


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
def test_a_number_out_of_its_range_is_refused(script, refused, flag, value):
    refused(script, [flag, value], flag, str(float(value)) if "." in value else value)


@pytest.mark.parametrize("value", ["nan", "-21", "21"])
def test_a_standard_deviation_without_meaning_is_refused(continuous, refused, value):
    refused(continuous, ["--init-log-std", value], "--init-log-std", value)


@pytest.mark.parametrize("name", MLP)
@pytest.mark.parametrize("sizes", [["0"], ["64", "0"], ["-3"]])
def test_hidden_layers_of_no_units_are_refused(name, refused, sizes):
    refused(importlib.import_module(name), ["--hidden-sizes", *sizes], "--hidden-sizes", sizes[-1])


def test_sizes_that_do_not_divide_are_refused_with_the_numbers(script, refused):
    sizes = "--num-steps 10 --num-envs 3 --num-minibatches 7".split()
    refused(script, sizes, "--num-minibatches 7", "--num-steps 10", "--num-envs 3", "30")


ONES = "--num-steps 2 --num-envs 2 --num-minibatches 4 --total-timesteps 4 --eval-episodes 0".split()


def test_minibatches_of_one_have_no_std(script, refused):
    refused(script, tiny(script.__name__, *ONES), "--num-minibatches 4", "--no-norm-adv")


def test_minibatches_of_one_without_normalisation(script, cli):
    code, _, err = cli(script, *tiny(script.__name__, *ONES, "--no-norm-adv"))
    assert code == 0, err


def test_fewer_steps_than_one_iteration_are_refused_with_the_numbers(script, refused):
    sizes = "--num-steps 16 --num-envs 2 --num-minibatches 2 --total-timesteps 31".split()
    refused(script, sizes, "--total-timesteps", "32")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(script, refused, monkeypatch, device):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: False)
    refused(script, ["--device", device], f"--device {device}", "--device cpu")


@pytest.mark.parametrize("flag, package", [("--track", "wandb"), ("--capture-video", "moviepy")])
def test_a_missing_optional_package_is_named_with_its_pip_line(
    script, refused, monkeypatch, flag, package, checkpoints
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    refused(script, [flag], flag, f"pip install {package}")
    if package == "moviepy":
        path = copied(checkpoints[script.__name__])
        refused(script, ["--evaluate", path, flag], flag, f"pip install {package}")


def test_classic_control_draws_with_pygame(discrete, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    refused(discrete, tiny("ppo_discrete", "--capture-video"), "--capture-video", "pip install")


@pytest.mark.parametrize(
    "name, env_id, use",
    [
        ("ppo_discrete", "Pendulum-v1", "ppo_continuous.py"),
        ("ppo_discrete", "HalfCheetah-v5", "ppo_continuous.py"),
        ("ppo_continuous", "CartPole-v1", "ppo_discrete.py"),
        ("ppo_continuous", "Acrobot-v1", "ppo_discrete.py"),
        ("ppo_atari", "CartPole-v1", "ppo_discrete.py"),
        ("ppo_discrete", "stub_envs:BranchesFrom1-v0", "Discrete from 0"),
        ("ppo_discrete", "PixelsDiscrete-v0", "ppo_atari.py"),
        ("ppo_continuous", "PixelsBox-v0", "pixels"),
        ("ppo_continuous", "stub_envs:Bytes-v0", "not in a Box"),
        ("ppo_discrete", "BreakoutNoFrameskip-v4", "ppo_atari.py"),
        ("ppo_discrete", "ALE/Breakout-v5", "ppo_atari.py"),
        ("ppo_discrete", "CartPol-v1", "CartPole"),
        ("ppo_discrete", "CartPole-v7", "v1"),
        ("ppo_continuous", "HalfCheeta-v5", "HalfCheetah"),
        ("ppo_continuous", "HalfCheetah-v9", "v5"),
        ("ppo_discrete", "no_such_package:Env-v0", "no_such_package"),
        ("ppo_continuous", "no_such_package:Env-v0", "no_such_package"),
        ("ppo_discrete", "two words", "two words"),
        ("ppo_atari", "Breakout-v4", "BreakoutNoFrameskip-v4"),
        ("ppo_atari", "BreakoutDeterministic-v4", "BreakoutNoFrameskip-v4"),
        ("ppo_atari", "PongDeterministic-v4", "PongNoFrameskip-v4"),
        ("ppo_atari", "Pong-v4", "PongNoFrameskip-v4"),
        ("ppo_atari", "ALE/Pong", "ALE/Pong-v5"),
        ("ppo_atari", "SpaceInvaders-v0", "SpaceInvadersNoFrameskip-v4"),
        ("ppo_atari", "BrekoutNoFrameskip-v4", "BreakoutNoFrameskip-v4"),
        ("ppo_atari", "ALE/Brekout-v5", "ALE/Breakout-v5"),
        ("ppo_atari", "brekout", "breakout"),
    ],
)
def test_an_environment_that_is_unknown_or_not_for_this_script(name, env_id, use, refused):
    refused(importlib.import_module(name), ["--env-id", env_id], "--env-id", env_id, use)


@pytest.mark.parametrize("name", MLP)
def test_async_refuses_the_wrong_space_in_one_line_too(name, refused):
    env_id, use = [("CartPole-v1", "ppo_discrete.py"), ("Pendulum-v1", "ppo_continuous.py")][name == MLP[0]]
    script = importlib.import_module(name)
    refused(script, ["--env-id", env_id, "--vectorization", "async"], "--env-id", env_id, use)


class Payload:
    """Executed by an unpickler that trusts the file."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def bad_files(good):
    """{name: what a wrong path or file looks like}; written to the current folder."""
    Path("no_checkpoint_in_here").mkdir()
    Path("truncated.pt").write_bytes(good.read_bytes()[:-3000])
    Path("beginning.pt").write_bytes(good.read_bytes()[:100])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("learning_rate: 3e-4\n")
    torch.save({"actor.0.weight": torch.ones(2, 2)}, "state_dict.pt")
    torch.save([1, 2], "list.pt")
    torch.save(saved(good) | {"script": "ppo_other"}, "renamed.pt")
    torch.save({"script": saved(good)["script"]}, "incomplete.pt")
    torch.save(saved(good) | {"more": Payload()}, "payload.pt")
    Path("payload.pkl").write_bytes(pickle.dumps(Payload()))
    return ["missing.pt", *sorted(map(str, Path().iterdir()))]


def test_a_file_that_is_no_checkpoint_is_refused(script, refused, checkpoints):
    for path in bad_files(checkpoints[script.__name__]):
        for flag in ("--evaluate", "--resume"):
            refused(script, [flag, path], Path(path).name, flag)
        for function in (script.load_agent, script.evaluate, script.load_checkpoint):
            with pytest.raises(script.UsageError, match=Path(path).name):
                function(path)
        with pytest.raises(script.UsageError, match=Path(path).name):
            script.train(script.Args(resume=path))


def test_a_checkpoint_that_would_run_code_does_not(script, refused, checkpoints):
    torch.save(saved(checkpoints[script.__name__]) | {"more": Payload()}, "payload.pt")
    Path("payload.pkl").write_bytes(pickle.dumps(Payload(), protocol=2))
    for path in ("payload.pt", "payload.pkl"):
        refused(script, ["--evaluate", path], path)
        refused(script, ["--resume", path], path)
        assert not Path("executed").exists()
    torch.load("payload.pt", weights_only=False)
    assert Path("executed").exists(), "the file does carry code"


def test_a_checkpoint_of_an_older_version_is_refused_where_it_does_not_fit(discrete, refused, checkpoints):
    """As of one from before the statistics of observations belonged to the agent."""
    old = saved(checkpoints["ppo_discrete"])
    old["agent"] = {key: x for key, x in old["agent"].items() if not key.startswith("obs_")}
    torch.save(old, "old.pt")
    for flag in ("--resume", "--evaluate"):
        refused(discrete, [flag, "old.pt"], flag, "old.pt", "Missing key")


def test_a_checkpoint_of_an_older_version_goes_on_where_it_fits(script, cli, checkpoints):
    """With the defaults of the flags that it has never heard of."""
    old = saved(checkpoints[script.__name__])
    for name in ("objective", "kl_penalty_coef", "kl_penalty_target"):
        del old["args"][name]
    del old["kl_coef"]
    Path("old").mkdir()
    torch.save(old, "old/checkpoint.pt")
    steps = 2 * old["global_step"]
    assert cli(script, "--resume", "old", "--total-timesteps", str(steps), "--eval-episodes", "0")[0] in (
        0,
        None,
    )
    assert saved("old/checkpoint.pt")["global_step"] == steps


def test_a_checkpoint_of_another_script_is_refused_by_its_name(script, refused, checkpoints):
    for other in set(NAMES) - {script.__name__}:
        refused(script, ["--evaluate", checkpoints[other]], str(checkpoints[other]), f"{other}.py")
        refused(script, ["--resume", checkpoints[other].parent], f"{other}.py")


def test_evaluating_no_episodes_is_refused(script, refused, checkpoints):
    refused(script, ["--evaluate", checkpoints[script.__name__], "--eval-episodes", "0"], "--eval-episodes 0")


def test_a_run_dir_with_a_checkpoint_is_refused(script, refused, checkpoints):
    path = checkpoints[script.__name__]
    before = path.read_bytes()
    argv = tiny(script.__name__, "--run-dir", str(path.parent))
    refused(script, argv, f"--run-dir {path.parent}", f"--resume {path.parent}")
    assert path.read_bytes() == before


def test_a_run_dir_that_is_a_file_is_refused(script, refused):
    Path("file").write_text("precious")
    refused(script, tiny(script.__name__, "--run-dir", "file"), "--run-dir file")
    assert Path("file").read_text() == "precious"


@pytest.mark.parametrize("name, env_id", [("ppo_discrete", "Pendulum-v1"), ("ppo_continuous", "CartPole-v1")])
def test_a_video_of_a_wrong_environment_is_refused_before_its_folder_is_made(refused, name, env_id):
    message = refused(
        importlib.import_module(name), tiny(name, "--env-id", env_id, "--capture-video"), env_id, "acts in"
    )
    assert message.count("--env-id") == 1 and not list(Path().iterdir())


def test_resume_refuses_flags_that_cannot_change(script, refused, checkpoints):
    path, default = checkpoints[script.__name__], script.Args()
    more = ["--resume", path, "--total-timesteps", "128"]
    refused(script, [*more, "--gamma", "0.5"], "--gamma", "--resume")
    refused(script, [*more, "--num-steps", default.num_steps], "--num-steps", "--resume")
    refused(script, [*more, "--no-anneal-lr"], "--anneal-lr", "--resume")
    refused(script, [*more, "--run-dir", "elsewhere"], "--run-dir", "--resume")


FREE = """--save-every 7 --device cpu --num-threads 1 --no-compile --wandb-project-name x --wandb-entity y
--eval-episodes 3 --deterministic"""


def test_resume_takes_what_may_change_as_the_readme_lists_it(script, cli, checkpoints):
    path = copied(checkpoints[script.__name__])
    code, _, err = cli(script, "--resume", path, "--total-timesteps", "128", *FREE.split())
    assert code == 0, err
    args = saved(path)["args"]
    assert (args["save_every"], args["wandb_entity"], args["deterministic"]) == (7, "y", True)
    readme = (ROOT / "README.md").read_text()
    told = readme[readme.index("Only these may be given anew") :].partition("With `--anneal-lr`")[0]
    free = set(re.findall("--(?:no-)?([a-z-]+)", FREE))
    assert set(re.findall("--([a-z-]+)", told)) == free | {"total-timesteps", "track", "capture-video"}


def test_resume_of_a_finished_run_names_total_timesteps(script, refused, checkpoints):
    path = checkpoints[script.__name__]
    before = path.read_bytes()
    refused(script, ["--resume", path], "--total-timesteps")
    assert path.read_bytes() == before


@pytest.mark.parametrize("argv", ["--gamma abc", "--no-such-flag", "--device tpu", "--total-timesteps 1e6"])
def test_what_tyro_refuses_keeps_its_form_and_exits_with_2(script, cli, argv):
    code, out, err = cli(script, *argv.split())
    assert code == 2 and argv.split()[0] in err and "Traceback" not in err
    assert not list(Path().iterdir())


def test_in_process_bad_input_is_a_value_error_of_one_line(script, no_training):
    assert issubclass(script.UsageError, ValueError)
    with pytest.raises(ValueError, match="^--gamma 2[^\n]*$"):
        script.train(script.Args(gamma=2.0))
    with pytest.raises(ValueError, match="--eval-episodes"):
        script.evaluate("checkpoint.pt", num_episodes=0)
    with pytest.raises(ValueError, match="--env-id"):
        script.train(script.Args(env_id="NoSuchGame-v3"))
    assert not list(Path().iterdir())


def test_a_refusal_as_a_program_has_no_traceback():
    program = [sys.executable, SCRIPTS / "ppo_discrete.py", "--env-id", "Pendulum-v1"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(Path().iterdir())
    assert done.stderr.count("\n") == 1 and "--env-id Pendulum-v1" in done.stderr


@pytest.mark.parametrize("name, default", [("ppo_discrete", 0), ("ppo_continuous", 1), ("ppo_atari", 0)])
def test_only_the_program_compiles_by_default(name, default):
    """Where it pays within a default run; train(Args()) of those who import a script starts at once."""
    program = [sys.executable, SCRIPTS / f"{name}.py", *tiny(name, "--run-dir", "run")]
    script = importlib.import_module(name)
    for more, expected in ([], default and script.CAN_COMPILE), (["--no-compile"], False):
        subprocess.run([*program, *more], capture_output=True, check=True)
        assert saved("run/checkpoint.pt")["args"]["compile"] == bool(expected)
        shutil.rmtree("run")
    assert not script.Args().compile


# --- evaluation ---


def stub_checkpoint(script, env_id, **flags):
    """checkpoint.pt of one iteration on env_id."""
    sizes = dict(num_envs=2, num_steps=8, num_minibatches=1, update_epochs=1, total_timesteps=16)
    return script.train(script.Args(env_id=env_id, **sizes, **flags))["run_dir"] / "checkpoint.pt"


def lone_returns(seed, num_episodes):
    """Returns of num_episodes of ShortLong from one environment by itself."""
    env, returns = gym.make("ShortLongDiscrete-v0"), []
    env.reset(seed=seed)
    for _ in range(num_episodes):
        returns.append(100.0 * env.unwrapped.left)
        env.reset()
    return returns


@pytest.mark.parametrize("name", MLP)
@pytest.mark.parametrize("num_episodes", [1, 3, 10, 33])
def test_b35_evaluation_plays_fixed_shares_of_whole_episodes(name, num_episodes):
    """Environment i plays the episodes that it would play alone, however long the others' are."""
    script = importlib.import_module(name)
    returns = script.evaluate(stub_checkpoint(script, stub_id(script, "ShortLong")), num_episodes, seed=7)
    candidates = []  # whatever the number of environments, and whichever of them play one more
    for num_envs in range(1, num_episodes + 1):
        shares = [len(range(i, num_episodes, num_envs)) for i in range(num_envs)]
        for share in (shares, shares[::-1]):
            candidates.append(sorted(r for i in range(num_envs) for r in lone_returns(7 + i, share[i])))
    assert returns.shape == (num_episodes,) and sorted(returns) in candidates, "raw, and not the first to end"


@pytest.mark.parametrize("name", MLP)
def test_b35_the_mean_is_not_biased_to_short_episodes(name):
    """Half the episodes have 1 step, half 20: mean 1050; the first 400 to end would be short ones mostly."""
    script = importlib.import_module(name)
    returns = script.evaluate(stub_checkpoint(script, stub_id(script, "ShortLong")), 400, seed=1)
    assert set(returns) == {100.0, 2000.0} and abs(returns.mean() - 1050) < 3 * 950 / 400**0.5


def test_b35_actions_are_clipped_in_evaluation(continuous):
    """A standard deviation of 1 leaves bounds of 0.1 nine times in ten, and ShortLong complains."""
    path = stub_checkpoint(continuous, "NudgeBox-v0")
    returns = continuous.evaluate(path, 20)
    assert np.all(np.abs(returns) <= 5 * 2 * 0.1 + 1e-6) and len(set(returns)) > 1


@pytest.mark.parametrize("name", MLP)
def test_evaluation_repeats_with_its_seed(name):
    script = importlib.import_module(name)
    path = stub_checkpoint(script, stub_id(script, "Nudge"))
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    sampled = script.evaluate(path, 12, seed=5)
    assert np.array_equal(sampled, script.evaluate(path, 12, seed=5))
    assert not np.array_equal(sampled, script.evaluate(path, 12, seed=6))
    fixed = script.evaluate(path, 12, deterministic=True, seed=5)
    torch.rand(9)
    assert np.array_equal(fixed, script.evaluate(path, 12, deterministic=True, seed=5))
    assert len(set(sampled)) > 1 and not np.array_equal(fixed, sampled)
    assert path.read_bytes() == before and path.stat().st_mtime_ns == stamp, "the checkpoint is not touched"


def test_deterministic_actions_are_the_most_probable(discrete):
    """NudgeDiscrete pays the action: a policy that all but always picks 1 must score 5 in every episode."""
    path = stub_checkpoint(discrete, "NudgeDiscrete-v0")
    checkpoint = saved(path)
    weights = checkpoint["agent"]
    bias = next(weights[key] for key in weights if key.startswith("actor") and weights[key].shape == (2,))
    bias.copy_(torch.tensor([0.0, 0.8]))
    torch.save(checkpoint, path)
    assert np.all(discrete.evaluate(path, 20, deterministic=True) == 5)
    assert not np.all(discrete.evaluate(path, 20) == 5)


def test_the_cli_evaluates_what_evaluate_does(script, cli, checkpoints):
    path = checkpoints[script.__name__]
    code, out, _ = cli(script, "--evaluate", path, "--eval-episodes", 3, "--deterministic", "--seed", 4)
    again = cli(script, "--evaluate", path.parent, "--eval-episodes", 3, "--deterministic", "--seed", 4)
    first = out.splitlines()[0]
    assert code == 0 and re.search(r"mean .*\b3 deterministic \w+, 95 %", first)
    assert first == again[1].splitlines()[0], "a directory stands for the checkpoint in it"
    _, out, _ = cli(script, "--evaluate", path, "--eval-episodes", 1)
    assert "1 sampled" in out.splitlines()[0]


def test_b35_atari_evaluates_whole_games_and_raw_scores(atari, monkeypatch):
    """What evaluate returns against the emulator's own rewards, summed over all lives of MsPacman."""
    path = stub_checkpoint(atari, "MsPacmanNoFrameskip-v4", precision="fp32")
    steps = []

    class Spy(ale_py.AtariVectorEnv):
        def step(self, actions):
            result = super().step(actions)
            steps.append([np.array(x) for x in (result[1], result[2] | result[3], result[4]["lives"])])
            return result

    monkeypatch.setattr(ale_py, "AtariVectorEnv", Spy)
    returns = atari.evaluate(path, 2)
    rewards, dones, lives = (np.stack(x) for x in zip(*steps, strict=True))  # (T, N)
    scores = []
    for i, t in np.argwhere(dones.T):  # the last step of each whole game
        start = np.flatnonzero(dones[:t, i])[-1] + 1 if dones[:t, i].any() else 0
        scores.append(rewards[start : t + 1, i].sum())
        assert (np.diff(lives[start:t, i]) < 0).sum() >= 2, "a game is all of its lives"
    assert len(returns) == 2 and not Counter(returns.tolist()) - Counter(map(float, scores))
    assert min(returns) > 2 * np.count_nonzero(rewards), "points, not signs"


# --- video ---


def frames(folder):
    (path,) = folder.rglob("*.mp4")
    return imageio.imread(path, plugin="FFMPEG")


def assert_coloured_film(film, height, width, length):
    assert film.shape[1:] == (height, width, 3) and abs(len(film) - length) <= 1, film.shape
    assert np.ptp(film.astype(int), axis=0).max() > 50, "something moves"
    assert np.ptp(film.astype(int), axis=3).max() > 50, "not grey"


def copied(path):
    """The checkpoint, in a directory of the test's own."""
    return Path(shutil.copy(path, "checkpoint.pt")).resolve()


def test_video_of_cartpole(discrete, checkpoints):
    path = copied(checkpoints["ppo_discrete"])
    returns = discrete.evaluate(path, 3, capture_video=True)
    assert_coloured_film(frames(path.parent), 400, 600, returns[0])  # CartPole pays 1 per step
    assert np.array_equal(returns, discrete.evaluate(path, 3)), "the camera changes nothing"


def test_video_of_pendulum_by_the_flag(continuous, cli, checkpoints):
    path = copied(checkpoints["ppo_continuous"])
    code, out, err = cli(continuous, "--evaluate", path, "--eval-episodes", 1, "--capture-video")
    assert code == 0, (out, err)
    assert_coloured_film(frames(path.parent), 500, 500, 20)


def test_video_of_atari_has_full_size_and_colour(atari, checkpoints):
    path = copied(checkpoints["ppo_atari"])
    returns = atari.evaluate(path, 2, capture_video=True)
    assert_coloured_film(frames(path.parent), 210, 160, 20)
    assert np.array_equal(returns, atari.evaluate(path, 2))


def test_the_colour_frames_of_atari_show_the_game_that_is_played(atari, monkeypatch):
    """Step by step, the filmed picture is the one that the agent sees, but for its size and colour."""
    grey, colour = [], []

    class Spy(ale_py.AtariVectorEnv):
        def step(self, actions):
            result = super().step(actions)
            frame = result[0][0, -1].copy()  # of the first game, the newest
            (grey if frame.ndim == 2 else colour).append(frame)
            return result

    path = stub_checkpoint(atari, "BreakoutNoFrameskip-v4", max_episode_steps=60)
    monkeypatch.setattr(ale_py, "AtariVectorEnv", Spy)
    atari.evaluate(path, 3, capture_video=True)
    assert 50 <= len(colour) <= len(grey)
    for step, (seen, filmed) in enumerate(zip(grey, colour, strict=False)):
        filmed = Image.fromarray(filmed).convert("L").resize((84, 84), Image.Resampling.BOX)
        assert np.abs(np.asarray(filmed, float) - seen).mean() < 2, f"step {step}"


def test_video_of_mujoco_without_a_display():
    """With no MUJOCO_GL set: a film where the system has a GL library, else a refusal before training."""
    env = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    flags = [*TINY, "--env-id", "Hopper-v5", "--run-dir", "hopper", "--capture-video"]
    program = [sys.executable, SCRIPTS / "ppo_continuous.py", *flags]
    done = subprocess.run(program, capture_output=True, text=True, env=env)
    if done.returncode == 2:
        assert done.stderr.count("\n") == 1 and re.search("libegl1|libosmesa6", done.stderr), done.stderr
        assert not list(Path().iterdir())
    else:
        assert done.returncode == 0, done.stderr
        assert_coloured_film(frames(Path("hopper")), 480, 480, len(frames(Path("hopper"))))


# --- signals ---


@pytest.mark.parametrize(
    "name, signum, more",
    [
        ("ppo_discrete", signal.SIGINT, []),
        ("ppo_continuous", signal.SIGINT, ["--vectorization", "async"]),
        ("ppo_discrete", signal.SIGTERM, ["--vectorization", "async"]),
        ("ppo_atari", signal.SIGTERM, []),
    ],
)
def test_a_signal_ends_the_iteration_and_saves(name, signum, more, cli, monkeypatch):
    flags = tiny(name, "--total-timesteps", "100000000", "--save-every", "1000000", "--run-dir", "run", *more)
    program = [sys.executable, "-u", SCRIPTS / f"{name}.py", *flags]
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        start = process.stdout.readline()
        assert "iterations" in start, process.communicate()
        time.sleep(0.5)  # some iterations
        if signum == signal.SIGINT:  # as a terminal does: to the workers of async, too
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err and "Exception" not in err, err
    (resume,) = commands(out)
    assert "--resume" in resume and str(Path("run/checkpoint.pt")) in resume
    iteration = saved("run/checkpoint.pt")["iteration"]
    assert iteration >= 1 and saved("run/checkpoint.pt")["global_step"] == 32 * iteration

    script = importlib.import_module(name)
    train = script.train  # the command goes on; stop it after one iteration
    monkeypatch.setattr(script, "train", lambda *args: train(*args[:-1], [signum]))
    code, out, err = cli(script, *resume)
    assert code == 0 and saved("run/checkpoint.pt")["iteration"] == iteration + 1, err
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_a_signal_while_metrics_are_written_does_not_lose_the_iteration(script, monkeypatch):
    """One that comes after the decision to save and before the end of the loop's body."""
    received = []

    class Writer(script.SummaryWriter):
        def add_scalar(self, *args, **kwargs):
            received.append(signal.SIGINT)
            super().add_scalar(*args, **kwargs)

    monkeypatch.setattr(script, "SummaryWriter", Writer)
    flags = tiny(script.__name__, "--total-timesteps", "320", "--save-every", "1000")
    result = script.train(tyro.cli(script.Args, args=flags), received=received)
    assert received and result["global_step"] < 320
    assert saved(result["run_dir"] / "checkpoint.pt")["global_step"] == result["global_step"]


def test_a_second_signal_is_not_held_back(discrete, cli, monkeypatch):
    """After the first signal the second one ends the process, as ever."""
    seen = []

    def train(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        seen.extend([list(args[-1]), signal.getsignal(signal.SIGTERM)])
        return dict(episodic_return=0.0, global_step=0, run_dir=Path("run"), agent=None)

    monkeypatch.setattr(discrete, "train", train)
    code, out, _ = cli(discrete)
    assert seen == [[signal.SIGTERM], signal.SIG_DFL] and code == 143 and "--resume" in out


def test_signals_do_as_ever_during_the_final_evaluation(script, cli, monkeypatch, checkpoints):
    seen = []

    def evaluate(*args, **kwargs):
        seen.extend(signal.getsignal(signum) for signum in HANDLERS)
        return np.zeros(1)

    monkeypatch.setattr(script, "evaluate", evaluate)
    assert cli(script, *tiny(script.__name__))[0] == 0
    assert all(handler in (signal.SIG_DFL, signal.default_int_handler) for handler in seen) and len(seen) == 2


# --- start, summary, --resume ---


def test_a_run_ends_with_a_summary_whose_commands_work(script, cli):
    code, out, err = cli(script, *tiny(script.__name__, "--eval-episodes", "2"))
    assert code == 0, err
    (run_dir,) = Path("runs").iterdir()
    start = out.splitlines()[0]
    assert str(run_dir) in start and "2 iterations" in start and "64" in start
    assert re.search(r"mean .*\b2 sampled \w+, 95 % .*\d.*\d\n", out)
    assert str(run_dir / "checkpoint.pt") in out and f"tensorboard --logdir {run_dir}" in out
    assert {path.suffix for path in run_dir.iterdir()} >= {".pt"} and list(run_dir.glob("events*"))
    evaluate, resume = [tyro.cli(script.Args, args=command) for command in commands(out)]
    assert Path(evaluate.evaluate) == Path(resume.resume) == run_dir / "checkpoint.pt"
    assert evaluate.eval_episodes == 100 and resume.total_timesteps == 128
    for command in commands(out):
        code, out, err = cli(script, *command, "--eval-episodes", "1")
        assert code == 0, err
    assert list(run_dir.rglob("*.mp4")) and saved(run_dir / "checkpoint.pt")["global_step"] == 128
    assert list(Path("runs").iterdir()) == [run_dir]


def test_evaluate_names_the_same_next_steps_as_the_run_did(script, cli, monkeypatch):
    _, trained, _ = cli(script, *tiny(script.__name__, "--run-dir", "run"))
    for path in ("run/checkpoint.pt", "run"):
        _, evaluated, _ = cli(script, "--evaluate", path, "--eval-episodes", "1")
        assert re.search(r"--logdir run\b", evaluated), evaluated
        totals = [tyro.cli(script.Args, args=commands(x)[1]).total_timesteps for x in (trained, evaluated)]
        assert totals == [128, 128]


def test_the_start_line_says_what_rounding_leaves(script, cli):
    _, out, _ = cli(script, *tiny(script.__name__, "--total-timesteps", "95", "--eval-episodes", "0"))
    assert "64" in out.splitlines()[0] and "2 iterations" in out.splitlines()[0]


def test_no_evaluation_where_none_is_asked_for(script, cli, monkeypatch):
    monkeypatch.setattr(script, "evaluate", None)
    code, out, _ = cli(script, *tiny(script.__name__, "--eval-episodes", "0"))
    assert code == 0 and "95 %" not in out and len(commands(out)) == 2


def test_progress_is_one_bar(script, cli):
    """stdout has the start line and the summary; stderr one bar of training and one of evaluation."""
    _, out, err = cli(script, *tiny(script.__name__, "--total-timesteps", "320"))
    assert len(out.splitlines()) <= 7, out
    assert len([line for line in err.splitlines() if line.strip()]) <= len(re.findall(r"\d+%", err))
    assert "step/s" in err and "return" in err


def test_two_runs_never_share_a_directory(script, monkeypatch):
    """Not even when they start in the same second."""
    monkeypatch.setattr(time, "strftime", lambda *args: "20000101-000000")
    args = tyro.cli(script.Args, args=tiny(script.__name__, "--total-timesteps", "32"))
    first = script.train(args)["run_dir"]
    before = (first / "checkpoint.pt").read_bytes()
    try:
        assert script.train(args)["run_dir"] != first
    except script.UsageError as error:
        assert "--run-dir" in str(error)
    assert (first / "checkpoint.pt").read_bytes() == before


def test_resume_overrides_what_was_typed_and_nothing_else(script, cli, monkeypatch, checkpoints):
    """--total-timesteps with its default value counts as typed; --num-steps 16 is not typed and stays."""
    calls = []

    class Stop(Exception):
        pass

    def make_envs(args, *rest):
        calls.append(args)
        raise Stop

    monkeypatch.setattr(script, "make_envs", make_envs)
    path, default = checkpoints[script.__name__], script.Args().total_timesteps
    with pytest.raises(Stop):
        cli(script, "--resume", path, "--total-timesteps", default, "--eval-episodes", 10)
    before = saved(path)["args"]
    changed = {key: value for key, value in vars(calls[0]).items() if value != before[key]}
    changed.pop("resume", None)
    assert changed == {"total_timesteps": default, "eval_episodes": 10}


def test_resume_goes_on_in_the_same_directory(script, cli):
    code, *_ = cli(script, *tiny(script.__name__, "--run-dir", "run"))
    code, out, err = cli(script, "--resume", "run", "--total-timesteps", "128", "--save-every", "1")
    assert code == 0, err
    checkpoint = saved("run/checkpoint.pt")
    assert checkpoint["global_step"] == 128 and checkpoint["args"]["save_every"] == 1
    assert checkpoint["args"]["num_steps"] == 16 and checkpoint["args"]["total_timesteps"] == 128
    assert "4 iterations" in out and [path.name for path in Path().iterdir()] == ["run"]


# --- import, --help ---


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
    done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr
    assert not list(Path().iterdir())


def test_train_leaves_process_wide_settings_to_main(script):
    handlers, threads = [signal.getsignal(s) for s in HANDLERS], torch.get_num_threads()
    script.train(tyro.cli(script.Args, args=tiny(script.__name__, "--num-threads", "2")))
    assert handlers == [signal.getsignal(s) for s in HANDLERS] and threads == torch.get_num_threads()


def test_help_explains_every_flag(script, cli):
    code, out, err = cli(script, "--help")
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
update_epochs norm_adv clip_coef clip_vloss ent_coef vf_coef max_grad_norm target_kl""".split()
OURS = "device num_threads max_episode_steps run_dir save_every resume evaluate".split()
OURS += ["eval_episodes", "deterministic"]


def test_flags_have_cleanrls_names(script):
    fields = {field.name for field in dataclasses.fields(script.Args)}
    assert fields >= {*CLEANRL, *OURS} and not fields & {
        "cuda",
        "batch_size",
        "minibatch_size",
        "num_iterations",
    }
    flags = "--no-anneal-lr --no-norm-adv --no-clip-vloss --no-torch-deterministic --target-kl 0.02 --seed 2"
    args = tyro.cli(script.Args, args=flags.split())
    assert not (args.anneal_lr or args.norm_adv or args.clip_vloss) and args.target_kl == 0.02
    assert tyro.cli(script.Args, args=["--total_timesteps", "7"]).total_timesteps == 7, "as CleanRL's take it"


def test_a_copied_script_runs_from_another_folder():
    """One file is enough: nothing is imported from its siblings."""
    Path("elsewhere").mkdir()
    Path("elsewhere/mine.py").write_text((SCRIPTS / "ppo_discrete.py").read_text())
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    program = [sys.executable, "elsewhere/mine.py", *TINY]
    done = subprocess.run(program, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "elsewhere/mine.py --evaluate" in done.stdout, done.stderr
