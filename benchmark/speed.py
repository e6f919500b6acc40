"""Steps per second of the scripts, of Stable-Baselines3 at the same hyperparameters, and of the machine.

    python benchmark/speed.py                         # all that this machine can do: speed.csv
    python benchmark/speed.py --tasks cartpole "growth cartpole" --rounds 20
    CLEANRL=cleanrl CLEANRL_PYTHON=venv/bin/python python benchmark/speed.py --tasks "cleanrl cartpole"

Each program is a process of its own (measured.py), with its own start and peak of memory, on the CPU but for
the tasks called gpu. After two iterations they take turns of some seconds, one at a time, so that whatever
else the machine does hits all of them. A program takes as many threads as it does by itself, if its flags do
not say otherwise. speed.toml lists tasks and programs, docs/speed.md explains them.
"""

import dataclasses
import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import tyro
from recipes import processor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def read_tasks():
    """{task: (script, {program: its flags, with those of the task})}."""
    known, tasks = tomllib.loads((HERE / "speed.toml").read_text()), {}
    for name, entry in known["tasks"].items():
        like = known["tasks"].get(entry.get("like"), entry)
        flags = like["flags"] | entry.get("flags", {})
        programs = {x: flags | own for x, own in known["programs"][entry["programs"]].items()}
        tasks[name] = (like["script"], programs)
    return tasks


def start(script, program, settings, run_dir):
    """A process with the program, past its warm-up."""
    flags = {"device": "cpu"} | settings | {"total_timesteps": 10**9, "run_dir": run_dir}
    job = {"script": script, "program": program, "born": time.time()}
    job["iterations"] = flags.pop("iterations")
    if program.startswith(("sb3", "cleanrl")):
        threads = {"num_threads": flags.get("num_threads", 0)}  # else their own choice, not the script's
        flags = dataclasses.asdict(importlib.import_module(script).Args(**flags)) | threads
    python = os.environ["CLEANRL_PYTHON"] if program.startswith("cleanrl") else sys.executable
    command = [python, str(HERE / "measured.py"), json.dumps(job | {"flags": flags})]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **pipes, text=True)
    read(process)
    return process


def read(process):
    """The times of its turn."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"it stopped; to see why: {shlex.join(process.args)}")


def turn(copies):
    """All of them at once; their work is done when the slowest one has ended."""
    for process in copies:
        print("go", file=process.stdin, flush=True)
    slowest = min(map(read, copies), key=lambda times: times["sps"])
    return slowest | {"sps": len(copies) * slowest["sps"]}


def take_turns(task, script, programs, rounds):
    """A row per round and program; each round starts with another program, so that a drift cancels."""
    rows, processes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for program, flags in programs.items():
            settings = flags.copy()
            runs = [f"{folder}/{program}-{i}" for i in range(settings.pop("copies", 1))]
            processes[program] = [start(script, program, settings, run_dir) for run_dir in runs]
        for number in range(rounds):
            order = [*programs][number % len(programs) :] + [*programs][: number % len(programs)]
            turns = {program: turn(processes[program]) for program in order}
            for program in programs:
                rows.append({"task": task, "program": program, "round": number + 1} | turns[program])
                print(*rows[-1].values(), flush=True)
        for process in itertools.chain(*processes.values()):
            process.stdin.close()
            process.wait()
    return pd.DataFrame(rows)


def made_with():
    """What numbers depend on."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "ppo_*.py"])
    packages = ("torch", "gymnasium", "ale-py", "mujoco", "numpy", "stable-baselines3")
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "versions": " ".join(f"{name}={version(name)}" for name in packages),
        "commit": commit.stdout.strip() + ("-changed" if changed.returncode else ""),
        "date": datetime.now(UTC).date().isoformat(),
    }


def save(rows):
    """Put rows into speed.csv, in place of older ones of their task."""
    path = HERE / "speed.csv"
    old = pd.read_csv(path, dtype=str, keep_default_na=False)
    new = rows.assign(**made_with()).astype(str)
    rows = pd.concat([old[~old["task"].isin(new["task"])], new]).fillna("")
    rows = rows.sort_values("task", key=lambda x: x.map([*read_tasks()].index), kind="stable")
    rows.to_csv(path, index=False, lineterminator="\r\n")


def main(tasks: tuple[str, ...] = (), rounds: int = 10):
    """Measure in rounds of turns.

    Args:
        tasks: such as `cartpole` or `growth cartpole`; none: all that this machine can do.
        rounds: of turns.
    """
    sys.path.append(str(ROOT))  # for the scripts
    os.environ.pop("OMP_NUM_THREADS", None)  # programs take the threads that they take by themselves
    measured = []
    able = {"gpu": torch.cuda.is_available(), "cleanrl": "CLEANRL" in os.environ}
    for task in tasks or [x for x in read_tasks() if able.get(x.split()[0], True)]:
        measured.append(take_turns(task, *read_tasks()[task], rounds))
        save(measured[-1])
    print(pd.concat(measured).groupby(["task", "program"], sort=False)["sps"].median().to_string())


if __name__ == "__main__":
    tyro.cli(main)
