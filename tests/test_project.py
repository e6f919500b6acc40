"""The repository: the three files against each other, the tags, the dependencies, the README, the licence."""

import ast
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import math
import operator
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import torch
import tyro
import update_readme
from conftest import NAMES, ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PAIRS = list(itertools.combinations(NAMES, 2))
MLP = NAMES[:2]


def module(name):
    return importlib.import_module(name)


def text(name):
    return (SCRIPTS / f"{name}.py").read_text()


def readme():
    return (ROOT / "README.md").read_text()


# --- siblings ---

IDENTICAL = "UsageError require layer_init compute_gae ppo_loss load_checkpoint load_agent main"


def changed_lines(one, other, what):
    """The lines, beginning with + or -, in which a function of two scripts differs."""
    sources = [inspect.getsource(getattr(module(name), what)).splitlines() for name in (one, other)]
    return [x for x in difflib.unified_diff(*sources, n=0, lineterm="") if x[0] in "+-"][2:]


@pytest.mark.parametrize("one, other", PAIRS)
@pytest.mark.parametrize("what", IDENTICAL.split())
def test_what_siblings_share_is_identical(one, other, what):
    assert not changed_lines(one, other, what)


@pytest.mark.parametrize("what", ["mlp", "ScaleReward", "Agent.normalize", "Agent.get_value"])
def test_what_vector_siblings_share_is_identical(what):
    sources = [inspect.getsource(operator.attrgetter(what)(module(name))) for name in MLP]
    assert sources[0] == sources[1]


@pytest.mark.parametrize("one, other", PAIRS)
def test_train_differs_where_the_domain_does(one, other):
    changed = changed_lines(one, other, "train")
    assert 0 < len(changed) <= 16, "\n".join(changed)


@pytest.mark.parametrize("one, other", PAIRS)
def test_check_args_differs_where_flags_do(one, other):
    """hidden_sizes, a tuple, is not in the Atari file; a log may be negative; mps lacks float64."""
    changed = changed_lines(one, other, "check_args")
    domain = "hidden_sizes|counts =|limits =|tuple|isinstance|isfinite|require\\(good|low, high|there = args"
    assert len(changed) <= 12 and all(re.search(domain, line) for line in changed), "\n".join(changed)


@pytest.mark.parametrize("name", NAMES)
def test_no_script_imports_another_or_anything_of_the_repository(name):
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not imports(name) & (local | set(NAMES))


def comments_of_flags(name):
    """{field of Args: its comment, which is the help text}."""
    return dict(re.findall(r"^    (\w+): .*?=.*?  # (.*)$", inspect.getsource(module(name).Args), re.M))


def test_flags_are_in_all_files_or_tied_to_the_domain():
    flags = {name: {field.name for field in dataclasses.fields(module(name).Args)} for name in NAMES}
    common = set.intersection(*flags.values())
    mlp = {"hidden_sizes", "activation", "vectorization", "norm_obs", "norm_reward"}
    own = {
        "ppo_discrete": mlp,
        "ppo_continuous": mlp | {"init_log_std", "learn_std"},
        "ppo_atari": {"precision"},
    }
    assert {name: flags[name] - common for name in NAMES} == own


def test_flags_that_mean_the_same_say_the_same():
    """And stand in the same order, so that a diff of two files shows what differs."""
    domain = {"device", "num_threads", "env_id", "total_timesteps", "max_episode_steps"}
    for one, other in PAIRS:
        a, b = comments_of_flags(one), comments_of_flags(other)
        fields = {name: [f.name for f in dataclasses.fields(module(name).Args)] for name in (one, other)}
        shared = [name for name in fields[one] if name in fields[other]]
        assert shared == [name for name in fields[other] if name in fields[one]]
        assert {k: a[k] for k in shared if k not in domain} == {k: b[k] for k in shared if k not in domain}


# --- form ---


@pytest.mark.parametrize("name", NAMES)
def test_a_script_has_at_most_480_lines(name):
    assert len(text(name).splitlines()) <= 480


@pytest.mark.parametrize("name", NAMES)
def test_no_line_has_more_than_110_columns(name):
    assert not [i for i, line in enumerate(text(name).splitlines(), 1) if len(line) > 110]


def test_everything_is_formatted():
    """By ruff, with the settings of pyproject.toml."""
    files = [*(SCRIPTS / f"{name}.py" for name in NAMES), ROOT / "tests"]
    for command in (["format", "--check"], ["check"]):
        call = [sys.executable, "-m", "ruff", *command, "--config", ROOT / "pyproject.toml", *files]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- details ---

TAGS = {
    **{f"core {n}": NAMES for n in range(1, 13)},
    "core 13": MLP,
    **{f"cont {n}": ("ppo_continuous",) for n in range(1, 6)},
    **{f"cont {n}": MLP for n in range(6, 10)},
    **{f"atari {n}": ("ppo_atari",) for n in range(1, 10)},
    **{f"ours {n}": NAMES for n in range(1, 6)},
    "ours 6": MLP,
}


def tagged_lines(name):
    """{tag: numbers of the lines that carry it}, the docstring of the file left out."""
    tree, found = ast.parse(text(name)), {}
    for number, line in enumerate(text(name).splitlines(), 1):
        if number > tree.body[0].end_lineno:
            for tag in re.findall(r"\[((?:core|cont|atari|ours) \d+)\]", line):
                found.setdefault(tag, []).append(number)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_detail_is_tagged_once_where_it_applies(name):
    found = tagged_lines(name)
    assert set(found) == {tag for tag, names in TAGS.items() if name in names}
    assert {tag: lines for tag, lines in found.items() if len(lines) != 1} == {}


@pytest.mark.parametrize("tag", TAGS)
def test_the_readme_maps_a_detail_to_its_lines(tag):
    rows = [line for line in readme().splitlines() if line.startswith(f"| {tag} |")]
    assert len(rows) == 1, f"a row | {tag} | links | why |"
    cells = [cell.strip() for cell in rows[0].strip().strip("|").split("|")]
    links = re.findall(r"\((ppo_\w+)\.py#L(\d+)\)", rows[0])
    assert [name for name, _ in links] == [name for name in NAMES if name in TAGS[tag]]
    for name, line in links:
        assert tagged_lines(name)[tag] == [int(line)], f"{name}.py"
    assert len(cells) >= 3 and len(cells[-1].split()) >= 3, "the reason why"


def test_why_it_works_links_each_formula_to_the_line_that_computes_it():
    """[name]: file.py#L1 "code": that line alone has the code; every link is used; 30 lines at most."""
    (section,) = re.findall(r"^## Why it works\n\n(.*?)\n+(?=## )", readme(), re.M | re.S)
    links = re.findall(r'^\[(\w+)\]: (ppo_\w+)\.py#L(\d+) "(.+)"$', section, re.M)
    assert {name for name, *_ in links} == set(re.findall(r"\]\[(\w+)\]", section)) and len(links) >= 8
    for _, name, number, code in links:
        found = [i for i, line in enumerate(text(name).splitlines(), 1) if code in line]
        assert found == [int(number)], code
    assert len(section.splitlines()) <= 30


# --- dependencies ---

PACKAGES = {"ale_py": "ale-py", "pygame": "pygame-ce"}


def imports(name):
    """Top-level names of all modules that a script imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            found.add(node.module.split(".")[0])
    return found


def pins(lines):
    """{package: version} of lines package==version."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in lines]
    return dict(re.fullmatch(r"([\w.-]+)==([\w.+]+)", line).groups() for line in lines if line)


def script_block(name):
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text(name), re.M)
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


@pytest.mark.parametrize("name", NAMES)
def test_the_script_block_agrees_with_requirements_and_imports(name):
    block = script_block(name)
    dependencies = pins(block["dependencies"])
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    assert dependencies.items() <= requirements.items()
    needed = {PACKAGES.get(x, x) for x in imports(name) - set(sys.stdlib_module_names) - {"wandb"}}
    shows = {"ppo_discrete": "pygame-ce", "ppo_continuous": "mujoco", "ppo_atari": "ale-py"}
    assert needed | {"moviepy", shows[name]} <= set(dependencies)
    assert re.fullmatch(r">=3\.\d+", block["requires-python"])


def test_the_script_blocks_ask_for_one_python():
    assert len({script_block(name)["requires-python"] for name in NAMES}) == 1


def test_requirements_are_exact_and_installed():
    for package, version in pins((ROOT / "requirements.txt").read_text().splitlines()).items():
        assert importlib.metadata.version(package).split("+")[0] == version.split("+")[0], package


# --- README ---


def readme_commands():
    """(script, arguments) of every `python ppo_....py` in the README's bash and console blocks."""
    found = []
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", readme(), re.M | re.S):
        for part in re.split(r"&&|;|\n", block.replace("\\\n", " ")):
            words = shlex.split(part.removeprefix("$ "), comments=True)
            if words[:1] == ["python"] and words[1].startswith("ppo_"):
                words = [word for word in words if word != "&"]
                found.append((words[1].removesuffix(".py"), words[2:]))
    return found


def test_readme_commands_parse():
    """By the command line of their script; a word like $seed stands for a number."""
    assert {name for name, _ in readme_commands()} == set(NAMES)
    for name, argv in readme_commands():
        argv = ["1" if word.startswith("$") else word for word in argv]
        if argv != ["--help"]:
            assert isinstance(tyro.cli(module(name).Args, args=argv), module(name).Args)


def test_readme_trainings_run(monkeypatch, capsys):
    """Two iterations each, episodes of at most 50 steps."""
    trained = 0
    for number, (name, argv) in enumerate(readme_commands()):
        argv = ["1" if word.startswith("$") else word for word in argv]
        if argv == ["--help"]:
            continue
        args = tyro.cli(module(name).Args, args=argv)
        package = args.env_id.split(":")[0] if ":" in args.env_id else None
        theirs = args.track or (package and not importlib.util.find_spec(package))  # needs what is not here
        if args.resume or args.evaluate or theirs:
            continue
        steps = math.lcm(2 * args.num_minibatches, args.num_envs) // args.num_envs
        sizes = dict(num_steps=steps, total_timesteps=2 * steps * args.num_envs, eval_episodes=1)
        sizes |= dict(max_episode_steps=50, device="cpu", run_dir=f"run-{number}", num_threads=1)
        short = [x for key, value in sizes.items() for x in (f"--{key.replace('_', '-')}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv, *short])
        monkeypatch.setattr(module(name).signal, "signal", lambda *args: None)
        module(name).main()
        saved = torch.load(f"run-{number}/checkpoint.pt", weights_only=True)
        assert saved["iteration"] == 2 and "evaluate it" in capsys.readouterr().out
        trained += 1
    assert trained >= 3


def recipes():
    """{name: (script, arguments)} of benchmark/recipes.sh."""
    script = (ROOT / "benchmark" / "recipes.sh").read_text().replace("\\\n", " ")
    words = [shlex.split(line) for line in script.splitlines() if line.startswith("recipe ")]
    return {name: (file.removesuffix(".py"), argv) for _, name, file, *argv in words}


def test_the_readme_shows_the_recipes_as_they_were_run():
    """Each command of recipes.sh is one of the README's, which test_readme_trainings_run starts."""
    shown = [(name, tyro.cli(module(name).Args, args=argv)) for name, argv in readme_commands()]
    for recipe, (name, argv) in recipes().items():
        assert (name, tyro.cli(module(name).Args, args=argv)) in shown, recipe
        assert f"| `{recipe}` |" in readme(), recipe
    assert len(recipes()) >= 10


def test_numbers_of_the_readme_are_those_of_the_code_and_of_the_results():
    """Otherwise: python tests/update_readme.py. Tables of returns have rows of recipes only."""
    tables = re.findall(r"^\| recipe \|.*\n\|.*\n((?:\|.*\n)+)", readme(), re.M)
    rows = [re.match(r"\| `(\S+)` \|", line)[1] for table in tables for line in table.splitlines()]
    assert set(rows) == set(recipes())
    assert update_readme.updated(readme()) == readme()


def test_the_readme_snippet_acts_with_a_checkpoint():
    (snippet,) = [x for x in re.findall(r"^```python\n(.*?)^```", readme(), re.M | re.S) if "load_agent" in x]
    (name,) = re.findall(r"from (ppo_\w+) import", snippet)
    (run_dir,) = re.findall(r"[\"'](\S+)/checkpoint\.pt[\"']", snippet)
    args = dict(num_envs=1, num_steps=16, num_minibatches=2, update_epochs=1, total_timesteps=16)
    module(name).train(module(name).Args(run_dir=run_dir, **args))
    names = {"__name__": "snippet"}
    exec(compile(snippet, "README.md", "exec"), names)
    assert any(isinstance(x, module(name).Agent) for x in names.values())
    assert len([line for line in snippet.splitlines() if line.strip()]) <= 12


def test_the_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", readme())
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert local and [link for link in local if not (ROOT / link).exists()] == []


def test_the_readme_explains_every_metric(script):
    """Each scalar that a run logs is named in the README."""
    sizes = dict(num_envs=1, num_steps=64, num_minibatches=2, update_epochs=1, total_timesteps=64)
    result = script.train(script.Args(max_episode_steps=20, **sizes))
    events = EventAccumulator(str(result["run_dir"])).Reload()
    keys = events.Tags()["scalars"]
    assert len(keys) >= 12 and [key for key in keys if key not in readme()] == []


# --- licence and the rest ---


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
