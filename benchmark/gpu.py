"""What only a GPU can tell, in at most twelve minutes on a bare machine: python benchmark/gpu.py

Each part is a process of its own with a limit, and appends lines of JSON to --out as it goes, so that an
early end loses nothing. --small tries all of it on any machine, where the numbers mean nothing.
"""

import importlib
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time

import torch
import tyro
from speed import ROOT, take_turns

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
MACHINE = {"device": torch.cuda.get_device_name() if len(DEVICES) > 1 else "cpu", "torch": torch.__version__}
ATARI = {"device": DEVICES[-1], "cuda_graphs": len(DEVICES) > 1}
SMALL = {"num_envs": 2, "num_steps": 8, "total_timesteps": 48}


def train(flags, enough, mode=""):
    """ppo_atari.py until enough(rows). A row per iteration: step, minutes, charts, losses."""
    rows, start, module = [], time.time(), importlib.import_module("ppo_atari")

    def write_log(writer, bar, charts, losses, global_step):
        numbers = {name: float(x) for name, x in (charts | losses).items()}
        rows.append({"step": global_step, "minutes": (time.time() - start) / 60} | numbers)

    module.write_log = write_log
    if mode:  # in place of captured(function, agent)
        module.captured = lambda function, agent: torch.compile(function, mode=mode)
        torch._dynamo.config.trace_autograd_ops = True
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(run_dir=f"{folder}/run", save_every=10**6, **ATARI | flags)
        module.train(args, stop_requested=lambda: enough(rows))
    return rows


def pong(small, born, seed):
    """Minutes until the last 100 games have a mean of 18, from the start of the process."""
    flags = {"env_id": "PongNoFrameskip-v4", "num_envs": 64, "learning_rate": 3e-4, "clip_coef": 0.2}
    flags |= {"total_timesteps": 2_000_000, "seed": seed} | (SMALL if small else {"precision": "bf16"})

    def enough(rows):
        return time.time() - born > 170 or any(x.get("episodic_return", -21) >= 18 for x in rows[-1:])

    yield train(flags, enough)[-1] | {"minutes": (time.time() - born) / 60}


def switch(small, born, mode):
    """--cuda-graphs or torch.compile in a mode: losses of the first iterations, time of the last."""
    flags = {"num_envs": 64, "max_episode_steps": 200} | (SMALL if small else {})
    rows = train(flags, lambda rows: len(rows) == 12 or time.time() - born > 70, mode)
    yield from rows[:3] + rows[-1:]


def step(small, born):
    """Where the time goes, with 8 and with 64 games: emulators, policy, update."""
    for num_envs in (8, 64):
        flags = ATARI | {"num_envs": num_envs, "iterations": 2} | (SMALL if small else {})
        programs = {"script": flags, "environments": flags}
        yield from take_turns(f"breakout {num_envs}", "ppo_atari", programs, 3).to_dict("records")


def networks(small, born):
    """The scripts for vectors on CPU and GPU: hidden sizes 64 to 1,024, 8 and 512 environments."""
    tasks = (("ppo_discrete", "CartPole-v1"), ("ppo_continuous", "Pendulum-v1"))
    for (script, env_id), num_envs in itertools.product(tasks, (8,) if small else (8, 512)):
        flags = {
            "env_id": env_id,
            "num_envs": num_envs,
            "num_steps": 64,
            "num_minibatches": 4,
            "iterations": 2,
        }
        sizes = itertools.product((64,) if small else (64, 256, 1024), DEVICES)
        programs = {f"{x} on {on}": flags | {"hidden_sizes": (x, x), "device": on} for x, on in sizes}
        yield from take_turns(f"{env_id} {num_envs}", script, programs, 1).to_dict("records")


def tests(small, born):
    """Those that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    yield {"last": done.stdout.splitlines()[-1]}


# (part, limit in seconds, settings), in the order of what is worth most
JOBS = [(pong, 180, {"seed": 1}), (pong, 180, {"seed": 2})]
JOBS += [(switch, 40, {"mode": ""}), (switch, 80, {"mode": "reduce-overhead"})]
JOBS += [(step, 60, {}), (networks, 90, {}), (tests, 90, {})]


def work(part, settings, small, born, out):
    sys.path.append(str(ROOT))  # for the scripts
    for row in part(small, born, **settings):
        line = json.dumps({"part": part.__name__} | settings | row | MACHINE)
        print(line, flush=True)
        with open(out, "a") as file:
            print(line, file=file)


def main(out: str = "gpu.jsonl", small: bool = False):
    for part, limit, settings in JOBS:
        arguments = (part, settings, small, time.time(), out)
        process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        process.start()
        process.join(limit)
        process.kill()


if __name__ == "__main__":
    tyro.cli(main)
