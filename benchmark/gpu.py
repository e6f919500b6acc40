"""What only a GPU can tell, in at most twelve minutes on a bare machine: python benchmark/gpu.py

    1. pong       minutes until the last 100 games of Pong have a mean of 18, from the start of the process
    2. switch     --cuda-graphs against torch.compile(mode="reduce-overhead"): first iteration, time, losses
    3. step       where the time goes, with 8 and with 64 games: emulators, policy, update
    4. networks   the scripts for vectors on CPU and GPU: hidden sizes 64 to 1,024, 8 and 512 environments
    5. tests      python -m pytest -m gpu

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

CUDA = torch.cuda.is_available()
DEVICES = ("cpu", "cuda") if CUDA else ("cpu",)
ATARI = {"device": DEVICES[-1], "cuda_graphs": CUDA}


def iterations_of(flags, enough, mode=""):
    """ppo_atari.py until enough(rows). A row per iteration: step, seconds since the start, charts, losses."""
    rows, start, module = [], time.time(), importlib.import_module("ppo_atari")

    def write_log(writer, bar, charts, losses, global_step):
        rows.append({"step": global_step, "seconds": time.time() - start, **charts, **losses})

    module.write_log = write_log
    if mode:  # in place of captured(function, agent)
        module.captured = lambda function, agent: torch.compile(function, mode=mode)
        torch._dynamo.config.trace_autograd_ops = True
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(run_dir=f"{folder}/run", save_every=10**6, **ATARI | flags)
        module.train(args, stop_requested=lambda: enough(rows))
    return rows


def pong(small, born, seed):
    flags = {"env_id": "PongNoFrameskip-v4", "num_envs": 64, "learning_rate": 3e-4, "clip_coef": 0.2}
    flags |= {"total_timesteps": 2_000_000, "precision": "bf16" if CUDA else "fp32", "seed": seed}
    flags |= {"num_envs": 4, "num_steps": 32, "total_timesteps": 512} if small else {}

    def enough(rows):
        return time.time() - born > 170 or any(x.get("episodic_return", -21) >= 18 for x in rows[-1:])

    last = iterations_of(flags, enough)[-1]
    yield last | {"minutes": (time.time() - born) / 60}


def switch(small, born, mode):
    flags = {"num_steps": 8, "num_envs": 2, "total_timesteps": 48} if small else {"num_envs": 64}
    flags |= {"max_episode_steps": 200}
    rows = iterations_of(flags, lambda rows: len(rows) == 12 or time.time() - born > 70, mode)
    seconds = (rows[-1]["seconds"] - rows[1]["seconds"]) / max(len(rows) - 2, 1)
    yield {
        "first_iteration_s": rows[0]["seconds"],
        "seconds_per_iteration": seconds,
        "losses": [row["pg_loss"] for row in rows[:3]],
        "memory_mb": torch.cuda.max_memory_allocated() / 2**20,
    }


def step(small, born):
    for num_envs in (2,) if small else (8, 64):
        flags = ATARI | {"num_envs": num_envs, "iterations": 2} | ({"num_steps": 8} if small else {})
        programs = {"script": flags, "environments": flags}
        rows = take_turns(f"breakout {num_envs}", "ppo_atari", programs, 1 if small else 3)
        yield from rows.to_dict("records")


def networks(small, born):
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
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:])
    yield {"last": done.stdout.splitlines()[-1]}


# (part, limit in seconds, settings), in the order of what is worth most
JOBS = [(pong, 180, {"seed": 1}), (pong, 180, {"seed": 2})]
JOBS += [(switch, 40, {"mode": ""}), (switch, 80, {"mode": "reduce-overhead"})]
JOBS += [(step, 60, {}), (networks, 90, {}), (tests, 90, {})]


def work(part, settings, small, born, out):
    sys.path.append(str(ROOT))  # for the scripts
    machine = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "torch": torch.__version__}
    for row in part(small, born, **settings):
        line = json.dumps({"part": part.__name__} | settings | row | machine)
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
