"""Draw the plots of docs/images/ from curves.csv, results.csv, random_play.csv and growth.csv.

    pip install -r benchmark/requirements.txt
    python benchmark/plots.py

    curves.png     the README's: some tasks of each script
    classic.png, mujoco-v5.png, ...   the recipes of a group, with published returns as dashed lines
    ablation.png   what each detail is worth: scores of ablation.py, 1 is the script as it is
    precision.png  Breakout with the CNN in fp32 and in bf16
    growth.png     speed and memory by number of environments

Lines are means over the seeds, bands reach from the lowest to the highest seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from ablation import scores_of_runs, summarise
from matplotlib import patheffects
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
from recipes import read_recipes

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
RECIPES = read_recipes()
MAIN_RECIPES = {  # of curves.png, with their titles
    "cartpole": "CartPole-v1",
    "mountaincar": "MountainCar-v0",
    "lunarlander": "LunarLander-v3",
    "halfcheetah": "HalfCheetah-v5",
    "walker2d": "Walker2d-v5",
    "breakout-fp32": "Breakout, 4 frames a step",
}
PLOTTED_GROUPS = ("classic", "mujoco-v5", "mujoco-v4", "atari", "atari-10m", "strong", "tutorials")
DARK, LIGHT = "#08306b", "#e6550d"  # a dark blue and an orange that is much lighter in print


def common_steps(curves, recipe):
    """The curves of a recipe's seeds at the same steps, interpolated: each run logs at steps of its own."""
    wide = curves[curves["recipe"] == recipe].pivot(index="step", columns="seed", values="return")
    wide = wide.interpolate(method="index", limit_area="inside").dropna()
    return wide.melt(ignore_index=False, value_name="return").reset_index()


def draw_seeds(axis, curves, recipe, **style):
    """Mean of the seeds as a line, lowest to highest as a band."""
    data = common_steps(curves, recipe)
    sns.lineplot(data, x="step", y="return", errorbar=("pi", 100), ax=axis, legend=False, lw=2, **style)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set(xlabel="", ylabel="", xlim=(0, None))


def draw_published(axis, recipe):
    """Dashed lines with their names above them at the left, where curves are still low, and a white rim."""
    rim = [patheffects.withStroke(linewidth=3, foreground="white")]
    for name, value in RECIPES[recipe].get("lines", []):
        axis.axhline(value, color="black", ls="--", lw=1.2)
        place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "left", "va": "bottom"}
        place |= {"xycoords": ("axes fraction", "data"), "path_effects": rim, "zorder": 1.9}
        axis.annotate(name, (0.02, value), fontsize=11, **place)
    axis.margins(y=0.15)


def draw_panels(curves, titles, columns, panel_size, path):
    """A panel per recipe of titles."""
    rows = -(-len(titles) // columns)
    size = panel_size[0] * columns, max(panel_size[1] * rows, 3.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, (recipe, title) in zip(axes.flat, titles.items(), strict=False):
        draw_seeds(axis, curves, recipe, color=DARK)
        draw_published(axis, recipe)
        axis.set_title(title, fontsize=12)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps")
    figure.supylabel("return of the last 100 episodes")
    sns.despine(figure)
    handles = [
        plt.Line2D([], [], color=DARK, lw=2, label="mean of the seeds"),
        plt.Rectangle((0, 0), 1, 1, color=DARK, alpha=0.2, lw=0, label="lowest to highest seed"),
    ]
    if any(RECIPES[recipe].get("lines") for recipe in titles):
        handles.append(plt.Line2D([], [], color="black", ls="--", lw=1.2, label="published PPO"))
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


def draw_ablation(rows, path):
    """A panel per script: the score of each variant with its interval, a small point per run."""
    summary = summarise(rows)
    groups = list(dict.fromkeys(summary["group"]))
    size = max(3.8 * len(groups), 7.5), 4.8
    figure, axes = plt.subplots(1, len(groups), figsize=size, layout="constrained", squeeze=False)
    for axis, group in zip(axes.flat, groups, strict=True):
        mine = summary[summary["group"] == group].iloc[::-1]  # as in recipes.toml, from the top
        names = mine["variant"].str.replace("-", " ")
        runs = rows[rows["group"] == group].assign(name=lambda x: x["variant"].str.replace("-", " "))
        axis.hlines(names, mine["low"], mine["high"], color=DARK, lw=2)
        for task, marker in zip(dict.fromkeys(runs["env_id"]), "ox", strict=False):
            of_task, label = runs[runs["env_id"] == task], task.replace("NoFrameskip", "")
            axis.plot(of_task["score"], of_task["name"], marker, color=LIGHT, ms=5, mew=1.5, label=label)
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "columnspacing": 1}
        axis.legend(title="a run of", frameon=False, fontsize=10, title_fontsize=10, handletextpad=0, **place)
        axis.plot(mine["score"], names, "D", color=DARK, ms=6, zorder=3)
        axis.axvline(1, color="black", ls="--", lw=1.2)
        axis.grid(axis="x", color="0.9")
        script = {"ablation-classic": "ppo_discrete.py", "ablation-mujoco": "ppo_continuous.py"}
        axis.set_title(script.get(group, "ppo_atari.py"), pad=40)
        axis.set(xlabel="score", ylabel="")
    sns.despine(figure)
    handles = [
        plt.Line2D([], [], color=DARK, marker="D", lw=2, label="mean score, 95 % interval"),
        plt.Line2D([], [], color="black", ls="--", lw=1.2, label="the script as it is: left of it is worse"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def main():
    IMAGES.mkdir(parents=True, exist_ok=True)
    fonts = {"axes.labelsize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11}
    fonts |= {"figure.labelsize": 12, "savefig.dpi": 150}
    sns.set_theme(context="paper", style="ticks", rc=fonts)
    curves = pd.read_csv(HERE / "curves.csv")
    drawn = set(curves["recipe"])
    main_titles = {recipe: title for recipe, title in MAIN_RECIPES.items() if recipe in drawn}
    draw_panels(curves, main_titles, 3, (3.4, 2.9), IMAGES / "curves.png")
    for group in PLOTTED_GROUPS:
        entries = {name: x for name, x in RECIPES.items() if x["group"] == group}
        titles = {name: x["env_id"] for name, x in entries.items()}
        if len(set(titles.values())) < len(titles):  # two recipes of one task
            titles = {name: f"{name}\n{title}" for name, title in titles.items()}
        titles = {name: title for name, title in titles.items() if name in drawn}
        if titles:
            draw_panels(curves, titles, 3, (3.4, 2.9), IMAGES / f"{group}.png")
    scores = scores_of_runs(pd.read_csv(HERE / "results.csv"), pd.read_csv(HERE / "random_play.csv"), RECIPES)
    if len(scores) > 0:
        draw_ablation(scores, IMAGES / "ablation.png")
    draw_precision(curves, IMAGES / "precision.png")
    draw_growth(pd.read_csv(HERE / "growth.csv"), IMAGES / "growth.png")


if __name__ == "__main__":
    main()
