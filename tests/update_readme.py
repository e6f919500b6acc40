"""Write line numbers and results into README.md: python tests/update_readme.py

The rows of details point to the lines with their tags; [name]: file.py#L1 "code" to the line with that code;
the rows of recipes, | `name` | ..., get the numbers of benchmark/results.csv, a number per seed; the tables
of speed are those of benchmark/speed.csv, growth.csv and threads.csv.
"""

import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmark"))
import speed  # noqa: E402

NAMES = ("discrete", "continuous", "atari")
COLUMNS = ("last_100_returns", "evaluated_mean", "deterministic_mean")


def lines_with(path, part):
    """Numbers of the lines of a file that contain part."""
    return [i for i, line in enumerate((ROOT / path).read_text().splitlines(), 1) if part in line]


def where(tag):
    """Links to the lines that carry [tag], one per script that has it."""
    links = []
    for name in NAMES:
        for number in lines_with(f"ppo_{name}.py", f"[{tag}]"):
            links.append(f"[{name}](ppo_{name}.py#L{number})")
    return " ".join(links)


def results():
    """{recipe: cells of the three columns, each with a number per seed}"""
    with (ROOT / "benchmark/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cells = {}
    for name in {row["recipe"] for row in rows}:
        runs = sorted((row for row in rows if row["recipe"] == name), key=lambda row: int(row["seed"]))
        numbers = [[float(run[column]) for run in runs if run[column]] for column in COLUMNS]
        cells[name] = [", ".join(f"{x:.{int(abs(x) < 1000)}f}" for x in column) or "-" for column in numbers]
    return cells


def updated(text):
    """README.md as it should be."""
    row = re.compile(r"^\| ((?:core|cont|atari|ours) \d+) \|[^|]*\|", re.M)
    text = row.sub(lambda m: f"| {m[1]} | {where(m[1])} |", text)
    link = re.compile(r'^(\[\w+\]: (\S+\.py)#L)\d+( "(.+)")$', re.M)
    text = link.sub(lambda m: f"{m[1]}{lines_with(m[2], m[4])[0]}{m[3]}", text)
    for start, name, table in (
        ("task", "speed", speed.table),
        ("`--num-envs`", "growth", speed.growth_table),
        ("at once", "threads", speed.share_table),
    ):
        with (ROOT / f"benchmark/{name}.csv").open(newline="") as file:
            lines = "".join(f"{line}\n" for line in table(list(csv.DictReader(file))))
        text = re.sub(rf"^\| {start} \|.*\n(?:\|.*\n)+", lambda m, lines=lines: lines, text, flags=re.M)
    row, cells = re.compile(r"^\| `([\w-]+)` \|[^|\n]*\|[^|\n]*\|[^|\n]*\|", re.M), results()
    known = (ROOT / "benchmark/recipes.sh").read_text()
    cells |= {
        name: ["not measured"] * 3 for name in re.findall(r"^recipe (\S+)", known, re.M) if name not in cells
    }
    return row.sub(lambda m: f"| `{m[1]}` | {' | '.join(cells[m[1]])} |" if m[1] in cells else m[0], text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
