"""The repository as a whole: licence, citation, and nothing of the machine it was written on."""

import re
import subprocess

from conftest import ROOT


def test_licence_and_citation():
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License") and "Permission is hereby granted, free of charge" in licence
    citation = (ROOT / "CITATION.cff").read_text()
    for key in ("cff-version", "message", "title", "authors", "license"):
        assert re.search(rf"^{key}:", citation, re.M), key
    assert re.search(r"^license: *\"?MIT", citation, re.M) and "\t" not in citation


def tracked_texts():
    """(path, text) of the files of the repository; of all of a copy without .git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.split("\0")[:-1] if done.returncode == 0 else []
    hidden = re.compile(r"(^|/)(\.git|\.venv|runs|\w*cache\w*|__pycache__)/")
    everything = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
    for name in names or [name for name in everything if not hidden.search(name)]:
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:
            yield name, data.decode()


def test_nothing_of_the_machine_it_was_written_on():
    """No absolute path of it, no host that packages came from but the public ones."""
    found, count = [], 0
    folders = "|".join(["work", "tmp", "root", "home", "Users"])
    path = re.compile(rf"(?<![\w.~$}}>:/*-])/(?:{folders})(?:/|\b)")
    index = re.compile(r"--(?:extra-)?index-url[ =]+(?!https://(?:download\.pytorch\.org|pypi\.org)/)\S+")
    host = re.compile("trusted" + "-host|find" + r"-links|\b(?:10|127|192\.168)\.\d+\.\d+(?:\.\d+)?:\d+")
    for name, content in tracked_texts():
        count += 1
        for number, line in enumerate(content.splitlines(), 1):
            if any(pattern.search(line) for pattern in (path, index, host)):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert count >= 8 and not found, "\n".join(found)
