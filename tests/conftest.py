"""What all tests share. They call the shipped functions; PPO_SCRIPTS=<folder> points them at another copy."""

import dataclasses
import functools
import importlib
import inspect
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import ale_py
import pytest
import stub_envs
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(os.environ.get("PPO_SCRIPTS", ROOT)).resolve()
NAMES = ("ppo_discrete", "ppo_continuous", "ppo_atari")
MLP = NAMES[:2]
# the scripts, and stub_envs for --env-id stub_envs:Name-v0; PYTHONPATH is for scripts started as programs
sys.path[:0] = [str(SCRIPTS), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
torch.set_num_threads(1)

REAL = {"ppo_discrete": "CartPole-v1", "ppo_continuous": "Pendulum-v1", "ppo_atari": "BreakoutNoFrameskip-v4"}
STUBS = {
    "ppo_discrete": "stub_envs:{}-v0",
    "ppo_continuous": "stub_envs:{}Box-v0",
    "ppo_atari": "PongNoFrameskip-v4",
}
GAMES = stub_envs.STORIES | {"Stateless": None}


# --- the scripts ---


@pytest.fixture(params=NAMES)
def script(request):
    """Each of the three scripts in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=MLP)
def mlp_script(request):
    """The two scripts whose observations are vectors."""
    return importlib.import_module(request.param)


@pytest.fixture(params=["ppo_discrete", "ppo_atari"])
def categorical_script(request):
    """The two scripts whose policies choose among a few actions."""
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


@pytest.fixture
def seeded():
    """For tests that draw numbers themselves."""
    torch.manual_seed(0)


# --- training in this process ---


def normalised(script):
    """The flags that a test of normalisation adds to those of `train`."""
    return {} if script.__name__ == "ppo_atari" else {"norm_obs": True, "norm_reward": True}


@pytest.fixture
def play(monkeypatch):
    """play(script, stub): the --env-id of a stub environment; a story takes the emulator's place."""

    def start(script, name):
        if script.__name__ == "ppo_atari":
            kind = type("Game", (stub_envs.FakeAtari,), {"story": GAMES[name]})
            monkeypatch.setattr(ale_py, "AtariVectorEnv", kind)
        return STUBS[script.__name__].format(name)

    return start


@pytest.fixture
def train(play):
    """train(script, environment, iterations, **flags): small, on the named stub or on a real environment.

    Observations and rewards stay raw unless a flag says otherwise: numbers can be predicted.
    """
    numbers = itertools.count()

    def start(script, env, iterations=1, stop_requested=lambda: False, **flags):
        env_id = play(script, env) if env in stub_envs.STUBS else env
        raw = dict.fromkeys(normalised(script), False)
        sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "device": "cpu"}
        flags = sizes | raw | {"run_dir": f"run{next(numbers)}"} | flags
        total = iterations * flags["num_envs"] * flags["num_steps"]
        args = script.Args(**{"env_id": env_id, "total_timesteps": total} | flags)
        return script.train(args, stop_requested)

    return start


def resume(script, result, stop_requested=lambda: False, **flags):
    """Go on with the flags of the first run, but those given."""
    args = script.load_checkpoint(result["run_dir"])["args"]
    return script.train(dataclasses.replace(args, resume=str(result["run_dir"]), **flags), stop_requested)


@pytest.fixture
def watch(monkeypatch):
    """watch(script): records of what its functions receive and return, by the name of the argument."""
    hooks = []

    def copy(x):
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    def start(script):
        seen = SimpleNamespace(gae=[], loss=[], acted=[], updated=[], steps=[])

        def spy(owner, name, record):
            real = getattr(owner, name)

            @functools.wraps(real)
            def spied(*args, **kwargs):
                call = inspect.signature(real).bind(*args, **kwargs)
                call.apply_defaults()
                arguments = {key: copy(x) for key, x in call.arguments.items()}
                output = real(*args, **kwargs)
                record(arguments, output)
                return output

            monkeypatch.setattr(owner, name, spied)

        def on_policy(arguments, output):
            (seen.acted if arguments["action"] is None else seen.updated).append(arguments["obs"])

        def on_loss(arguments, output):
            seen.loss.append(SimpleNamespace(**arguments, stats=dict(output[1])))

        def on_gae(arguments, output):
            seen.gae.append(SimpleNamespace(**arguments, advantages=copy(output[0]), returns=copy(output[1])))

        def on_step(optimizer, args, kwargs):
            group = optimizer.param_groups[0]
            grads = [p.grad.clone() for p in group["params"] if p.grad is not None]
            seen.steps.append(SimpleNamespace(lr=float(group["lr"]), grads=grads))

        def after_step(optimizer, args, kwargs):
            seen.steps[-1].params = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

        spy(script, "compute_gae", on_gae)
        spy(script, "ppo_loss", on_loss)
        spy(script.Agent, "get_action_and_value", on_policy)
        hooks.append(register_optimizer_step_pre_hook(on_step))
        hooks.append(register_optimizer_step_post_hook(after_step))
        return seen

    yield start
    for hook in hooks:
        hook.remove()


def scalars(result):
    """All that TensorBoard would show: {name: [value of each iteration]}."""
    # TensorBoard sorts files by name, and so those of one second wrongly: the tenth before the ninth
    files = sorted(result["run_dir"].glob("events.*"), key=lambda x: [*map(int, re.findall(r"\d+", x.name))])
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            shutil.copy(file, Path(folder, f"events.out.tfevents.{number:06}"))
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
    return {
        name: [x.value for x in sorted(events.Scalars(name), key=lambda x: x.step)]
        for name in events.Tags()["scalars"]
    }


def saved(path):
    """The contents of a checkpoint.pt."""
    return torch.load(path, weights_only=True)


def state(agent):
    return {key: x.clone() for key, x in agent.state_dict().items()}


def statistics(agent):
    """The running mean, var and count of observations."""
    return {name: getattr(agent, f"obs_{name}").clone() for name in ("mean", "var", "count")}


def plain(x):
    """The same with lists in place of tensors, so that == compares everything."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- the command line ---

# two iterations of 2 x 16 steps, one evaluated episode of at most 20 steps
TINY = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2", "--update-epochs", "1"]
TINY += ["--total-timesteps", "64", "--seed", "3", "--eval-episodes", "1", "--max-episode-steps", "20"]
TINY += ["--device", "cpu"]
PENDULUM = ["--env-id", "Pendulum-v1"]
HANDLERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def tiny(name, *more):
    """The arguments of a tiny run."""
    return [*TINY, *(PENDULUM if name == "ppo_continuous" else []), *more]


def default_signals():
    """For processes: whoever started pytest may have told it to ignore some, as nohup does."""
    for number in HANDLERS:
        signal.signal(number, signal.SIG_DFL)


def commands(out):
    """The argument lists of the commands `python script ...` in a printed text."""
    return [shlex.split(line)[2:] for line in re.findall(r"python \S+\.py .*", out)]


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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{name of a script: checkpoint.pt of a tiny run of it}. To be read; see copied()."""
    paths = {}
    for name in NAMES:
        script, run_dir = importlib.import_module(name), tmp_path_factory.mktemp(name) / "run"
        script.train(tyro.cli(script.Args, args=tiny(name, "--run-dir", str(run_dir))))
        paths[name] = run_dir / "checkpoint.pt"
    return paths


def copied(path):
    """The checkpoint, in a directory of the test's own."""
    return Path(shutil.copy(path, "checkpoint.pt")).resolve()
