"""README.md and docs/: links, commands, snippets, flags, metrics, tags, and what update_docs.py writes."""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import operator
import re
import shlex
import sys
from pathlib import Path

import gymnasium
import pytest
import torch
import tyro
from conftest import NAMES, ROOT, SCRIPTS, scalars
from test_siblings import TAGS

sys.path.append(str(ROOT / "benchmark"))
import update_docs

PAGES = {page.relative_to(ROOT).as_posix(): page for page in update_docs.pages()}
OTHER_FLAGS = {  # of other programs
    "--help",
    "--logdir",
    "--cuda",
    "--no-cuda",
    "--no-deps",
    "--no-build-isolation",
    "--ignore-requires-python",
    "--save-model",
    "--upload-model",
    "--hf-entity",
    "--again",
    "--list",
    "--tasks",
    "--standalone",
    "--nnodes",
    "--node-rank",
    "--nproc-per-node",
    "--master-addr",
    "--master-port",
    "--shutdown-timeout",
}
TINY = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1}
TINY |= {"total_timesteps": 64, "max_episode_steps": 20, "device": "cpu"}


def module(name):
    return importlib.import_module(name)


def blocks(text, *languages):
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.M | re.S)


def prose(text):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text):
    """(script, arguments) of each `python ppo_....py` in the bash blocks, and of each torchrun; $seed and the
    like stand for 1."""
    found = []
    for block in blocks(text, "bash"):
        for part in re.split(r"&+|;|\n|\bdo\b", re.sub(r"#.*", "", block).replace("\\\n", " ")):
            words = shlex.split(part)
            if words[:1] == ["torchrun"]:
                words = re.sub(r".* (?=ppo_\w+\.py)", "python ", part).split()
            if words[:1] == ["python"] and words[1].startswith("ppo_"):
                arguments = ["1" if word.startswith("$") else word for word in words[2:]]
                found.append((words[1].removesuffix(".py"), arguments))
    return found


@functools.cache
def parsed(name, arguments):
    return tyro.cli(module(name).Args, args=arguments)


def section(page, heading):
    """The text of a page under a heading of the second level, up to the next one."""
    return PAGES[page].read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


# --- what update_docs.py writes ---


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_update_docs_writes(page):
    """Otherwise: python benchmark/update_docs.py"""
    text = PAGES[page].read_text()
    assert update_docs.updated(text) == text


def test_update_docs_fills_tables(monkeypatch):
    runs_of = update_docs.runs_of
    monkeypatch.setattr(update_docs, "runs_of", lambda x: runs_of(x)[: None if x == "acrobot" else 0])
    page = "| task | steps | evaluated | x |\n| --- | --- | --- | --- |\n"
    page += "| Acrobot-v1 | ? | ? | kept |\n| Pendulum-v1 | ? | ? | kept |\n"
    page += "\n| tag | why | without it |\n| --- | --- | --- |\n| core 7 | kept | ? |\n"
    page += "\n<!-- speed -->\n| old |\nthe end\n"
    new = update_docs.updated(page)
    evaluated = update_docs.cells_of("acrobot")["evaluated"]
    assert f"| Acrobot-v1 | 499,712 | {evaluated} | kept |" in new and re.fullmatch(r"\S+ ± \S+", evaluated)
    assert "| Pendulum-v1 | not measured | not measured | kept |" in new
    assert f"| core 7 | kept | {update_docs.without('core 7')} |" in new
    assert "old" not in new and "the end" in new and "| task | program |" in new and "?" not in new
    assert update_docs.updated(new) == new


def test_means_and_spreads():
    assert update_docs.mean_and_spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert update_docs.mean_and_spread([1000.0, 3000.0]) == "2000 ± 1414"
    assert update_docs.mean_and_spread([4000.0, 4002.0]) == "4001 ± 1"
    assert update_docs.mean_and_spread([5.0]) == "5.0 (one seed)"
    assert update_docs.mean_and_spread([]) == "not measured"


def test_chance_is_the_share_of_splits_that_are_at_least_as_far_apart():
    assert update_docs.chance([1, 2], [3, 4]) == pytest.approx(2 / 6)  # {1, 2} and {3, 4}
    assert update_docs.chance([2, 3], [1, 4]) == 1
    assert update_docs.chance([8, 9], [1, 2, 3]) == pytest.approx(1 / 10)
    assert update_docs.chance([1, 1], [1, 1, 1]) == 1


# --- links ---


def anchors(page):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """Targets of [text](target), ![picture](target) and [name]: target; uses of names are checked below."""
    text = re.sub(r"`[^`\n]*`", "", prose(text))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = PAGES[page].read_text()
    for link in links(text):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
        assert path.is_relative_to(ROOT) and path.exists(), link
        assert not anchor or anchor in anchors(path), link
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.M))
    assert set(re.findall(r"\]\[(\w+)\]", text)) == defined


@pytest.mark.parametrize("page", PAGES)
def test_no_link_goes_to_a_line(page):
    assert not re.search(r"#L\d+|\blines? \d+", PAGES[page].read_text())


def test_the_readme_is_a_first_screen_and_leads_to_every_page():
    text = PAGES["README.md"].read_text()
    assert len(text.splitlines()) <= 150
    assert {name for name in PAGES if name != "README.md"} <= set(links(text))


# --- commands and snippets ---


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    for name, arguments in commands(PAGES[page].read_text()):
        if arguments != ["--help"]:
            assert isinstance(parsed(name, tuple(arguments)), module(name).Args)


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_name_files_that_exist(page):
    for block in blocks(PAGES[page].read_text(), "bash"):
        for path in re.findall(r"\b((?:benchmark|tests)/[\w/]+\.(?:py|sh|txt))", block):
            assert (ROOT / path).exists(), path


def test_the_results_show_every_recipe():
    """In one table each, but for groups that were not run yet; settings that are not defaults as commands.
    Variants of an ablation or a selection are rows under their own names."""
    text = "\n".join(PAGES[f"docs/{page}.md"].read_text() for page in ("results", "experiments"))
    shown = [(name, parsed(name, tuple(arguments))) for name, arguments in commands(text)]
    measured = set(update_docs.rows_of("results")["recipe"])
    for recipe, entry in update_docs.read_recipes().items():
        mark = f"<!-- variants: {entry['group']} -->"
        if recipe in measured and mark in text:
            table = text.partition(mark)[2].partition("\n\n")[0]
            assert f"| {recipe.split('-', 2)[2].replace('-', ' ')} |" in table, recipe
        elif recipe in measured:
            assert text.count(f"| `{recipe}` |") == 1, recipe
        if entry["group"] in ("strong", "tutorials", "gpu"):
            arguments = ("--env-id", entry["env_id"], *entry["flags"].split())
            assert (entry["script"], parsed(entry["script"], arguments)) in shown, recipe


TUTORIALS = commands(section("docs/experiments.md", "As five tutorials teach it"))


def test_there_are_five_tutorials():
    assert len(TUTORIALS) == 6 and {name for name, _ in TUTORIALS} == set(NAMES)  # the fifth has two


@pytest.mark.parametrize("number", range(len(TUTORIALS)))
def test_the_recipe_of_a_tutorial_runs(number, cli):
    """Two iterations of as few steps as its minibatches allow, one episode of at most 50 steps."""
    name, arguments = TUTORIALS[number]
    args = parsed(name, tuple(arguments))
    steps = math.lcm(2 * args.num_minibatches, args.num_envs) // args.num_envs
    sizes = {"num_steps": steps, "total_timesteps": 2 * steps * args.num_envs, "max_episode_steps": 50}
    sizes |= {"eval_episodes": 1, "num_threads": 1, "device": "cpu", "run_dir": "run"}
    short = [x for key, value in sizes.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    code, out, err = cli(module(name), *arguments, *short)
    assert code == 0 and "evaluate it" in out, err
    saved = torch.load("run/checkpoint.pt", weights_only=True)
    assert saved["global_step"] == sizes["total_timesteps"]
    assert bool(list(Path("run").rglob("*.mp4"))) == args.capture_video


SNIPPETS = [(page, text) for page in PAGES for text in blocks(PAGES[page].read_text(), "python")]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number):
    """After a tiny training where it reads a checkpoint; what it trains itself is made tiny."""
    page, code = SNIPPETS[number]
    sizes = ", ".join(f"{key}={value!r}" for key, value in TINY.items())
    code = re.sub(r"Args\(total_timesteps=[\d_]+", f"Args({sizes}", code)
    code = re.sub(r"num_episodes=\d+", "num_episodes=1", code)
    for name in re.findall(r"from (ppo_\w+) import .*load_", code):
        (run_dir,) = re.findall(r"load_\w+\(\"([\w/-]+?)(?:/checkpoint\.pt)?\"\)", code)
        module(name).train(module(name).Args(run_dir=run_dir, **TINY))
    names = {"__name__": "snippet"}
    exec(compile(code, page, "exec"), names)
    assigned = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    written = (x for node in assigned for x in ast.walk(node) if isinstance(x, ast.Name))
    defined = {x.id for x in written if isinstance(x.ctx, ast.Store)}
    assert defined <= names.keys() and len(names) > 2, "it ran to its end"


def test_there_are_snippets_for_each_script():
    assert set(re.findall(r"from (ppo_\w+) import", " ".join(code for _, code in SNIPPETS))) == set(NAMES)


def test_the_environment_of_the_docs_trains(discrete, monkeypatch):
    (code,) = [code for _, code in SNIPPETS if "class MyEnv" in code]
    Path("my_env.py").write_text(code)
    gymnasium.registry.pop("MyEnv-v0", None)  # of test_a_snippet_runs
    monkeypatch.syspath_prepend(".")
    result = discrete.train(discrete.Args(env_id="my_env:MyEnv-v0", **TINY))
    assert result["global_step"] == 64 and 0 <= result["episodic_return"] <= 1


# --- names, flags, metrics, tags ---

# in code spans, but not of the scripts
OTHER_NAMES = {
    "PPO_SCRIPTS",
    "PICTURE",
    "a3",
    "code",
    "evaluate_policy",
    "lstm",
    "my_env",
    "render",
    "render_modes",
}
OTHER_NAMES |= {"Normal", "np_random", "ruff", "scancel", "uv"}


def test_names_in_the_text_exist():
    """Each name in a `code span`, such as `Agent.act`, is one of the scripts or of benchmark/."""
    files = [*(SCRIPTS / f"{name}.py" for name in NAMES), *(ROOT / "benchmark").glob("*.*")]
    sources = " ".join(file.read_text() for file in files if file.suffix in (".py", ".csv", ".sh"))
    known = set(re.findall(r"[A-Za-z_]\w*", sources)) | OTHER_NAMES | set(update_docs.read_recipes())
    for page, path in PAGES.items():
        names = re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", prose(path.read_text()))
        names = [name for name in names if not re.search(r"\.(py|csv|md|sh|txt|pt)$", name)]
        assert {word for name in names for word in name.split(".")} <= known, page


def flags(name):
    found = set()
    for field in dataclasses.fields(module(name).Args):
        flag = field.name.replace("_", "-")
        found |= {f"--{flag}"} | ({f"--no-{flag}"} if isinstance(field.default, bool) else set())
    return found


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", PAGES[page].read_text()))
    assert named <= set.union(*map(flags, NAMES)) | OTHER_FLAGS, page


def test_every_flag_that_cleanrl_lacks_is_listed():
    """The list of differences-from-cleanrl.md has flags that exist in one of the scripts, each once."""
    listed = re.findall(
        r"`(--[a-z-]+)`", PAGES["docs/differences-from-cleanrl.md"].read_text().split("Not there:")[1]
    )
    assert len(listed) == len(set(listed)) > 15 and set(listed) <= set.union(*map(flags, NAMES))


def test_every_metric_is_explained_and_exists(script):
    """Each scalar that a run logs has a row in docs/metrics.md."""
    args = script.Args(objective="kl-penalty", run_dir="run", **TINY)
    logged = set(scalars(script.train(args)))
    rows = re.findall(r"^\| `((?:charts|losses)/\w+)` \|", PAGES["docs/metrics.md"].read_text(), re.M)
    absent = set() if script.__name__ == "ppo_continuous" else {"charts/action_std"}
    assert set(rows) - absent == logged and len(rows) == len(set(rows))


def details():
    """{tag: its row} of the table of details."""
    lines = section("docs/how-ppo-works.md", "Every detail").splitlines()
    rows = [update_docs.split(line) for line in lines if re.match(r"\| \w+ \d+ \|", line)]
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1:] for row in rows}


def test_the_table_of_details_has_every_tag():
    table = details()
    assert list(table) == list(TAGS)
    for tag, (what, where, why, without) in table.items():
        assert len(what.split()) >= 2 and len(why.split()) >= 3, tag
        name, _, only = where.replace("`", "").partition(" ")  # `Agent` (discrete, continuous)
        assert TAGS[tag] == (tuple(f"ppo_{x}" for x in only.strip("()").split(", ")) if only else NAMES), tag
        for script in TAGS[tag]:
            function = operator.attrgetter(name)(importlib.import_module(script))
            assert f"[{tag}]" in inspect.getsource(function), tag
        assert without == update_docs.without(tag), tag


def test_tags_in_the_text_exist():
    for page, path in PAGES.items():
        found = re.findall(r"\[((?:core|cont|atari|ours) \d+)\]", path.read_text())
        assert set(found) <= set(TAGS), page
