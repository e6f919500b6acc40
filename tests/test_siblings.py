"""The three files against each other: what they share byte for byte, how the rest differs, tags, sizes."""

import ast
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import io
import itertools
import operator
import re
import sys
import tokenize
import tomllib

import pytest
from conftest import MLP, NAMES, ROOT, SCRIPTS
from mutants import MUTANTS

PAIRS = list(itertools.combinations(NAMES, 2))


def module(name):
    return importlib.import_module(name)


def text(name):
    return (SCRIPTS / f"{name}.py").read_text()


def source(name, what):
    """The source of a function or class of a script, or of a method: Agent.act."""
    return inspect.getsource(operator.attrgetter(what)(module(name)))


def test_every_mutant_finds_its_fragment():
    """Once in the scripts as they are; tests/mutants.py itself takes too long to run with the tests."""
    for mutant in MUTANTS:
        assert (ROOT / f"ppo_{mutant.script}.py").read_text().count(mutant.old) == 1, mutant


# --- functions and classes ---

# What all three share. Tests of these run on one script.
IDENTICAL = """layer_init compute_gae ppo_loss adapt_kl_coef UsageError require load_agent
evaluate check_finite open_log write_log"""
# What the two scripts for vectors share besides.
IDENTICAL_MLP = """mlp Agent.normalize Agent.get_value Agent.act running_mean_var LearningEnvs.__init__
LearningEnvs.close DropInfos check_observation compute_gradients prepare
compiled save_checkpoint restore main"""
# What the domain changes, and nothing else: each is in all three.
DOMAIN = {"Args", "Agent", "train", "LearningEnvs", "make_envs", "load_checkpoint"}
ATARI_ONLY = {"RecordColour", "keep_freed_memory", "captured", "join_processes", "agree"}


@pytest.mark.parametrize("what", IDENTICAL.split())
def test_what_siblings_share_is_identical(what):
    """Byte for byte, comments and docstrings too."""
    assert len({source(name, what) for name in NAMES}) == 1


@pytest.mark.parametrize("what", IDENTICAL_MLP.split())
def test_what_vector_siblings_share_is_identical(what):
    """Byte for byte, comments and docstrings too."""
    assert source(MLP[0], what) == source(MLP[1], what)


def defined(name):
    """The functions and classes at the top level of a script."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.parse(text(name)).body if isinstance(node, kinds)}


def test_every_function_is_shared_or_of_the_domain():
    """A new one has to be put in one of the lists above."""
    shared, vectors = set(IDENTICAL.split()), {x for x in IDENTICAL_MLP.split() if "." not in x}
    assert defined("ppo_discrete") == defined("ppo_continuous") == shared | vectors | DOMAIN
    in_atari_too = {"compute_gradients", "prepare", "save_checkpoint", "restore", "main"}
    assert defined("ppo_atari") == shared | in_atari_too | DOMAIN | ATARI_ONLY


def changed(one, other, what):
    """The lines, beginning with + or -, in which a function of two scripts differs."""
    sources = [source(name, what).splitlines() for name in (one, other)]
    return [x for x in difflib.unified_diff(*sources, n=0, lineterm="") if x[0] in "+-"][2:]


@pytest.mark.parametrize(
    "one, other, what, most",
    [
        ("ppo_discrete", "ppo_continuous", "train", 16),
        ("ppo_discrete", "ppo_atari", "train", 60),
        ("ppo_discrete", "ppo_continuous", "LearningEnvs", 12),
        ("ppo_discrete", "ppo_continuous", "make_envs", 16),
        ("ppo_discrete", "ppo_continuous", "load_checkpoint", 10),
        ("ppo_discrete", "ppo_atari", "load_checkpoint", 10),
        ("ppo_discrete", "ppo_atari", "compute_gradients", 4),
        ("ppo_discrete", "ppo_atari", "save_checkpoint", 4),
        ("ppo_discrete", "ppo_atari", "restore", 4),
        ("ppo_discrete", "ppo_atari", "prepare", 20),
        ("ppo_discrete", "ppo_atari", "main", 24),
    ],
)
def test_a_function_differs_little_where_the_domain_does(one, other, what, most):
    """Changed lines of a diff; a reader who knows one file finds what is new in another at once."""
    lines = changed(one, other, what)
    assert 0 < len(lines) <= most, "\n".join(lines)


def test_no_script_imports_another_or_anything_of_the_repository():
    """A copied file runs by itself."""
    local = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    for name in NAMES:
        assert not imports(name) & (local | set(NAMES)), name


# --- flags ---


def explained(name):
    """{field of Args: its comment, which is the help text}."""
    code = source(name, "Args")
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(code).body[0].body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: " ".join(comments.get(i, "") for i in range(node.lineno, node.end_lineno + 1)).strip()
        for node in fields
    }


def test_flags_are_in_all_files_or_tied_to_the_domain():
    """One that is not in all three has a meaning for its domain only."""
    flags = {name: {field.name for field in dataclasses.fields(module(name).Args)} for name in NAMES}
    common = set.intersection(*flags.values())
    mlp = {"hidden_sizes", "activation", "vectorization", "norm_obs", "norm_reward", "compile"}
    own = {
        "ppo_discrete": mlp,
        "ppo_continuous": mlp | {"init_log_std", "learn_std"},
        "ppo_atari": {"precision", "cuda_graphs"},
    }
    assert {name: flags[name] - common for name in NAMES} == own


@pytest.mark.parametrize("one, other", PAIRS)
def test_flags_that_mean_the_same_say_the_same(one, other):
    """And stand in the same order, so that a diff of two files shows what differs."""
    domain = {"device", "num_threads", "env_id", "total_timesteps", "max_episode_steps", "deterministic"}
    a, b = explained(one), explained(other)
    shared = [name for name in a if name in b]
    assert shared == [name for name in b if name in a]
    assert all(a.values()) and all(b.values())
    assert {x: a[x] for x in shared if x not in domain} == {x: b[x] for x in shared if x not in domain}


# --- sizes ---


MOST_LINES = {"ppo_discrete": 712, "ppo_continuous": 712, "ppo_atari": 761}
MOST_DIFFERENCES = {"ppo_continuous": 75, "ppo_atari": 469}  # from ppo_discrete


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_short(name):
    """In lines; and PPO is complete where train ends."""
    assert len(text(name).splitlines()) <= MOST_LINES[name]
    (train,) = [node for node in ast.parse(text(name)).body if getattr(node, "name", "") == "train"]
    assert train.end_lineno <= 380 and len(source(name, "train").splitlines()) <= 115


@pytest.mark.parametrize("name", MOST_DIFFERENCES)
def test_a_diff_of_two_scripts_is_short(name):
    """Changed lines, as diff prints them."""
    both = [text(x).splitlines() for x in ("ppo_discrete", name)]
    lines = [x for x in difflib.unified_diff(*both, n=0, lineterm="") if x[0] in "+-"][2:]
    assert len(lines) <= MOST_DIFFERENCES[name]


@pytest.mark.parametrize("name", NAMES)
def test_ppo_comes_before_what_runs_it(name):
    """Arguments, network, equations and train, then the environments, then all that changes no algorithm."""
    order = ["Args", "Agent", "compute_gae", "ppo_loss", "train", "make_envs", "save_checkpoint", "main"]
    lines = [inspect.getsourcelines(getattr(module(name), what))[1] for what in order]
    assert lines == sorted(lines)


# --- details: [core 1] to [atari 9] number those of "The 37 Implementation Details of PPO" ---

TAGS = {
    **{f"core {n}": NAMES for n in range(1, 13)},
    "core 13": MLP,  # Atari shares one network: atari 8
    **{f"cont {n}": ("ppo_continuous",) for n in range(1, 6)},
    **{f"cont {n}": MLP for n in range(6, 10)},  # normalisation
    **{f"atari {n}": ("ppo_atari",) for n in range(1, 10)},
    **{f"ours {n}": NAMES for n in range(1, 6)},
    "ours 6": MLP,  # statistics of observations
}


def code_of(name):
    """The text of a script after its docstring."""
    end = ast.parse(text(name)).body[0].end_lineno
    return "\n".join(text(name).splitlines()[end:])


@pytest.mark.parametrize("name", NAMES)
def test_every_detail_is_tagged_once_where_it_applies(name):
    """Each tag of the file's domain at one place of the code, and no other tag."""
    found = re.findall(r"\[((?:core|cont|atari|ours) \d+)\]", code_of(name))
    assert sorted(found) == sorted(tag for tag, names in TAGS.items() if name in names)


def deviations(name):
    """{ours n: what it is}, from the docstring."""
    words = " ".join(ast.get_docstring(ast.parse(text(name))).split())
    return dict(re.findall(r"(ours \d+) (.+?)[;.](?= ours \d| Shapes:)", words))


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_explains_every_deviation_of_ours(name):
    """Each tag [ours n] of the code, in order."""
    assert list(deviations(name)) == [
        tag for tag, names in TAGS.items() if tag.startswith("ours") and name in names
    ]


@pytest.mark.parametrize("one, other", PAIRS)
def test_a_deviation_is_explained_alike_everywhere(one, other):
    """A number means the same in every file."""
    a, b = deviations(one), deviations(other)
    shared = a.keys() & b.keys()
    assert len(shared) >= 5 and {x: a[x] for x in shared} == {x: b[x] for x in shared}


# --- dependencies ---

PACKAGES = {"ale_py": "ale-py", "pygame": "pygame-ce"}


def imports(name):
    """Top-level names of all modules that a script imports, inside of functions and by name too."""
    found = set()
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            found.add(node.args[0].value.split(".")[0])
    return found


def pins(lines):
    """{package: version} of lines package==version."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in lines]
    return dict(re.fullmatch(r"([\w.-]+)==([\w.+]+)", line).groups() for line in lines if line)


def script_block(name):
    """What PEP 723 puts into comments at the top of a file, for `uv run`."""
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text(name), re.M)
    return tomllib.loads("".join(line[2:] + "\n" for line in block.splitlines()))


@pytest.mark.parametrize("name", NAMES)
def test_the_script_block_agrees_with_requirements_and_imports(name):
    """The versions of requirements.txt, of all that the file imports or shows its videos with."""
    block = script_block(name)
    dependencies = pins(block["dependencies"])
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    assert dependencies.items() <= requirements.items()
    needed = {PACKAGES.get(x, x) for x in imports(name) - set(sys.stdlib_module_names) - {"wandb"}}
    shows = {"ppo_discrete": "pygame-ce", "ppo_continuous": "mujoco", "ppo_atari": "ale-py"}
    assert needed | {"moviepy", shows[name]} <= set(dependencies)
    assert re.fullmatch(r">=3\.\d+", block["requires-python"])


def test_the_script_blocks_ask_for_one_python():
    """And not for one each."""
    assert len({script_block(name)["requires-python"] for name in NAMES}) == 1


def test_requirements_are_exact_and_installed():
    """The tests run with the versions that the results were made with."""
    for package, version in pins((ROOT / "requirements.txt").read_text().splitlines()).items():
        assert importlib.metadata.version(package).split("+")[0] == version.split("+")[0], package
