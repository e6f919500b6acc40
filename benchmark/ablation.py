"""What each detail is worth: ablation.csv, from results.csv and random play

    python benchmark/ablation.py
    python benchmark/ablation.py --random-play    # first 100 random episodes of each task: random_play.csv

Each run is compared with that of the script as it is with the same seed, which begins with the same weights
and the same environments: its score is 1 if it ends as high, and 0 if it ends lower by as much as random play
is below the mean of the script as it is. For a run of the script as it is, 1 is this mean. A row has the mean
score of a variant over the seeds and tasks of its group, and a 95 % interval by Student's t, with Welch's
degrees of freedom: with so few seeds, a bootstrap gives intervals that are too narrow. A row is `clear` if an
interval that allows for all variants of its group (Bonferroni) leaves 1 out.
"""

import importlib
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from recipes import read_recipes
from scipy import stats

HERE = Path(__file__).resolve().parent


def ablations():
    """A row per recipe of an ablation, in the order of recipes.toml."""
    frame = pd.DataFrame.from_dict(read_recipes(), orient="index").reset_index(names="recipe")
    frame = frame.loc[frame["group"].str.match("ablation"), ["recipe", "group", "script", "env_id"]]
    return frame.assign(variant=frame["recipe"].str.split("-", n=2).str[2])  # ablation-<task>-<variant>


def play(script, env_id, episodes=100):
    """Raw returns of random actions, through make_envs of the script that trains the task."""
    module = importlib.import_module(script)
    returns = []
    with closing(module.make_envs(module.Args(env_id=env_id), 1)) as envs:
        envs.reset(seed=1)
        envs.action_space.seed(1)
        while len(returns) < episodes:
            *_, infos = envs.step(envs.action_space.sample())
            if "episode" in infos:
                returns.append(float(infos["episode"]["r"][0]))
    mean, std = np.mean(returns).round(2), np.std(returns, ddof=1).round(2)
    return {"env_id": env_id, "episodes": episodes, "return": mean, "std": std}


def scores_of_runs():
    """A row per run of an ablation."""
    rows = ablations().merge(pd.read_csv(HERE / "results.csv")[["recipe", "seed", "episodic_return"]])
    zero = rows["env_id"].map(pd.read_csv(HERE / "random_play.csv").set_index("env_id")["return"])
    as_it_is = rows["episodic_return"].where(rows["variant"] == "as-it-is")
    one = as_it_is.groupby([rows["group"], rows["env_id"]]).transform("mean")
    same_seed = as_it_is.groupby([rows["group"], rows["env_id"], rows["seed"]]).transform("mean")
    equal = one.where(rows["variant"] == "as-it-is", same_seed)
    rows["score"] = 1 + (rows["episodic_return"] - equal) / (one - zero)
    return rows


def interval(samples, level):
    """Of the mean over tasks of the means over seeds."""
    mean = np.mean([x.mean() for x in samples])
    terms = np.array([x.var(ddof=1) / len(x) for x in samples])
    if terms.sum() == 0:  # all runs are equal
        return mean, mean
    degrees = np.array([len(x) - 1 for x in samples])
    freedom = terms.sum() ** 2 / (terms**2 / degrees).sum()  # Welch and Satterthwaite
    return stats.t.interval(level, freedom, mean, np.sqrt(terms.sum()) / len(samples))


def summarise(rows):
    """A row per group and variant; each needs two seeds or more on every task of its group."""
    summary = []
    for group, of_group in rows.groupby("group", sort=False):
        runs = of_group.groupby(["variant", "env_id"], sort=False)["score"].apply(np.array)
        runs = runs.unstack(sort=False)  # a row per variant, a column per task
        for variant, samples in runs.iterrows():
            row = {"group": group, "variant": variant, "tasks": len(samples)}
            row |= {"runs": sum(map(len, samples)), "score": np.mean([x.mean() for x in samples])}
            row["low"], row["high"] = interval(samples, 0.95)
            low, high = interval(samples, 1 - 0.05 / (len(runs) - 1))
            summary.append(row | {"clear": "no" if low <= 1 <= high else "yes"})
    return pd.DataFrame(summary).round(3)


def main(random_play: bool = False):
    """Write ablation.csv; with --random-play, first random_play.csv."""
    if random_play:
        sys.path.append(str(HERE.parent))  # for the scripts
        tasks = ablations()[["script", "env_id"]].drop_duplicates()
        played = pd.DataFrame([play(*task) for task in tasks.itertuples(index=False)])
        played.to_csv(HERE / "random_play.csv", index=False, lineterminator="\r\n")
    summary = summarise(scores_of_runs())
    summary.to_csv(HERE / "ablation.csv", index=False)
    print(summary.to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
