"""Make the patches anew after a script has changed: python variants/renew.py COMMIT

COMMIT is the last one in which they fit. What a patch did to the script there is merged with what was done to
the script since; where both changed the same lines, the patch is left as it is and named.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command, folder, check=True):
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # as if outside of a repository
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=check)


def renewed(patch, commit):
    """The text of the patch for the present script; None if it cannot be merged."""
    old = run("git", "show", f"{commit}:{patch.relative_to(ROOT).as_posix()}", folder=ROOT).stdout
    name = next(line for line in old.splitlines() if line.startswith("+++ b/")).removeprefix("+++ b/")
    before, now = run("git", "show", f"{commit}:{name}", folder=ROOT).stdout, (ROOT / name).read_text()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        for copy, text in (("a", now), ("b", now), ("old", before), (".", before)):
            (folder / copy).mkdir(exist_ok=True)
            (folder / copy / name).write_text(text)
        (folder / "patch").write_text(old)
        run("git", "apply", "patch", folder=folder)
        if run("git", "merge-file", f"b/{name}", f"old/{name}", name, folder=folder, check=False).returncode:
            return None
        names = ("--no-prefix", f"a/{name}", f"b/{name}")
        lines = run("git", "diff", "--no-index", *names, folder=folder, check=False).stdout.splitlines()
    return "\n".join(x for x in lines if not x.startswith(("diff ", "index "))) + "\n"


def main(commit):
    for patch in sorted([*ROOT.glob("variants/*.patch"), *ROOT.glob("benchmark/ablations/*.patch")]):
        new = renewed(patch, commit)
        if new is None:
            print(f"{patch.relative_to(ROOT)}: both changed the same lines, do this one by hand")
        elif new != patch.read_text():
            patch.write_text(new)
            print(f"{patch.relative_to(ROOT)}: renewed")


if __name__ == "__main__":
    main(sys.argv[1])
