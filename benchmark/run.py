"""Train the recipes of recipes.toml, evaluate them, and add a row per run to results.csv.

    python benchmark/run.py cartpole halfcheetah        # recipes, or groups such as `classic`; none: all
    python benchmark/run.py classic --list              # what is done, and what is left
    python benchmark/plots.py && python benchmark/update_docs.py

As many runs go on at once as there are cores, with one thread each, or --jobs of them with --threads each.
A run that has its row is left alone; one that was interrupted goes on from its checkpoint; --again runs what
has a row once more and replaces the row. ppo_atari.py takes a GPU where torch finds one. Each run trains a
copy of its script, and applies its patch, as of the present commit, so that both may be edited meanwhile. Its
directory is benchmark/runs/<recipe>-<seed>, with all that it printed in log.txt. benchmark/README.md explains
the columns of results.csv.
"""

import importlib
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import pandas as pd
import torch
import tyro
from filelock import FileLock, Timeout
from recipes import DRAWN, losses_of, patch_of, processor, read_numerics, read_recipes, same_losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = HERE / "runs"
MOST_POINTS = 60  # of a curve in curves.csv


class Run(NamedTuple):
    recipe: str
    script: str  # without .py
    env_id: str
    flags: str
    patch: str  # of ablations/ or variants/, or empty
    seed: int
    commit: str
    threads: int = 1


def git(*command):
    """What a git command prints; bytes of files stay as they are."""
    return subprocess.run(["git", *command], cwd=ROOT, check=True, capture_output=True).stdout


def machine(run):
    """Columns of results.csv: what trains. hardware is, for instance, `AMD EPYC, 1 of 2 cores`."""
    hardware = f"{processor()}, {run.threads} of {os.cpu_count()} cores"
    if run.script == "ppo_atari" and torch.cuda.is_available():  # the others stay on the CPU by default
        hardware += f", {torch.cuda.get_device_name()}"
    return {
        "threads": run.threads,
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "python": platform.python_version(),
        "hardware": hardware,
    }


def note_commit(scripts, commit):
    """Put commit on the list of those whose rows have the present numerics."""
    numerics = read_numerics()
    with tempfile.TemporaryDirectory() as folder:  # for the scripts of that commit: they may be edited since
        sys.path.insert(0, folder)
        for script in scripts:
            Path(folder, f"{script}.py").write_bytes(git("show", f"{commit}:{script}.py"))
            losses = losses_of(script)
            known = numerics.setdefault(script, {"losses": losses, "commits": []})
            if not same_losses(losses, known["losses"]):
                sys.exit(f"error: other losses than numerics.json has; if you meant it, delete its {script}")
            known["commits"] = sorted({*known["commits"], commit})
        sys.path.remove(folder)
    (HERE / "numerics.json").write_text(json.dumps(numerics, indent=1, sort_keys=True) + "\n")


def execute(run):
    """Train (or go on), evaluate, and return a row of results.csv and the rows of curves.csv."""
    run_dir, script = set_up(run)
    train(run, run_dir, script)
    return describe(run, run_dir, script)


def set_up(run):
    """The directory of the run, with a copy of its script as of the commit, patched."""
    run_dir = RUNS / f"{run.recipe}-{run.seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    script = run_dir / f"{run.script}.py"
    what = " ".join(x for x in (run.env_id, run.flags, run.patch) if x)
    if not (run_dir / "recipe").exists():
        original = git("show", f"{run.commit}:{script.name}")
        script.write_bytes(original)
        if run.patch:
            # outside of a repository, as it were: inside of one, git takes paths from its top
            alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(RUNS)}
            patch = git("show", f"{run.commit}:{patch_of(run.script, run.patch)}")
            subprocess.run(["git", "apply"], input=patch, cwd=run_dir, env=alone, check=True)
            assert script.read_bytes() != original, f"the patch {run.patch} changed nothing"
        (run_dir / "commit").write_text(run.commit)
        (run_dir / "recipe").write_text(what)  # last: where it is, all has been done
    made_for = (run_dir / "recipe").read_text().strip()
    assert made_for == what, f"{run_dir} is of another recipe, {made_for}: remove it"
    return run_dir, script


def train(run, run_dir, script):
    checkpoint = run_dir / "checkpoint.pt"
    command = [sys.executable, script.name]
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        batch = saved["args"]["num_steps"] * saved["args"]["num_envs"]
        if saved["global_step"] + batch > saved["args"]["total_timesteps"]:
            return
        command += ["--resume", "."]
    else:
        command += ["--env-id", run.env_id, *shlex.split(run.flags)]
        command += ["--seed", str(run.seed), "--run-dir", "."]
        (run_dir / "machine.json").write_text(json.dumps(machine(run)))
    with (run_dir / "log.txt").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(run.threads), "TQDM_MININTERVAL": "60"}
        environment["PYTHONPATH"] = str(ROOT)  # for variants/tasks.py
        command += ["--num-threads", str(run.threads), "--eval-episodes", "0"]
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        subprocess.run(command, cwd=run_dir, env=environment, check=True, **output)


def describe(run, run_dir, script):
    sys.path[:0] = [str(run_dir), str(ROOT)]
    module = importlib.import_module(run.script)
    assert Path(module.__file__) == script, f"{module.__file__} is not the script that was run"
    torch.set_num_threads(1)
    returns = {}
    for kind in ("sampled", "deterministic"):
        path = run_dir / f"{kind}.json"  # hours of long games are not lost when this is interrupted
        if not path.exists():
            how = {"num_episodes": read_recipes()[run.recipe]["episodes"], "seed": 1_000_000 + run.seed}
            with (run_dir / "log.txt").open("a") as log, redirect_stderr(log):  # the progress bars
                played = module.evaluate(run_dir, deterministic=kind == "deterministic", **how)
            path.write_text(json.dumps(played.tolist()))
        returns[kind] = json.loads(path.read_text())

    points, seconds = [], 0.0
    for file in sorted(run_dir.glob("events.out.tfevents.*")):  # one per start of the script
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        scalars = events.Tags()["scalars"]
        if "charts/episodic_return" in scalars:
            points = [x for x in points if x.step < events.Scalars("charts/episodic_return")[0].step]
            points += events.Scalars("charts/episodic_return")
        if "charts/SPS" in scalars:
            seconds += events.Scalars("charts/SPS")[-1].wall_time - events.FirstEventTimestamp()
    steps = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["global_step"]
    row = {name: getattr(run, name) for name in ("recipe", "script", "env_id", "flags", "seed")}
    row |= {"steps": steps, "episodic_return": round(points[-1].value, 2) if points else ""}
    for kind, played in returns.items():
        row[f"eval_{kind}"] = round(float(np.mean(played)), 2)
        row[f"eval_{kind}_std"] = round(float(np.std(played, ddof=1)), 2)
    row |= {"wall_s": round(seconds), "sps": round(steps / seconds)}
    row |= {"commit": (run_dir / "commit").read_text(), "date": datetime.now(UTC).date().isoformat()}
    row |= json.loads((run_dir / "machine.json").read_text())
    every = -(-len(points) // MOST_POINTS)
    curve = [
        {"recipe": run.recipe, "seed": run.seed, "step": x.step, "return": round(x.value, 2)}
        for x in points[::-every][::-1]  # counted from the end, so that the last point is among them
    ]
    return row, curve


def merge(path, new_rows):
    """Put new_rows into a CSV file, in place of those of the same recipe and seed."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    new = pd.DataFrame(new_rows).astype(str)
    keys = ["recipe", "seed"]
    kept = rows[~rows.set_index(keys).index.isin(new.set_index(keys).index)]
    rows = pd.concat([kept, new]).fillna("")
    order = [*keys, "step"] if "step" in rows else keys
    rows = rows.sort_values(order, key=lambda x: x if x.name == "recipe" else x.astype(int))
    temporary = path.with_suffix(".tmp")  # an interrupted write must not cost the rows of days
    rows.to_csv(temporary, index=False, lineterminator="\r\n")
    temporary.replace(path)


def choose(names, recipes):
    """The recipes that names mean, each a recipe or a group; none means all."""
    groups = {entry["group"] for entry in recipes.values()}
    unknown = set(names) - groups - set(recipes)
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))}: neither a recipe nor a group of recipes.toml")
    return {name: x for name, x in recipes.items() if not names or {name, x["group"]} & set(names)}


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    seeds: tuple[int, ...] = (),
    jobs: int = os.cpu_count() or 1,
    threads: int = 1,
    again: bool = False,
    list: bool = False,
):
    """Run what has no row yet.

    Args:
        names: recipes or groups of recipes.toml; none: all.
        seeds: instead of those of the table.
        jobs: runs at once.
        threads: of each run, for torch and for the emulators of Atari.
        again: also what has a row, from the beginning.
        list: only say what is done and what is left.
    """
    commit = git("rev-parse", "--short", "HEAD").decode().strip()
    done = set(pd.read_csv(HERE / "results.csv", index_col=["recipe", "seed"]).index)
    todo = []
    for name, entry in choose(names, read_recipes()).items():
        for seed in seeds or entry["seeds"]:
            finished = (name, seed) in done
            if list:
                command = f"{entry['script']}.py --env-id {entry['env_id']} {entry['flags']}"
                print("done " if finished else "to do", f"{name}-{seed}: {command}")
            if finished and not again:
                continue
            fields = {key: entry[key] for key in ("script", "env_id", "flags", "patch")}
            todo.append(Run(recipe=name, seed=seed, commit=commit, threads=threads, **fields))
    if list or not todo:
        print(f"{len(todo)} runs to do")
        return
    RUNS.mkdir(exist_ok=True)
    alone = FileLock(RUNS / ".lock", blocking=False)  # the system opens it when the process ends
    try:
        alone.acquire()
    except Timeout:
        sys.exit("error: another run.py is at work here, wait for it")
    todo.sort(key=lambda run: run.seed)  # first one seed of everything, so that a gap shows early
    if again:
        for run in todo:
            shutil.rmtree(RUNS / f"{run.recipe}-{run.seed}", ignore_errors=True)

    note_commit(sorted({run.script for run in todo}), commit)
    failed = []
    start = time.time()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(execute, run): run for run in todo}
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                row, curve = future.result()
            except Exception as error:  # one run that fails leaves the others alone
                failed.append(f"{run.recipe}-{run.seed}: {error}")
                print(f"failed, see benchmark/runs/{run.recipe}-{run.seed}/log.txt: {error}", flush=True)
                continue
            merge(HERE / "results.csv", [row])
            if curve and read_recipes()[run.recipe]["group"] in DRAWN:
                merge(HERE / "curves.csv", curve)
            minutes = (time.time() - start) / 60
            returns = f"training {row['episodic_return']}, sampled {row['eval_sampled']}"
            print(f"{count} of {len(todo)}, {minutes:.0f} min: {run.recipe}-{run.seed} {returns}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    tyro.cli(main)
