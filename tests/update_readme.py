"""Write line numbers into the links of README.md: python tests/update_readme.py

The rows of details point to the lines with their tags, [name]: file.py#L1 "code" to the line with that code.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("discrete", "continuous", "atari")


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


if __name__ == "__main__":
    readme = ROOT / "README.md"
    row = re.compile(r"^\| ((?:core|cont|atari|ours) \d+) \|[^|]*\|", re.M)
    text = row.sub(lambda m: f"| {m[1]} | {where(m[1])} |", readme.read_text())
    link = re.compile(r'^(\[\w+\]: (\S+\.py)#L)\d+( "(.+)")$', re.M)
    text = link.sub(lambda m: f"{m[1]}{lines_with(m[2], m[4])[0]}{m[3]}", text)
    readme.write_text(text)
