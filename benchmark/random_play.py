"""Returns of random actions on the tasks of the ablation, the zero of its scores: random_play.csv

    pip install -r benchmark/requirements.txt
    python benchmark/random_play.py

100 episodes of each task, with seed 1, through make_envs of the script that trains it.
"""

import csv
import dataclasses
import importlib
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
from recipes import read_recipes

HERE = Path(__file__).resolve().parent
EPISODES = 100


def play(script, env_id):
    """Raw returns, (EPISODES,)."""
    sys.path.append(str(HERE.parent))
    module = importlib.import_module(script)
    returns = []
    with closing(module.make_envs(dataclasses.replace(module.Args(), env_id=env_id), 1)) as envs:
        envs.reset(seed=1)
        envs.action_space.seed(1)
        while len(returns) < EPISODES:
            *_, infos = envs.step(envs.action_space.sample())
            if "episode" in infos:
                returns.append(float(infos["episode"]["r"][0]))
    return returns


def main():
    ablations = [x for x in read_recipes().values() if x["group"].startswith("ablation")]
    with (HERE / "random_play.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "episodes", "return", "std"])
        for script, env_id in dict.fromkeys((x["script"], x["env_id"]) for x in ablations):
            returns = play(script, env_id)
            row = [env_id, EPISODES, round(np.mean(returns), 2), round(np.std(returns, ddof=1), 2)]
            writer.writerow(row)
            print(*row)


if __name__ == "__main__":
    main()
