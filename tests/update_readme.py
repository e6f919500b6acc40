"""Write the line numbers of the detail tags into README.md: python tests/update_readme.py"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("discrete", "continuous", "atari")


def where(tag):
    """Links to the lines that carry [tag], one per script that has it."""
    links = []
    for name in NAMES:
        for number, line in enumerate((ROOT / f"ppo_{name}.py").read_text().splitlines(), 1):
            if f"[{tag}]" in line and not line.startswith("details of https"):
                links.append(f"[{name}](ppo_{name}.py#L{number})")
    return " ".join(links)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    row = re.compile(r"^\| ((?:core|cont|atari|ours) \d+) \|[^|]*\|", re.M)
    readme.write_text(row.sub(lambda m: f"| {m[1]} | {where(m[1])} |", readme.read_text()))
