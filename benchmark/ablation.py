"""What each detail is worth, from results.csv and random_play.csv: ablation.csv

    pip install -r benchmark/requirements.txt
    python benchmark/ablation.py

The score of a run is 0 for the mean return of random actions and 1 for the mean of the script as it is, on
the same task. A row has the mean score of a variant over the seeds and tasks of its group, and a 95 %
interval by Welch's formula, from the standard deviations of the variant and of the script as it is: with so
few seeds, a bootstrap gives intervals that are too narrow. The interval of the script as it is tells how far
from 1 another sample of it would lie, with as many seeds as a variant has. A row is `clear` if an interval
that allows for all variants of its group (Bonferroni) leaves 1 out.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from recipes import read_recipes
from scipy import stats

HERE = Path(__file__).resolve().parent
COLUMNS = ["group", "variant", "env_id", "seed", "return", "score"]


def scores_of_runs(results, random_play, recipes):
    """A row per run of an ablation, with COLUMNS, in the order of recipes."""
    rows = []
    for name, entry in recipes.items():
        if entry["group"].startswith("ablation"):
            variant = name.split("-", 2)[2]  # ablation-<task>-<variant>
            for run in results[results["recipe"] == name].itertuples():
                rows.append(
                    [entry["group"], variant, entry["env_id"], run.seed, run.episodic_return, math.nan]
                )
    rows = pd.DataFrame(rows, columns=COLUMNS)
    zero = rows["env_id"].map(random_play.set_index("env_id")["return"])
    as_it_is = rows[rows["variant"] == "as-it-is"].groupby("env_id")["return"].mean()
    rows["score"] = (rows["return"] - zero) / (rows["env_id"].map(as_it_is) - zero)
    return rows.dropna(subset="score")  # nothing to compare with yet


def interval(samples, ones, seeds, level):
    """Of the mean over tasks of mean(sample) / mean(one); the mean of each one is 1 in these scores.
    seeds: of each sample; the samples themselves may have more, of which only the variance is used."""
    ratios = np.array([sample.mean() for sample in samples])
    terms = [x.var(ddof=1) / n for x, n in zip(samples, seeds, strict=True)]
    terms += [ratio**2 * x.var(ddof=1) / len(x) for ratio, x in zip(ratios, ones, strict=True)]
    terms, degrees = np.array(terms), np.array([*seeds, *map(len, ones)]) - 1
    if terms.sum() == 0:  # all runs are equal
        return ratios.mean(), ratios.mean()
    freedom = terms.sum() ** 2 / (terms**2 / degrees).sum()  # Welch and Satterthwaite
    return stats.t.interval(level, freedom, ratios.mean(), np.sqrt(terms.sum()) / len(ratios))


def summarise(rows):
    """A row per group and variant that was run on all tasks of the group, with two seeds or more on each."""
    summary = []
    for group, of_group in rows.groupby("group", sort=False):
        by_run = {
            key: x["score"].to_numpy() for key, x in of_group.groupby(["variant", "env_id"], sort=False)
        }
        tasks, ones = of_group["env_id"].unique(), []
        seeds = {
            variant: [len(by_run.get((variant, task), ())) for task in tasks]
            for variant in of_group["variant"].unique()
        }
        seeds = {variant: counts for variant, counts in seeds.items() if min(counts) > 1}
        for variant, counts in seeds.items():
            samples = [by_run[variant, task] for task in tasks]
            row = {"group": group, "variant": variant, "tasks": len(tasks), "runs": sum(counts)}
            row["score"] = np.mean([x.mean() for x in samples])
            if variant == "as-it-is":
                ones, counts = samples, [min(x) for x in zip(*seeds.values(), strict=True)]
            row["low"], row["high"] = interval(samples, ones, counts, 0.95)
            low, high = interval(samples, ones, counts, 1 - 0.05 / max(len(seeds) - 1, 1))
            summary.append(row | {"clear": "no" if low <= 1 <= high else "yes"})
    return pd.DataFrame(summary).round(3)


def main():
    results, random_play = pd.read_csv(HERE / "results.csv"), pd.read_csv(HERE / "random_play.csv")
    summary = summarise(scores_of_runs(results, random_play, read_recipes()))
    summary.to_csv(HERE / "ablation.csv", index=False)
    print(summary.to_string(index=False))


if __name__ == "__main__":
    main()
