"""Minutes until a return is reached, by the scripts and by Stable-Baselines3 at the same hyperparameters.

    pip install -r benchmark/requirements.txt
    python benchmark/time_to_result.py                     # time_to_result.csv
    python benchmark/time_to_result.py --tasks cartpole --seeds 1 2 3 4 5
    python benchmark/time_to_result.py --tasks "gpu pong" --seeds 1 2 --jobs 2

The clock starts with the process, so that imports, compiling (from an empty cache) and the first steps count,
and stops with the first iteration after which the mean return of the last 100 training episodes is at least
the target. Programs have one thread each, eight beside a GPU, and as many of them run at once as there are
cores, or --jobs. The hyperparameters are the defaults of the script, and so is the length of the run, over
which the learning rate falls, if TASKS does not say otherwise; a run that ends before it has reached the
target has no minutes.

One setting is not the same: SB3 does not clip values here, as it does not by default. Its clipping is another
one, which does not take the larger of the two errors: a value that was moved far the wrong way then gets no
gradient.
"""

import csv
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

import speed

HERE = Path(__file__).resolve().parent
EPISODES = 100  # whose mean return counts


@dataclasses.dataclass
class Task:
    script: str
    target: float
    programs: tuple[str, ...] = ("eager", "compile", "sb3")
    flags: dict = dataclasses.field(default_factory=dict)  # that are not at their default


TASKS = {
    "cartpole": Task("ppo_discrete", 475),
    "halfcheetah": Task("ppo_continuous", 1500),
    "pong": Task(
        "ppo_atari", 0, ("eager", "sb3"), {"env_id": "PongNoFrameskip-v4", "total_timesteps": 2_000_000}
    ),
    "gpu pong": Task(  # the recipe pong-gpu
        "ppo_atari",
        0,
        ("graphs",),
        {
            "env_id": "PongNoFrameskip-v4",
            "total_timesteps": 2_200_000,
            "num_envs": 16,
            "num_minibatches": 8,
            "update_epochs": 3,
            "clip_coef": 0.2,
            "learning_rate": 5e-4,
            "cuda_graphs": True,
            "device": "cuda",
            "num_threads": 8,
        },
    ),
}


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = ("cartpole", "halfcheetah")  # pong takes an hour and more for each run
    seeds: tuple[int, ...] = (1, 2, 3)
    jobs: int = os.cpu_count() or 1  # runs at once


# ---------------------------------------- in a measured process ----------------------------------------


class Reached(Exception):  # noqa: N818 - it is good news
    """The target: the steps that it took, the mean return, and when."""

    def __init__(self, steps, mean_return):
        super().__init__(steps, mean_return)
        self.steps, self.mean_return, self.at = steps, float(mean_return), time.time()


def run_ours(task, flags):
    script = importlib.import_module(task.script)
    make_envs, write_log, made = script.make_envs, script.write_log, []

    def keep(*args):
        made.append(make_envs(*args))
        return made[-1]

    def watched(writer, bar, charts, losses, global_step):
        write_log(writer, bar, charts, losses, global_step)
        mean_return = charts.get("episodic_return", -math.inf)
        if len(made[-1].return_queue) == EPISODES and mean_return >= task.target:
            raise Reached(global_step, mean_return)

    script.make_envs = keep
    script.write_log = watched
    script.torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        script.train(script.Args(**flags, run_dir=folder))


def run_sb3(task, flags):
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    class Callback(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):  # after the update before it, where the scripts look, too
            episodes = self.model.ep_info_buffer
            if len(episodes) == EPISODES:
                mean_return = sum(episode["r"] for episode in episodes) / EPISODES
                if mean_return >= task.target:
                    raise Reached(self.num_timesteps, mean_return)

    torch.set_num_threads(1)
    args = types.SimpleNamespace(**flags | {"clip_vloss": False})
    speed.sb3_model(task.script, args).learn(args.total_timesteps, Callback())


def measure(job):
    sys.path.insert(0, str(HERE.parent))
    result = {"minutes": "", "steps": "", "return": ""}
    run = run_sb3 if job["program"] == "sb3" else run_ours
    try:
        run(TASKS[job["task"]], job["flags"])
    except Reached as reached:
        result["minutes"] = round((reached.at - job["born"]) / 60, 3)
        result["steps"], result["return"] = reached.steps, round(reached.mean_return, 1)
    print("\n" + json.dumps(result), flush=True)


# ---------------------------------------- in the parent ----------------------------------------


def execute(name, program, seed):
    task = TASKS[name]
    flags = {"device": "cpu", "num_threads": 1, "seed": seed} | task.flags
    if program == "compile":
        flags["compile"] = True
    if program == "sb3":
        flags = speed.defaults_of(task.script) | flags
    job = {"task": name, "program": program, "flags": flags}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, __file__, "--measure", json.dumps(job | {"born": time.time()})]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise RuntimeError(f"{name}, {program}, seed {seed}: {process.stderr[-2000:]}")
    row = {"task": name, "program": program, "seed": seed, "target": task.target}
    row |= json.loads(process.stdout.splitlines()[-1])
    made = {"commit": speed.commit_of(HERE.parent), "date": datetime.now(UTC).date().isoformat()}
    return row | speed.machine() | made


def save(row):
    """Put a row into time_to_result.csv, in place of one of the same task, program and seed."""
    path = HERE / "time_to_result.csv"

    def key(row):
        return (
            list(TASKS).index(row["task"]),
            TASKS[row["task"]].programs.index(row["program"]),
            int(row["seed"]),
        )

    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    rows = sorted([x for x in rows if key(x) != key(row)] + [row], key=key)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerows(rows)


def main():
    import tyro  # not above: it is not part of what is measured

    args = tyro.cli(Args)
    if any(name.startswith("gpu ") for name in args.tasks):
        importlib.import_module("torch")  # speed.machine() asks it for the name of the GPU
    jobs = []
    for name in args.tasks:
        programs = TASKS[name].programs
        for number, seed in enumerate(args.seeds):
            first = number % len(programs)  # another program comes first, and last, for each seed
            jobs += [(name, program, seed) for program in programs[first:] + programs[:first]]
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(execute, *job) for job in jobs]):
            if future.exception():
                failed.append(str(future.exception()))
                continue
            save(future.result())
            print(*list(future.result().values())[:7], flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:  # this file starts itself with it
        measure(json.loads(sys.argv[2]))
    else:
        main()
