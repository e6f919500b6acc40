"""What each detail is worth, from results.csv and random_play.csv: ablation.csv

    pip install -r benchmark/requirements.txt
    python benchmark/ablation.py

The score of a run is 0 for the mean return of random actions and 1 for the mean of the script as it is, on
the same task. A row has the mean score of a variant over the seeds and tasks of its group, and a 95 %
interval: a bootstrap that draws from the seeds of each task by itself, of the variant and, since their mean
is uncertain too, of the script as it is. With three seeds a task, such an interval is rather too narrow than
too wide.
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


def mean_score(*samples, axis=-1):
    """samples: the runs of the variant on each task, then those of the script as it is; 0 is random play."""
    half = len(samples) // 2
    ones = [sample.mean(axis, keepdims=True) for sample in samples[half:]]
    return np.mean([(x / one).mean(axis) for x, one in zip(samples[:half], ones, strict=True)], axis=0)


def summarise(rows):
    """A row per group and variant."""
    summary = []
    for (group, variant), runs in rows.groupby(["group", "variant"], sort=False):
        tasks = list(dict.fromkeys(runs["env_id"]))
        as_it_is = rows[(rows["group"] == group) & (rows["variant"] == "as-it-is")]
        samples = [x.loc[x["env_id"] == task, "score"].to_numpy() for x in (runs, as_it_is) for task in tasks]
        low = high = math.nan
        if min(map(len, samples)) > 1:
            options = {"paired": False, "method": "percentile", "rng": 1}
            low, high = stats.bootstrap(samples, mean_score, **options).confidence_interval
        row = {"group": group, "variant": variant, "tasks": len(tasks), "runs": len(runs)}
        summary.append(row | {"score": mean_score(*samples), "low": low, "high": high})
    return pd.DataFrame(summary).round(3)


def main():
    results, random_play = pd.read_csv(HERE / "results.csv"), pd.read_csv(HERE / "random_play.csv")
    summary = summarise(scores_of_runs(results, random_play, read_recipes()))
    summary.to_csv(HERE / "ablation.csv", index=False)
    print(summary.to_string(index=False))


if __name__ == "__main__":
    main()
