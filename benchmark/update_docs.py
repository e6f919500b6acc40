"""Write what is measured and where things stand into README.md and docs/*.md: python benchmark/update_docs.py

It fills
- the cells of tables whose first column is `task`, of the recipe with the defaults, from results.csv;
- tables marked <!-- recipes: group -->, from results.csv and recipes.toml;
- tables marked <!-- variants: group -->, of an ablation from results.csv and ablation.csv, of a selection
  from results.csv;
- the other tables of TABLES, marked by their names, from speed.csv;
- of tables whose first column is `tag`, `without it` from ablation.csv.
All else stays as it is; a second run changes nothing. tests/test_docs.py fails while a page is out of date.
"""

import functools
import math
import re
import statistics
from pathlib import Path

import pandas as pd
from recipes import read_numerics, read_recipes
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured"
DEFAULTS = ("classic", "mujoco-v5", "mujoco-v4", "atari-10m")  # groups of recipes, one per task
ABLATIONS = {"classic": "classic control", "mujoco": "MuJoCo", "atari": "Breakout"}
SPEEDS = {  # columns of speed.csv: those of a table, with their form
    "sps": ("steps/s", "{:,.0f}"),
    "ratio": ("x", "{:.2f}"),
    "environment_ms": ("environments", "{:,.0f} ms"),
    "policy_ms": ("policy", "{:,.0f} ms"),
    "update_ms": ("update", "{:,.0f} ms"),
    "peak_mb": ("memory", "{:,.0f} MB"),
    "first_iteration_s": ("first iteration", "{:.1f} s"),
}


@functools.cache
def rows_of(name):
    """The rows of benchmark/<name>.csv."""
    return pd.read_csv(ROOT / "benchmark" / f"{name}.csv", dtype={"commit": str, "round": str})


def table_of(header, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def split(line):
    """The cells of a row."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def number(x, like=None):
    """With a decimal below 1000; like: the number whose decimals it takes."""
    return f"{x:.1f}" if abs(x if like is None else like) < 1000 else f"{x:.0f}"


def mean_and_spread(numbers):
    """`500.0 ± 0.0`: mean and sample standard deviation over seeds; a single seed has no spread."""
    if len(numbers) == 0:
        return NOT_MEASURED
    mean = statistics.mean(numbers)
    if len(numbers) == 1:
        return f"{number(mean)} (one seed)"
    return f"{number(mean)} ± {number(statistics.stdev(numbers), like=mean)}"


def both(numbers):
    """Mean and spread, and below them what they are made of."""
    each = f"<br>{', '.join(map(number, numbers))}" if len(numbers) > 1 else ""
    return mean_and_spread(numbers) + each


def runs_of(recipe):
    rows = rows_of("results")
    return rows[rows["recipe"] == recipe].sort_values("seed")


def cells_of(recipe):
    """{header of a column: its cell in the row of the recipe}; a dagger marks runs with older numerics."""
    runs, entry, numerics = runs_of(recipe), read_recipes()[recipe], read_numerics()
    present = [run.commit in numerics[run.script]["commits"] for run in runs.itertuples()]
    mark, minutes = "" if all(present) else " †", runs["wall_s"].median() / 60
    return {
        "steps": f"{runs['steps'].iloc[0]:,}" if len(runs) else NOT_MEASURED,
        "training": both(runs["episodic_return"]) + mark,
        "sampled": both(runs["eval_sampled"]),
        "deterministic": both(runs["eval_deterministic"]),
        "evaluated": mean_and_spread(runs["eval_sampled"]) + mark,
        "minutes": NOT_MEASURED if pd.isna(minutes) else f"{minutes:.{0 if minutes > 60 else 1}f}",
        "published PPO": entry.get("published", ""),
        "command": f"`{entry['script']}.py --env-id {entry['env_id']} {entry['flags']}".rstrip() + "`",
    }


def group_of(group):
    """{recipe: its entry} of a group, in the order of recipes.toml."""
    return {name: entry for name, entry in read_recipes().items() if entry["group"] == group}


def recipes_table(group):
    """A row per measured recipe of a group, with what others report, and one that names what is missing."""
    entries = group_of(group)
    header = ["recipe", "task", "steps", "training", "sampled", "deterministic"]
    header += [x for x in ("note", "published") if any(x in entry for entry in entries.values())]
    rows, missing = [], []
    for name, entry in entries.items():
        measured = set(runs_of(name)["seed"])
        seeds = [str(seed) for seed in entry["seeds"] if seed not in measured]
        if seeds:
            missing.append(f"{'seed ' + ', '.join(seeds) if measured else 'all'} of `{name}`")
        cells = entry | cells_of(name) | {"recipe": f"`{name}`", "task": entry["env_id"]}
        if measured:
            rows.append([cells.get(x, "") for x in header])
    if missing:
        rows.append([f"seeds not run yet: {'; '.join(missing)}"] + [""] * (len(header) - 1))
    return table_of([{"published": "published PPO"}.get(x, x) for x in header], rows)


def chance(one, other):
    """How often a random split of all numbers has means at least as far apart: an exact permutation test."""
    exact = {"n_resamples": math.inf, "alternative": "greater"}
    return stats.permutation_test((one, other), lambda x, y: abs(x.mean() - y.mean()), **exact).pvalue


def tianshou_table():
    """The defaults beside the last test of Tianshou's ten seeds within 1M steps, from tianshou.csv."""
    theirs, rows = rows_of("tianshou"), []
    name = theirs["task"].str.split("-").str[0]  # without the version
    for recipe, entry in (group_of("mujoco-v5") | group_of("mujoco-v4")).items():
        ours, of_task = list(runs_of(recipe)["eval_sampled"]), theirs[name == entry["env_id"].split("-")[0]]
        if len(ours) > 1 and len(of_task):
            returns = list(of_task["return"])
            version = of_task["task"].iloc[0].split("-")[1]
            rows.append([entry["env_id"], both(ours), both(returns), version, f"{chance(ours, returns):.3f}"])
    return table_of(["environment", "defaults", "Tianshou", "its version", "chance"], rows)


def scores():
    """{(group, variant): `0.71 (0.60 to 0.82)`}, in bold where it is clear, from ablation.csv."""
    cells = {}
    for row in rows_of("ablation").itertuples():
        text = f"{row.score:.2f} ({row.low:.2f} to {row.high:.2f})"
        cells[row.group, row.variant] = f"**{text}**" if row.clear == "yes" else text
    return cells


def variants_table(group):
    """A row per variant: its returns on each task, and in an ablation its score over all of them."""
    recipes = {tuple(name.split("-", 2)[1:]): name for name in group_of(group)}  # (task, variant)
    tasks, variants = (list(dict.fromkeys(x)) for x in zip(*recipes, strict=True))
    header, column = [read_recipes()[recipes[task, variants[0]]]["env_id"] for task in tasks], "sampled"
    rows = {variant: [variant.replace("-", " ")] for variant in variants}
    if group.startswith("ablation"):
        header, column = [*header, "score"], "training"
    for variant, row in rows.items():
        row += [cells_of(recipes[task, variant])[column] for task in tasks]
        if column == "training":
            row.append(scores()[group, variant])
    return table_of(["variant", *header], rows.values())


def without(tag):
    """`0.71 (0.60 to 0.82) MuJoCo`: the scores of the scripts without a detail."""
    recipes = [(name, x["group"]) for name, x in read_recipes().items() if x.get("without") == tag]
    variants = dict.fromkeys((group, name.split("-", 2)[2]) for name, group in recipes)
    return ", ".join(
        f"{scores()[x]} {ABLATIONS[x[0].removeprefix('ablation-')]}" for x in variants if x in scores()
    )


def speeds(kind=""):
    """The rows of speed.csv whose tasks begin with this word; without one: beside SB3, on the CPU."""
    rows = rows_of("speed")
    words = rows["task"].str.extract("^(gpu|cleanrl|threads|growth) ", expand=False).fillna("")
    return rows[words == kind].assign(task=rows["task"].str.removeprefix(f"{kind} "))


def speed_table(rows, base="sb3"):
    """Medians over rounds; ratios to the program base, with quartiles, are taken within a round."""
    of_base = rows.loc[rows["program"] == base, ["task", "round", "sps"]]
    rows = rows.merge(of_base, "left", ["task", "round"], suffixes=("", "_of_base"))
    rows["ratio"] = rows["sps"] / rows["sps_of_base"]
    columns = [column for column in SPEEDS if rows[column].notna().any()]
    groups = rows.groupby(["task", "program"], sort=False)
    cells = groups[columns].median()
    for column in columns:
        cells[column] = cells[column].map(SPEEDS[column][1].format)
    low, high = (groups["ratio"].quantile(q).map("{:.2f}".format) for q in (0.25, 0.75))
    cells["ratio"] = (cells["ratio"] + " (" + low + " to " + high + ")").where(low != "nan", NOT_MEASURED)
    header = [SPEEDS[column][0] for column in columns]
    header[1] += f" {base}".replace("sb3", "SB3").replace("cleanrl", "CleanRL")
    return table_of(["task", "program", *header], cells.reset_index().values.tolist())


def growth_table():
    """Steps per second and memory of each task, with a column for each number of environments."""
    groups = speeds("growth").groupby(["program", "task"], sort=False)
    medians = groups[["sps", "peak_mb"]].median().rename(columns={"sps": "steps/s", "peak_mb": "MB"})
    cells = medians.unstack(sort=False).T.map("{:,.0f}".format).reset_index()
    return table_of(["", "`--num-envs`", *cells.columns[2:]], cells.values.tolist())


TABLES = {
    "recipes": recipes_table,
    "variants": variants_table,
    "beside Tianshou": tianshou_table,
    "speed": lambda: speed_table(speeds()),
    "speed on a GPU": lambda: speed_table(speeds("gpu")),
    "speed beside CleanRL": lambda: speed_table(speeds("cleanrl"), "cleanrl"),
    "threads": lambda: speed_table(speeds("threads"), "one thread"),
    "growth": growth_table,
}


def written(match):
    """A mark with the table that belongs behind it."""
    mark, kind, group = match.groups()
    return mark + (TABLES[kind](group) if group else TABLES[kind]())


def filled(match):
    """A table whose first column is `task` or `tag`, with the cells that are known."""
    header, _, *rows = map(split, match[0].splitlines())
    defaults = {x["env_id"]: name for name, x in read_recipes().items() if x["group"] in DEFAULTS}
    for row in rows:
        known = {"without it": without(row[0])} if header[0] == "tag" else cells_of(defaults[row[0]])
        row[:] = [known.get(name, cell) for name, cell in zip(header, row, strict=True)]
    return table_of(header, rows)


def updated(text):
    """A page as it should be."""
    mark = rf"^(<!-- ({'|'.join(TABLES)})(?:: ([\w-]+))? -->\n)"
    text = re.sub(mark + r"(?:\|.*\n)*", written, text, flags=re.M)
    return re.sub(r"^\| (?:task \| steps|tag) \|.*\n(?:\|.*\n)+", filled, text, flags=re.M)


def pages():
    return [ROOT / "README.md", ROOT / "variants" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main():
    for page in pages():
        text = page.read_text()
        if updated(text) != text:
            page.write_text(updated(text))
            print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
