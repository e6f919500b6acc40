"""What each detail is worth, from results.csv and random_play.csv: ablation.csv

    pip install -r benchmark/requirements.txt
    python benchmark/ablation.py

The score of a run is 0 for the mean return of random actions and 1 for that of the script as it is, on the
same task. A row has the interquartile mean of the scores of a variant over the seeds of all tasks of its
group, and the 95 % interval of a bootstrap that is stratified by task: https://arxiv.org/abs/2108.13264. With
three seeds a task, such an interval is rather too narrow than too wide.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from recipes import read_recipes
from scipy import stats

HERE = Path(__file__).resolve().parent


def scores_of_runs(results, random_play, recipes):
    """A row per run of an ablation: group, variant, env_id, seed, return, score. In the order of recipes."""
    rows = []
    for name, entry in recipes.items():
        if entry["group"].startswith("ablation"):
            _, _, variant = name.split("-", 2)  # ablation-<task>-<variant>
            runs = results[results["recipe"] == name]
            found = {"group": entry["group"], "variant": variant, "env_id": entry["env_id"]}
            for seed, mean_return in zip(runs["seed"], runs["episodic_return"], strict=True):
                rows.append(found | {"seed": seed, "return": mean_return})
    if not rows:
        return pd.DataFrame(columns=["group", "variant", "env_id", "seed", "return", "score"])
    rows = pd.DataFrame(rows)
    zero = rows["env_id"].map(random_play.set_index("env_id")["return"])
    as_it_is = rows[rows["variant"] == "as-it-is"].groupby("env_id")["return"].mean()
    rows["score"] = (rows["return"] - zero) / (rows["env_id"].map(as_it_is) - zero)
    return rows.dropna(subset="score")  # nothing to compare with yet


def interquartile_mean(*tasks, axis=-1):
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def summarise(rows):
    """A row per group and variant."""
    summary = []
    for (group, variant), runs in rows.groupby(["group", "variant"], sort=False):
        tasks = [task["score"].to_numpy() for _, task in runs.groupby("env_id")]
        row = {"group": group, "variant": variant, "runs": len(runs), "score": interquartile_mean(*tasks)}
        if all(len(task) > 1 for task in tasks):
            options = {"paired": False, "method": "percentile", "rng": 1, "vectorized": True}
            interval = stats.bootstrap(tasks, interquartile_mean, **options).confidence_interval
            row |= {"low": interval.low, "high": interval.high}
        summary.append(row)
    return pd.DataFrame(summary).round(3)


def main():
    results, random_play = pd.read_csv(HERE / "results.csv"), pd.read_csv(HERE / "random_play.csv")
    summary = summarise(scores_of_runs(results, random_play, read_recipes()))
    summary.to_csv(HERE / "ablation.csv", index=False)
    print(summary.to_string(index=False))


if __name__ == "__main__":
    main()
