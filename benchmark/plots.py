"""Draw the plots of docs/images/ from curves.csv, results.csv and random_play.csv.

    python benchmark/plots.py

curves.png has some tasks of each script, classic.png and its like the recipes of a group. Lines are means
over the seeds, bands reach from the lowest to the highest seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from ablation import scores_of_runs, summarise
from matplotlib import patheffects
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter
from recipes import DRAWN, read_recipes

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
RECIPES = read_recipes()
CURVES = pd.read_csv(HERE / "curves.csv")
MAIN_RECIPES = ("cartpole", "mountaincar", "lunarlander", "halfcheetah", "walker2d", "breakout-10m")
DARK, LIGHT = "#08306b", "#e6550d"  # a dark blue and an orange that is much lighter in print
STYLE = {"font.size": 11, "axes.titlesize": 12, "figure.labelsize": 12, "savefig.dpi": 150}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"figure.constrained_layout.use": True}


def draw_seeds(axis, recipe, color, band="", **style):
    """Mean of the seeds as a line, lowest to highest as a band, whose name in the legend is band."""
    wide = CURVES[CURVES["recipe"] == recipe].pivot(index="step", columns="seed", values="return")
    wide = wide.interpolate(method="index", limit_area="inside").dropna()  # each run logs at steps of its own
    axis.plot(wide.index, wide.mean(axis=1), color=color, lw=2, **style)
    lowest, highest = wide.min(axis=1), wide.max(axis=1)
    axis.fill_between(wide.index, lowest, highest, color=color, alpha=0.2, lw=0, label=band)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 500k, 1M
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_xlim(0, None)


def draw_published(axis, recipe):
    """Dashed lines with a name and a white rim: above it at the left, where curves are still low, or under it
    at the right, where they are far above."""
    rim = [patheffects.withStroke(linewidth=3, foreground="white")]
    bottom, top = axis.get_ylim()
    end = axis.lines[0].get_ydata()[-1]
    axis.margins(y=0.15)
    for name, value in RECIPES[recipe].get("lines", []):
        axis.axhline(value, color="black", ls="--", lw=1.2, label="published PPO")
        far = end - value > 0.3 * (top - bottom)
        x, y, ha, va = (0.98, -2, "right", "top") if far else (0.02, 2, "left", "bottom")
        place = {"xytext": (0, y), "textcoords": "offset points", "ha": ha, "va": va}
        place |= {"xycoords": ("axes fraction", "data"), "path_effects": rim, "zorder": 1.9}
        axis.annotate(name, (x, value), fontsize=11, **place)


def draw_panels(titles, name):
    """A panel per recipe of titles, up to three in a row."""
    columns = min(len(titles), 3)
    rows = -(-len(titles) // 3)
    size = max(3.4 * columns, 5), max(2.9 * rows, 3.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, (recipe, title) in zip(axes.flat, titles.items(), strict=False):
        draw_seeds(axis, recipe, DARK, "lowest to highest seed", label="mean of the seeds")
        draw_published(axis, recipe)
        axis.set_title(title)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("environment steps")
    figure.supylabel("return of the last 100 episodes")
    drawn = {x.get_label(): x for axis in axes.flat for x in axis.get_legend_handles_labels()[0]}
    figure.legend(handles=drawn.values(), loc="outside lower center", ncols=columns)
    figure.savefig(IMAGES / f"{name}.png")


def draw_ablation():
    """A panel per script: the score of each variant with its interval, a small point per run."""
    scores = scores_of_runs()
    scores = scores[scores["group"].str.startswith("ablation")]
    summary = summarise(scores).iloc[::-1]  # as in recipes.toml, from the top
    groups = scores.assign(variant=scores["variant"].str.replace("-", " ")).groupby("script", sort=False)
    figure, axes = plt.subplots(1, len(groups), figsize=(3.8 * len(groups), 5))
    for axis, (script, runs) in zip(axes, groups, strict=True):
        mine = summary[summary["group"] == runs["group"].iloc[0]]
        ends = [mine["score"] - mine["low"], mine["high"] - mine["score"]]
        names, style = mine["variant"].str.replace("-", " "), {"color": DARK, "lw": 2, "ms": 6, "zorder": 3}
        means = axis.errorbar(mine["score"], names, xerr=ends, fmt="D", **style)
        for (task, x), marker in zip(runs.groupby("env_id", sort=False), "ox^", strict=False):
            label = task.replace("NoFrameskip", "")
            axis.plot(x["score"], x["variant"], marker, color=LIGHT, ms=5, mew=1.5, label=label)
        place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 2, "columnspacing": 1}
        axis.legend(title="a run of", fontsize=10, title_fontsize=10, handletextpad=0, **place)
        one = axis.axvline(1, color="black", ls="--", lw=1.2)
        axis.grid(axis="x", color="0.9")
        axis.set_title(f"{script}.py", pad=56)
        axis.set_xlabel("score")
    names = ["mean score, 95 % interval", "the script as it is: left of it is worse"]
    figure.legend([means, one], names, loc="outside lower center", ncols=2)
    figure.savefig(IMAGES / "ablation.png")


def main():
    plt.rcParams.update(STYLE)
    draw_panels({recipe: RECIPES[recipe]["env_id"] for recipe in MAIN_RECIPES}, "curves")
    drawn = set(CURVES["recipe"])
    for group in DRAWN:
        titles = {name: x["env_id"] for name, x in RECIPES.items() if x["group"] == group and name in drawn}
        if len(set(titles.values())) < len(titles):  # two recipes of one task
            titles = {name: f"{name}\n{title}" for name, title in titles.items()}
        draw_panels(titles, group)
    draw_ablation()


if __name__ == "__main__":
    main()
