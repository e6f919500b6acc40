"""Read finished run directories: python benchmark/collect.py benchmark/runs/* (named <recipe>-<seed>)

Puts a line per run into benchmark/results.csv and its learning curve into benchmark/curves.csv, in place of
older ones of the same recipe and seed, and draws recipes.png, curves.png and precision.png from the latter,
there; with no directory it only draws. Each checkpoint is evaluated on 100 episodes with seeds that training
never used, once with sampled and once with best actions.
"""

import csv
import importlib
import platform
import sys
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
RESULTS = ("cartpole", "default-halfcheetah", "breakout", "breakout-fp32")  # the README's first table
sys.path.insert(0, str(HERE.parent))


def collect(run_dir):
    """One row of results.csv, and rows of curves.csv: about 100 points of the last-100 mean."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    script, args = importlib.import_module(saved["script"]), saved["args"]
    episodes = 20 if "Pong" in args["env_id"] else 100  # 20 games of Pong last as long as 100 of others
    recipe = run_dir.name.rpartition("-")[0]
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("charts/episodic_return")
    sampled, best = (script.evaluate(run_dir, episodes, x, 1_000_000 + args["seed"]) for x in (False, True))
    row = {
        "recipe": recipe,
        "script": saved["script"],
        "env_id": args["env_id"],
        "seed": args["seed"],
        "steps": saved["global_step"],
        "last_100_returns": round(points[-1].value, 2),
        "evaluated_mean": round(float(sampled.mean()), 2),
        "evaluated_std": round(float(sampled.std(ddof=1)), 2),
        "deterministic_mean": round(float(best.mean()), 2),
        "deterministic_std": round(float(best.std(ddof=1)), 2),
        "evaluated_episodes": episodes,
        "flags_not_default": " ".join(
            f"{name}={value}"
            for name, value in args.items()
            if value != getattr(script.Args, name, ())
            and name not in ("seed", "env_id", "run_dir", "eval_episodes")
        ),
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "python": platform.python_version(),
    }
    every = max(len(points) // 100, 1)
    curve = [
        {"recipe": recipe, "seed": args["seed"], "step": x.step, "return": round(x.value, 2)}
        for x in points[::-every][::-1]
    ]
    return row, curve


def merge(path, rows):
    """All rows of a CSV file, those of the same recipe and seed replaced; written back, sorted."""
    new = {(row["recipe"], str(row["seed"])) for row in rows}
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    rows = [row for row in old if (row["recipe"], row["seed"]) not in new] + rows
    rows.sort(key=lambda row: (row["recipe"], int(row["seed"]), int(row.get("step", 0))))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, max((row.keys() for row in rows), key=len))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def draw(curves, tasks, path):
    """A panel per recipe, with its environment of tasks; a colour per seed."""
    names = sorted({row["recipe"] for row in curves})
    columns = 4 if len(names) > 4 else 2
    shape = -(-len(names) // columns), columns
    figure, axes = plt.subplots(
        *shape, figsize=(4 * shape[1], 2.6 * shape[0]), layout="constrained", squeeze=False
    )
    lines = {}
    for axis, name in zip(axes.flat, names, strict=False):
        for seed in sorted({int(row["seed"]) for row in curves if row["recipe"] == name}):
            rows = [row for row in curves if row["recipe"] == name and int(row["seed"]) == seed]
            steps, returns = [int(x["step"]) for x in rows], [float(x["return"]) for x in rows]
            lines[f"seed {seed}"] = axis.plot(steps, returns, color=f"C{seed - 1}")[0]
        axis.set(xlabel="steps", ylabel="mean of last 100 returns")
        axis.set_title(f"{name}: {tasks[name]}", fontsize="small")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    seeds = sorted(lines)
    figure.legend([lines[x] for x in seeds], seeds, loc="outside lower center", ncols=len(seeds))
    figure.savefig(path, dpi=80)


def draw_precisions(curves, path):
    """Breakout with the CNN in bf16 and in fp32, a colour per seed."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, style in ("breakout", "-"), ("breakout-fp32", "--"):
        for seed in sorted({int(row["seed"]) for row in curves if row["recipe"] == name}):
            rows = [row for row in curves if row["recipe"] == name and int(row["seed"]) == seed]
            label = f"{'fp32' if 'fp32' in name else 'bf16'}, seed {seed}"
            steps, returns = [int(x["step"]) for x in rows], [float(x["return"]) for x in rows]
            axis.plot(steps, returns, style, color=f"C{seed - 1}", label=label)
    axis.set(title="BreakoutNoFrameskip-v4", xlabel="steps", ylabel="mean of last 100 returns")
    axis.legend(ncols=2)
    figure.savefig(path, dpi=80)


def main():
    results = [collect(Path(name)) for name in sys.argv[1:] if (Path(name) / "done").exists()]
    for row, _ in results:
        print(*row.values(), sep=" | ")
    tasks = {row["recipe"]: row["env_id"] for row in merge(HERE / "results.csv", [row for row, _ in results])}
    curves = merge(HERE / "curves.csv", [x for _, curve in results for x in curve])
    draw(curves, tasks, HERE / "recipes.png")
    draw([row for row in curves if row["recipe"] in RESULTS], tasks, HERE / "curves.png")
    if {"breakout", "breakout-fp32"} <= {row["recipe"] for row in curves}:
        draw_precisions(curves, HERE / "precision.png")


if __name__ == "__main__":
    main()
