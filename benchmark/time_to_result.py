"""Minutes until a return is reached, by the scripts and by Stable-Baselines3 at the same hyperparameters.

    pip install -r benchmark/requirements.txt
    python benchmark/time_to_result.py                     # time_to_result.csv
    python benchmark/time_to_result.py --tasks cartpole --seeds 1 2 3 4 5

The clock starts with the process, so that imports, compiling and the first steps count, and stops with the
first iteration after which the mean of the last 100 training episodes is at least the target. Programs have
one thread each, and as many of them run at once as there are cores. The hyperparameters are the defaults of
the script, also the length of the run, over which the learning rate falls; a run that ends before it has
reached the target has no minutes.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import speed

HERE = Path(__file__).resolve().parent
OURS, COMPILED, SB3 = "eager", "compile", "sb3"


@dataclasses.dataclass
class Task:
    script: str
    target: float
    programs: tuple[str, ...] = (OURS, COMPILED, SB3)
    flags: dict = dataclasses.field(default_factory=dict)  # that are not at their default


TASKS = {
    "cartpole": Task("ppo_discrete", 475),
    "halfcheetah": Task("ppo_continuous", 1500),
    "pong": Task("ppo_atari", 0, (OURS, SB3), {"env_id": "PongNoFrameskip-v4", "total_timesteps": 2_000_000}),
}


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = ("cartpole", "halfcheetah")  # pong takes an hour and more for each run
    seeds: tuple[int, ...] = (1, 2, 3)
    jobs: int = os.cpu_count() or 1  # runs at once


# ---------------------------------------- in a measured process ----------------------------------------


class Reached(Exception):  # noqa: N818 - it is good news
    """The target, with the steps that it took and the mean return."""


def run_ours(task, flags):
    script = importlib.import_module(task.script)
    write_log = script.write_log

    def watched(writer, bar, charts, losses, envs, global_step, steps):
        mean_return = write_log(writer, bar, charts, losses, envs, global_step, steps)
        if len(envs.return_queue) == 100 and mean_return >= task.target:
            raise Reached(global_step, mean_return)
        return mean_return

    script.write_log = watched
    script.torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        script.train(script.Args(**flags, num_threads=1, run_dir=folder))


def run_sb3(task, flags):
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    args = types.SimpleNamespace(**speed.defaults_of(task.script) | flags)

    class Callback(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):  # after the update before it, where the scripts look, too
            episodes = self.model.ep_info_buffer
            if len(episodes) == 100:
                mean_return = sum(episode["r"] for episode in episodes) / 100
                if mean_return >= task.target:
                    raise Reached(self.num_timesteps, mean_return)

    model = speed.sb3_model(task.script, args)
    model.learn(args.total_timesteps, Callback())


def measure(job):
    sys.path.insert(0, str(HERE.parent))
    task, flags = TASKS[job["task"]], job["flags"]
    result = {"minutes": "", "steps": "", "return": ""}
    try:
        if job["program"] == SB3:
            run_sb3(task, flags)
        else:
            run_ours(task, flags | ({"compile": True} if job["program"] == COMPILED else {}))
    except Reached as reached:
        steps, mean_return = reached.args
        minutes = (time.time() - job["born"]) / 60
        result = {"minutes": round(minutes, 3), "steps": steps, "return": round(float(mean_return), 1)}
    print("\n" + json.dumps(result), flush=True)


# ---------------------------------------- in the parent ----------------------------------------


def execute(task, program, seed):
    flags = {"device": "cpu", "seed": seed} | TASKS[task].flags
    job = {"task": task, "program": program, "flags": flags, "born": time.time()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode != 0:
        raise SystemExit(f"{task}, {program}, seed {seed}: {process.stderr}")
    row = {"task": task, "program": program, "seed": seed, "target": TASKS[task].target}
    row |= json.loads(process.stdout.splitlines()[-1])
    print(*row.values(), flush=True)
    return row


def main():
    import tyro  # not above: it is not part of what is measured

    args = tyro.cli(Args)
    for task in args.tasks:
        jobs = [(task, program, seed) for seed in args.seeds for program in TASKS[task].programs]
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(lambda job: execute(*job), jobs))
        speed.save("time_to_result.csv", rows, list(TASKS))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:  # this file starts itself with it
        measure(json.loads(sys.argv[2]))
    else:
        main()
