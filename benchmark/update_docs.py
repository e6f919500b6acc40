"""Write what is measured and where things stand into README.md and docs/*.md: python benchmark/update_docs.py

It fills
- the cells of tables whose first column is `recipe`, from results.csv (and `minutes` from speed.csv);
- comments `# <recipe>: ...` behind commands in blocks of code, from the same files;
- the tables marked <!-- speed -->, <!-- growth --> and <!-- threads -->, from the files of these names, and
  <!-- speed on a GPU --> from the first of them;
- tables marked <!-- recipes: group --> and commands marked <!-- commands: group -->, from recipes.toml;
- tables marked <!-- ablation: group -->, from ablation.csv and results.csv;
- of tables whose first column is `tag`, the column `where` from the scripts themselves, and `without it` from
  ablation.csv.
All else stays as it is; a second run changes nothing. tests/test_docs.py fails while a page is out of date.
"""

import ast
import csv
import functools
import re
import statistics
import textwrap
from pathlib import Path

from recipes import read_numerics, read_recipes

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("discrete", "continuous", "atari")
NOT_MEASURED = "not measured"
TAG = re.compile(r"\[((?:core|cont|atari|ours) \d+)\]")
# the row of speed.csv that tells how long a recipe takes
PROGRAMS = {
    "breakout": ("breakout", "bf16"),
    "breakout-fp32": ("breakout", "eager"),
}


@functools.cache
def rows_of(name):
    """The rows of benchmark/<name>.csv."""
    path = ROOT / "benchmark" / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(*rows):
    return ["| " + " | ".join(row) + " |" for row in rows]


def rule(columns):
    return ["---"] * columns


# --- results ---


def number(x, like=None):
    """With a decimal below 1000; like: the number whose decimals it takes."""
    return f"{x:.1f}" if abs(x if like is None else like) < 1000 else f"{x:.0f}"


def mean_and_spread(numbers):
    """`500.0 ± 0.0`: mean and sample standard deviation over seeds; a single seed has no spread."""
    if not numbers:
        return NOT_MEASURED
    mean = statistics.mean(numbers)
    if len(numbers) == 1:
        return f"{number(mean)} (one seed)"
    return f"{number(mean)} ± {number(statistics.stdev(numbers), like=mean)}"


def each(numbers):
    return ", ".join(number(x) for x in numbers) if numbers else NOT_MEASURED


def both(numbers):
    """Mean and spread, and below them what they are made of."""
    if len(numbers) < 2:
        return mean_and_spread(numbers)
    return f"{mean_and_spread(numbers)}<br>{each(numbers)}"


def minutes(recipe, runs):
    """The median of what the runs took; or, where that was not noted, steps over the median of speed.csv."""
    seconds = [float(run["wall_s"]) for run in runs if run["wall_s"]]
    speeds = [float(r["sps"]) for r in rows_of("speed") if (r["task"], r["program"]) == PROGRAMS.get(recipe)]
    if not seconds and (not speeds or not runs):
        return NOT_MEASURED
    time = statistics.median(seconds) if seconds else int(runs[0]["steps"]) / statistics.median(speeds)
    return str(max(1, round(time / 60)))


def cells_of(recipe):
    """{header of a column: its cell in the row of the recipe}."""
    runs = [row for row in rows_of("results") if row["recipe"] == recipe]
    runs.sort(key=lambda row: int(row["seed"]))
    numbers = {
        key: [float(run[key]) for run in runs if run[key]]
        for key in ("episodic_return", "eval_sampled", "eval_deterministic")
    }
    steps = int(runs[0]["steps"]) if runs else 0
    return {
        "steps": f"{steps:,}" if steps else NOT_MEASURED,
        "return": mean_and_spread(numbers["episodic_return"]),
        "evaluated": mean_and_spread(numbers["eval_sampled"]) + mark(runs),
        "each seed": each(numbers["episodic_return"]) + mark(runs),
        "training": both(numbers["episodic_return"]) + mark(runs),
        "sampled": both(numbers["eval_sampled"]),
        "deterministic": both(numbers["eval_deterministic"]),
        "minutes": minutes(recipe, runs),
        "command": command_of(recipe),
    }


def command_of(recipe):
    entry = read_recipes().get(recipe, {"script": "ppo", "env_id": "?", "flags": ""})
    return f"`{entry['script']}.py --env-id {entry['env_id']} {entry['flags']}".rstrip() + "`"


def mark(runs):
    """A dagger if some of the runs were made with older numerics of their script than the present ones."""
    numerics = read_numerics()
    return " †" if any(run["commit"] not in numerics[run["script"]]["commits"] for run in runs) else ""


def group_of(group):
    """{recipe: its entry} of a group, in the order of recipes.toml."""
    return {name: entry for name, entry in read_recipes().items() if entry["group"] == group}


def recipes_table(group):
    """A row per measured recipe of a group, with what others report, and one that names what is missing.

    Recipes that are compared with another one have its returns beside theirs, in place of evaluations.
    """
    entries = group_of(group)
    header = ["recipe", "task", "steps", "training", "sampled", "deterministic"]
    if all("against" in entry for entry in entries.values()):
        header = ["recipe", "task", "training", "against"]
    last = [x for x in ("note", "published") if any(x in entry for entry in entries.values())]
    table = [[{"published": "published PPO"}.get(x, x) for x in header + last], rule(len(header + last))]
    missing = []
    for name, entry in entries.items():
        cells = {"recipe": f"`{name}`", "task": entry["env_id"]} | cells_of(name)
        if "against" in entry:
            cells["against"] = f"`{entry['against']}`: {cells_of(entry['against'])['training']}"
        measured = {int(run["seed"]) for run in rows_of("results") if run["recipe"] == name}
        seeds = [seed for seed in entry["seeds"] if seed not in measured]
        if not measured:
            missing.append(f"all of `{name}`")
        elif seeds:
            missing.append(f"{', '.join(map(str, seeds))} of `{name}`")
        if measured:
            table.append([cells[x] for x in header] + [entry.get(x, "") for x in last])
    if missing:
        table.append([f"seeds not run yet: {'; '.join(missing)}", *[""] * (len(header + last) - 1)])
    return markdown(*table)


def ablation_table(group):
    """A row per variant: its return on each task, and its score over all of them, from ablation.csv."""
    scores = {row["variant"]: row for row in rows_of("ablation") if row["group"] == group}
    recipes = {(entry["env_id"], name.split("-", 2)[2]): name for name, entry in group_of(group).items()}
    tasks = list(dict.fromkeys(task for task, _ in recipes))
    table = [["variant", *tasks, "score"], rule(2 + len(tasks))]
    for variant, score in scores.items():
        returns = [cells_of(recipes[task, variant])["training"] for task in tasks]
        table.append([variant.replace("-", " "), *returns, score_cell(score)])
    if not scores:
        table.append([NOT_MEASURED] + [""] * (1 + len(tasks)))
    return markdown(*table)


def score_cell(row):
    """`0.71 (0.60 to 0.82)` of a row of ablation.csv, in bold where it is clear."""
    text = f"{float(row['score']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})"
    return f"**{text}**" if row["clear"] == "yes" else text


def command_lines(group):
    """The commands of a group in a block of code, each after its name, in lines of at most 110 columns."""
    lines = ["```bash"]
    for name, entry in group_of(group).items():
        words = ["python", f"{entry['script']}.py", "--env-id", entry["env_id"], *entry["flags"].split()]
        wrapped = textwrap.wrap(" ".join(words), 106, break_long_words=False, break_on_hyphens=False)
        lines += [f"# {name}", *(" \\\n  ".join(wrapped)).split("\n")]
    return [*lines, "```"]


def comment_of(recipe):
    cells = cells_of(recipe)
    time = f"{cells['minutes']} minutes".replace("measured minutes", "measured")
    return f"# {recipe}: {time if time != '1 minutes' else '1 minute'}, return {cells['return']}"


# --- speed ---


def quartiles(numbers):
    """Median and, in brackets, quartiles."""
    if len(numbers) < 2:
        return f"{numbers[0]:.2f}"
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def on(name, gpu):
    """The rows of benchmark/<name>.csv whose task is one for a GPU, or those whose task is not."""
    return [row for row in rows_of(name) if row["task"].startswith("gpu ") == gpu]


def speed_table(gpu=False):
    """Medians over rounds; ratios are taken within a round."""
    rows = on("speed", gpu)
    header = ["task", "program", "steps/s", "x SB3", "environments", "policy", "update"]
    header += ["memory", "first iteration"]
    table = [header, rule(len(header))]
    sb3 = {(row["task"], row["round"]): float(row["sps"]) for row in rows if row["program"] == "sb3"}
    for task, program in dict.fromkeys((row["task"], row["program"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["program"]) == (task, program)]
        ratios = [float(row["sps"]) / sb3[task, row["round"]] for row in mine if (task, row["round"]) in sb3]
        keys = ("sps", "environment_ms", "policy_ms", "update_ms", "peak_mb", "first_iteration_s")
        sps, *times, memory, first = (statistics.median(float(row[key]) for row in mine) for key in keys)
        table.append(
            [
                task.removeprefix("gpu "),
                program,
                f"{sps:,.0f}",
                quartiles(ratios) if ratios else NOT_MEASURED,
                *(f"{x:,.0f} ms" for x in times),
                f"{memory:,.0f} MB",
                f"{first:.1f} s",
            ]
        )
    return markdown(*table)


def growth_table():
    """Steps per second and memory of each task, by number of environments."""
    rows = rows_of("growth")
    numbers = list(dict.fromkeys(row["num_envs"] for row in rows))
    table = [["`--num-envs`", *numbers], rule(1 + len(numbers))]
    for key, unit in (("sps", "steps/s"), ("peak_mb", "MB")):
        for task in dict.fromkeys(row["task"] for row in rows):
            found = {row["num_envs"]: f"{float(row[key]):,.0f}" for row in rows if row["task"] == task}
            table.append([f"{task}, {unit}", *(found.get(x, NOT_MEASURED) for x in numbers)])
    return markdown(*table)


def threads_table():
    """Medians over rounds; ratios to one run with one thread are taken within a round."""
    rows = rows_of("threads")
    header = ["at once", "one run, one thread", "one run, two threads", "two runs, one thread each"]
    table = [header, rule(len(header))]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        one = [float(row["one thread"]) for row in mine]
        cells = [f"{statistics.median(one):,.0f} steps/s"]
        for key in ("two threads", "two runs"):
            ratios = [float(row[key]) / x for row, x in zip(mine, one, strict=True)]
            cells.append(f"x {quartiles(ratios)}")
        table.append([task, *cells])
    return markdown(*table)


TABLES = {
    "speed": speed_table,
    "speed on a GPU": functools.partial(speed_table, gpu=True),
    "growth": growth_table,
    "threads": threads_table,
}
OF_GROUPS = {"recipes": recipes_table, "commands": command_lines, "ablation": ablation_table}


# --- details ---


@functools.cache
def tagged(script, folder=ROOT):
    """{tag: names of the functions and classes that carry it}, the docstring of the file left out."""
    source = (folder / f"ppo_{script}.py").read_text()
    tree = ast.parse(source)
    spans = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}".lstrip(".")
                spans.append((child.lineno, child.end_lineno, name))
            visit(child, name)

    visit(tree, "")
    found = {}
    for line_number, line in enumerate(source.splitlines(), 1):
        if line_number > tree.body[0].end_lineno:
            for tag in TAG.findall(line):
                around = [span for span in spans if span[0] <= line_number <= span[1]]
                found.setdefault(tag, []).append(max(around)[2] if around else "the file")
    return found


def where(tag):
    """`train`, in all three; or, for instance, `Agent` (discrete, continuous)."""
    scripts = {}
    for script in SCRIPTS:
        for name in tagged(script).get(tag, []):
            scripts.setdefault(name, []).append(script)
    places = [
        f"`{name}`" if len(files) == len(SCRIPTS) else f"`{name}` ({', '.join(files)})"
        for name, files in scripts.items()
    ]
    return ", ".join(places)


ABLATIONS = {
    "ablation-classic": "classic control",
    "ablation-mujoco": "MuJoCo",
    "ablation-atari": "Breakout",
}


def without(tag):
    """`0.71 (0.60 to 0.82) MuJoCo`: the scores of the scripts without a detail, from ablation.csv."""
    entries = [(name, x) for name, x in read_recipes().items() if x.get("without") == tag]
    variants = dict.fromkeys((entry["group"], name.split("-", 2)[2]) for name, entry in entries)
    scores = {(row["group"], row["variant"]): score_cell(row) for row in rows_of("ablation")}
    return ", ".join(f"{scores[x]} {ABLATIONS[x[0]]}" for x in variants if x in scores)


# --- files ---


def split(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def end_of_written(lines, start):
    """The number of the first line after the table or the block of code that begins at start, if one does."""
    if start < len(lines) and lines[start].startswith("```"):
        return lines.index("```", start + 1) + 1
    while start < len(lines) and lines[start].startswith("|"):
        start += 1
    return start


def updated(text):
    """A page as it should be."""
    lines, header, in_code = [], None, False
    old = text.splitlines()
    number_of = 0
    while number_of < len(old):
        line = old[number_of]
        number_of += 1
        if line.startswith("```"):
            in_code = not in_code
        mark = re.fullmatch(r"<!-- ([\w ]+) -->", line)
        of_group = re.fullmatch(r"<!-- (recipes|commands|ablation): ([\w-]+) -->", line)
        if of_group:
            lines += [line, *OF_GROUPS[of_group[1]](of_group[2])]
            number_of = end_of_written(old, number_of)
            continue
        comment = re.fullmatch(r"(python .*?)  # ([\w-]+): .*", line) if in_code else None
        if mark and mark[1] in TABLES:
            lines += [line, *TABLES[mark[1]]()]
            number_of = end_of_written(old, number_of)
            continue
        if comment:
            line = f"{comment[1]}  {comment_of(comment[2])}"
        if line.startswith("|") and not in_code:
            cells = split(line)
            if header is None:
                header = cells
            elif header[0] == "recipe" and cells[0].startswith("`"):
                new = cells_of(cells[0].strip("`"))
                line = markdown([new.get(name, cell) for name, cell in zip(header, cells, strict=True)]).pop()
            elif header[0] == "tag" and set(cells[0]) != {"-"}:
                named = zip(header, cells, strict=True)
                filled = {"where": where, "without it": without}
                line = markdown([filled[name](cells[0]) if name in filled else x for name, x in named]).pop()
        else:
            header = None
        lines.append(line)
    return "\n".join(lines) + "\n"


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
