"""Read finished run directories: python benchmark/collect.py benchmark/runs/*

Writes benchmark/results.csv (a line per run) and benchmark/curves.png (last-100 return against steps), prints
the table. Each checkpoint is evaluated with sampled actions on seeds that training never used.
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
sys.path.insert(0, str(HERE.parent))


def collect(run_dir):
    """One row of results.csv, and the (steps, returns) curve."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    script, args = importlib.import_module(saved["script"]), saved["args"]
    events = EventAccumulator(str(run_dir))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    episodes = 20 if "Pong" in args["env_id"] else 100
    returns = script.evaluate(run_dir, episodes, seed=1_000_000 + args["seed"])
    row = {
        "script": saved["script"],
        "env_id": args["env_id"],
        "seed": args["seed"],
        "steps": saved["global_step"],
        "last_100_returns": round(curve[-1][1], 2),
        "evaluated_mean": round(float(returns.mean()), 2),
        "evaluated_std": round(float(returns.std(ddof=1)), 2),
        "evaluated_episodes": len(returns),
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
    return row, curve


def main():
    results = [collect(Path(name)) for name in sys.argv[1:]]
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, results[0][0])
        writer.writeheader()
        writer.writerows(row for row, _ in results)
    names = sorted({row["env_id"] for row, _ in results})
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained")
    for name, axis in zip(names, axes, strict=True):
        for row, curve in results:
            if row["env_id"] == name:
                axis.plot(*zip(*curve, strict=True), label=f"seed {row['seed']}")
        axis.set(title=name, xlabel="steps", ylabel="mean of the last 100 returns")
        axis.legend()
    figure.savefig(HERE / "curves.png", dpi=110)
    for row, _ in results:
        print(*row.values(), sep=" | ")


if __name__ == "__main__":
    main()
