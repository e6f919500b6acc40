"""Turn finished runs into rows of results.csv and curves.csv, and draw the plots of docs/images/.

    pip install -r benchmark/requirements.txt
    python benchmark/collect.py benchmark/runs/*      # run directories named <recipe>-<seed>
    python benchmark/collect.py                       # only draws, from the CSV files

A run counts as finished if it holds a file `done`; others are skipped. Its rows take the place of those of
the same recipe and seed. Each checkpoint is evaluated on 100 episodes (20 of Pong) with seeds that training
never used, once with sampled and once with deterministic actions. In results.csv, commit is the short hash of
the scripts, date the day (UTC) on which the training ended, threads the --num-threads of the run; they are
empty in rows that were collected before there were such columns.

    docs/images/curves.png     the README's: one task per script
    docs/images/recipes.png    every recipe
    docs/images/precision.png  Breakout with the CNN in fp32 and in bf16
    docs/images/growth.png     speed and memory by number of environments, from growth.csv

Lines are means over the seeds, bands reach from the lowest to the highest seed.
"""

import importlib
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import gymnasium
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
MAIN_RECIPES = {  # of curves.png, with their titles
    "cartpole": "CartPole-v1",
    "default-halfcheetah": "HalfCheetah-v5",
    "breakout-fp32": "Breakout, 4 frames a step",
}
# Published returns of PPO on the same task after the same steps, drawn as lines. Where another version of the
# task was used, the label names it, unless its rewards are the same (HalfCheetah-v4 and v5).
PUBLISHED = {
    "cartpole": [("CleanRL 490", 490.04)],
    "cartpole-kl": [("CleanRL 490", 490.04)],
    "cartpole-notebook": [("rl-zoo 500", 500.0)],
    "default-halfcheetah": [("CleanRL 1,443", 1442.64)],
    "introduction-kl": [("CleanRL 1,443", 1442.64)],
    "halfcheetah": [("CleanRL 1,443", 1442.64), ("rl-zoo 5,819 (v3)", 5819.10)],
    "swimmer": [("Tianshou 66.7 (v3)", 66.7), ("rl-zoo 281.6 (v3)", 281.56)],
    "pendulum": [("rl-zoo -172.2", -172.23)],
    "mountaincar-continuous": [("rl-zoo 88.3", 88.34)],
    "mountaincar": [("rl-zoo -110.4", -110.42)],
    "lunarlander": [("rl-zoo 242.1 (v2)", 242.12)],
}
DARK, LIGHT = "#08306b", "#e6550d"  # a dark blue and an orange that is much lighter in print


# ---------------------------------------- from runs to rows ----------------------------------------


def collect(run_dir, commit):
    """Of one run: a row of results.csv, and about 100 rows of curves.csv."""
    saved = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    script = importlib.import_module(saved["script"])
    args = saved["args"]
    torch.set_num_threads(max(args["num_threads"], 1))

    episodes = 20 if "Pong" in args["env_id"] else 100  # 20 games of Pong last as long as 100 of others
    seed = 1_000_000 + args["seed"]
    sampled = script.evaluate(run_dir, episodes, deterministic=False, seed=seed)
    best = script.evaluate(run_dir, episodes, deterministic=True, seed=seed)

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("charts/episodic_return")
    recipe = run_dir.name.rpartition("-")[0]
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
        "flags_not_default": flags_not_default(args, script.Args),
        "torch": torch.__version__,
        "gymnasium": gymnasium.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.fromtimestamp(points[-1].wall_time, UTC).date().isoformat(),
        "threads": args["num_threads"],
    }
    every = max(len(points) // 100, 1)
    curve = [
        {"recipe": recipe, "seed": args["seed"], "step": x.step, "return": round(x.value, 2)}
        for x in points[::-every][::-1]  # counted from the end, so that the last point is among them
    ]
    return row, curve


def flags_not_default(args, defaults):
    named_elsewhere = ("seed", "env_id", "run_dir", "eval_episodes")
    changed = {
        name: value
        for name, value in args.items()
        if name not in named_elsewhere and value != getattr(defaults, name, None)
    }
    return " ".join(f"{name}={value}" for name, value in changed.items())


def merge(path, new_rows):
    """Write the CSV file with new_rows in place of those of the same recipe and seed. Other rows stay as they
    are, letter by letter; a column that they lack is empty."""
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if new_rows:
        new = pd.DataFrame(new_rows).astype(str)
        keys = ["recipe", "seed"]
        kept = rows[~rows.set_index(keys).index.isin(new.set_index(keys).index)]
        rows = pd.concat([kept, new]).fillna("")
    order = ["recipe", "seed", "step"] if "step" in rows else ["recipe", "seed"]
    rows = rows.sort_values(order, key=lambda x: x if x.name == "recipe" else x.astype(int))
    rows.to_csv(path, index=False, lineterminator="\r\n")


def warn_of_other_flags(new_rows):
    """Say where flags differ from those of the recipe's rows so far: two recipes may have got one name."""
    old = pd.read_csv(HERE / "results.csv", dtype=str, keep_default_na=False)
    for row in new_rows:
        same = old[old["recipe"] == row["recipe"]]
        flags = row["flags_not_default"]
        for old_flags in set(same["flags_not_default"]) - {flags}:
            print(f"note: {row['recipe']}-{row['seed']} has the flags [{flags}], so far [{old_flags}]")


# ---------------------------------------- from rows to plots ----------------------------------------


def common_steps(curves, recipe):
    """The curves of a recipe's seeds at the same steps, interpolated: each run logs at steps of its own."""
    wide = curves[curves["recipe"] == recipe].pivot(index="step", columns="seed", values="return")
    wide = wide.interpolate(method="index", limit_area="inside").dropna()
    return wide.melt(ignore_index=False, value_name="return").reset_index()


def draw_seeds(axis, curves, recipe, **style):
    """Mean of the seeds as a line, lowest to highest as a band. Returns what it has drawn."""
    data = common_steps(curves, recipe)
    sns.lineplot(data, x="step", y="return", errorbar=("pi", 100), ax=axis, legend=False, lw=2, **style)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set(xlabel="", ylabel="", xlim=(0, None))
    return data


def draw_published(axis, recipe, data):
    """Dashed lines with their names at the right, below the line if all seeds are above it there."""
    at_the_right = data[data["step"] > 0.75 * data["step"].max()]
    for name, value in PUBLISHED.get(recipe, []):
        axis.axhline(value, color="black", ls="--", lw=1.2)
        below = at_the_right["return"].min() > value
        place = {"xytext": (0, -3 if below else 3), "textcoords": "offset points"}
        place |= {"ha": "right", "va": "top" if below else "bottom"}
        axis.annotate(name, (0.98, value), xycoords=("axes fraction", "data"), fontsize=11, **place)
    axis.margins(y=0.12)


def draw_panels(curves, titles, columns, panel_size, path):
    """A panel per recipe of titles."""
    rows = -(-len(titles) // columns)
    size = panel_size[0] * columns, panel_size[1] * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (recipe, title) in zip(axes.flat, titles.items(), strict=False):
        data = draw_seeds(axis, curves, recipe, color=DARK)
        draw_published(axis, recipe, data)
        axis.set_title(title, fontsize=12)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps")
    figure.supylabel("return, mean of the last 100 episodes")
    sns.despine(figure)
    handles = [
        plt.Line2D([], [], color=DARK, lw=2, label="mean of the seeds"),
        plt.Rectangle((0, 0), 1, 1, color=DARK, alpha=0.2, lw=0, label="lowest to highest seed"),
        plt.Line2D([], [], color="black", ls="--", lw=1.2, label="published PPO"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def draw_precision(curves, path):
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    draw_seeds(axis, curves, "breakout-fp32", color=DARK, label="fp32, the default")
    draw_seeds(axis, curves, "breakout", color=LIGHT, ls="--", label="bf16")
    axis.set_title("BreakoutNoFrameskip-v4, three seeds each", fontsize=12)
    axis.set(xlabel="environment steps", ylabel="return, mean of the last 100 games")
    axis.legend(handles=axis.lines, loc="upper left", frameon=False, handlelength=3)
    sns.despine(figure)
    figure.savefig(path)


def draw_growth(rows, path):
    """Two panels over the number of environments, a line per task."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    style = {"hue": "task", "style": "task", "markers": ["o", "s", "^"], "markersize": 7, "lw": 2}
    style["palette"] = [DARK, "#4292c6", LIGHT]
    panels = {"sps": "steps per second", "peak_mb": "peak memory, MB"}
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        sns.lineplot(rows, x="num_envs", y=column, ax=axis, legend=column == "sps", **style)
        axis.set(xscale="log", yscale="log", xlabel="environments (--num-envs)", ylabel=label)
        axis.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axis.grid(axis="y", color="0.85")
        axis.minorticks_off()
    axes[0].set_yticks([100, 1_000, 10_000], ["100", "1,000", "10,000"])
    axes[1].set_yticks([250, 500, 1_000, 2_000], ["250", "500", "1,000", "2,000"])
    axes[0].legend(title=None, frameon=False, handlelength=3)
    sns.despine(figure)
    figure.savefig(path)


def draw_all():
    IMAGES.mkdir(parents=True, exist_ok=True)
    fonts = {"axes.labelsize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11}
    fonts |= {"figure.labelsize": 12, "savefig.dpi": 150}
    sns.set_theme(context="paper", style="ticks", rc=fonts)
    curves = pd.read_csv(HERE / "curves.csv")
    tasks = pd.read_csv(HERE / "results.csv").groupby("recipe")["env_id"].first()
    titles = {recipe: f"{recipe}\n{tasks[recipe]}" for recipe in sorted(curves["recipe"].unique())}
    draw_panels(curves, MAIN_RECIPES, 3, (3.6, 3.4), IMAGES / "curves.png")
    draw_panels(curves, titles, 3, (3.4, 2.9), IMAGES / "recipes.png")
    draw_precision(curves, IMAGES / "precision.png")
    draw_growth(pd.read_csv(HERE / "growth.csv"), IMAGES / "growth.png")


def main(run_dirs: tyro.conf.Positional[tuple[Path, ...]] = (), commit: str = ""):
    """Collect finished runs and draw.

    Args:
        run_dirs: directories named <recipe>-<seed>.
        commit: short hash of the scripts that made the runs; empty: that of this checkout.
    """
    sys.path.append(str(HERE.parent))  # for the scripts
    if not commit:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    finished = [path for path in run_dirs if (path / "done").exists()]
    for path in run_dirs:
        if path not in finished:
            print(f"skipped, no file `done`: {path}")
    results, points = [], []
    for path in finished:
        row, curve = collect(path, commit)
        print(*row.values(), sep=" | ")
        results.append(row)
        points += curve
    warn_of_other_flags(results)
    merge(HERE / "results.csv", results)
    merge(HERE / "curves.csv", points)
    draw_all()


if __name__ == "__main__":
    tyro.cli(main)
