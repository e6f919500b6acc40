"""The list of recipes, the rows made from it, and whether the scripts still compute what made them."""

import csv
import dataclasses
import importlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tyro
from conftest import NAMES, ROOT, SCRIPTS
from scipy import stats

sys.path.append(str(ROOT / "benchmark"))
import ablation
import recipes
import update_docs

RECIPES = recipes.read_recipes()
COLUMNS = (
    "recipe,script,env_id,flags,seed,steps,episodic_return,eval_sampled,eval_sampled_std,eval_deterministic,"
    "eval_deterministic_std,wall_s,sps,commit,date,threads,torch,gymnasium,python,hardware"
)


def rows(name):
    with (ROOT / "benchmark" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def arguments(entry, modules):
    argv = ["--env-id", entry["env_id"], *shlex.split(entry["flags"])]
    args = tyro.cli(modules[entry["script"]].Args, args=argv)
    return dataclasses.asdict(args)


@pytest.fixture
def modules(discrete, continuous, atari):
    return {module.__name__: module for module in (discrete, continuous, atari)}


def test_every_recipe_is_one_that_the_script_takes(modules, monkeypatch):
    for name, entry in RECIPES.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        chooses = entry["group"].startswith("selection")  # a default: by seeds that no table has
        assert min(entry["seeds"]) > 100 if chooses else set(entry["seeds"]) >= {1}, name
        module = modules[entry["script"]]
        monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)  # a GPU need not be here
        module.prepare(module.Args(**arguments(entry, modules)))


def test_every_row_is_of_a_recipe_with_the_same_arguments(modules):
    """Written out or left at their defaults."""
    assert ",".join(rows("results")[0]) == COLUMNS
    for row in rows("results"):
        entry = RECIPES[row["recipe"]]
        assert row["script"] == entry["script"]
        assert arguments(row, modules) == arguments(entry, modules), row["recipe"]
        assert float(row["eval_sampled"]) == float(row["eval_sampled"]), "a number"
    seeds = [(row["recipe"], row["seed"]) for row in rows("results")]
    assert len(seeds) == len(set(seeds))


def test_curves_are_of_rows_and_end_where_they_do():
    """At most 60 points, of the groups that are drawn; the last one is the return of the row."""
    curves = {}
    for point in rows("curves"):
        curves.setdefault((point["recipe"], point["seed"]), []).append(point)
    results = {(row["recipe"], row["seed"]): row for row in rows("results")}
    assert set(curves) <= set(results)
    for key, points in curves.items():
        assert len(points) <= 60 and RECIPES[key[0]]["group"] in recipes.DRAWN, key
        steps = [int(point["step"]) for point in points]
        assert steps == sorted(set(steps)) and float(points[-1]["return"]) == float(
            results[key]["episodic_return"]
        )


def test_scores_of_the_ablation_are_what_the_rows_say():
    """1 is as high as the script as it is with the same seed, 0 lower by what its mean has over random play;
    the mean over tasks of the means over seeds."""
    zero = {row["env_id"]: float(row["return"]) for row in rows("random_play")}
    returns = {}  # {recipe: {seed: return}}
    for row in rows("results"):
        returns.setdefault(row["recipe"], {})[row["seed"]] = float(row["episodic_return"])
    assert {row["variant"] for row in rows("ablation")} >= {"as-it-is", "reset-rows", "shared-trunk"}
    for score in rows("ablation"):
        means, runs = [], 0
        for name, entry in RECIPES.items():
            if entry["group"] == score["group"] and name.split("-", 2)[2] == score["variant"]:
                task, zero_of_task = name.split("-")[1], zero[entry["env_id"]]
                as_it_is = returns[f"ablation-{task}-as-it-is"]
                gains = [x - as_it_is[seed] for seed, x in returns[name].items()]
                means.append(1 + statistics.mean(gains) / (statistics.mean(as_it_is.values()) - zero_of_task))
                runs += len(gains)
        assert int(score["runs"]) == runs and int(score["tasks"]) == len(means)
        assert float(score["score"]) == pytest.approx(statistics.mean(means), abs=1e-3)
        low, high = float(score["low"]), float(score["high"])
        assert (low + high) / 2 == pytest.approx(float(score["score"]), abs=1.5e-3) and low <= high
        if score["variant"] == "as-it-is":
            assert score["clear"] == "no" and low <= 1 <= high
        if score["clear"] == "yes":
            assert not low <= 1 <= high, "an interval that allows for many variants is a wider one"


def test_the_ablation_in_the_repository_is_what_the_rows_give():
    written = pd.read_csv(ROOT / "benchmark" / "ablation.csv")
    pd.testing.assert_frame_equal(ablation.summarise(ablation.scores_of_runs()), written, check_dtype=False)


def test_intervals_of_the_ablation_are_students():
    """With one task, those that scipy computes; with two of the same numbers, half the variance and twice the
    degrees of freedom."""
    sample = np.array([0.7, 1.4, 0.9])
    student = stats.ttest_1samp(sample, 1).confidence_interval(0.9)
    assert ablation.interval([sample], 0.9) == pytest.approx((student.low, student.high))
    error = sample.std(ddof=1) / 3**0.5 / 2**0.5
    expected = stats.t.interval(0.9, 4, sample.mean(), error)
    assert ablation.interval([sample] * 2, 0.9) == pytest.approx(expected)


def test_a_variant_that_lacks_a_detail_names_its_tag():
    """update_docs.py writes its score behind the detail in docs/how-ppo-works.md."""
    details = (ROOT / "docs" / "how-ppo-works.md").read_text()
    named = [entry["without"] for entry in RECIPES.values() if "without" in entry]
    assert set(named) >= {"ours 1", "ours 2", "core 2", "core 7", "atari 7"}
    assert all(f"| {tag} |" in details for tag in named)


@pytest.mark.parametrize("name", NAMES)
def test_the_script_computes_what_the_rows_were_made_with(name):
    """If this fails, rows no longer show what the script does: docs/contributing.md, Benchmarks."""
    known = recipes.read_numerics()[name]
    assert recipes.same_losses(recipes.losses_of(name), known["losses"])
    assert known["commits"]


def test_other_losses_are_noticed():
    losses = recipes.read_numerics()["ppo_discrete"]["losses"]
    other = losses | {"value_loss": [1.05 * x for x in losses["value_loss"]]}
    assert recipes.same_losses(losses, losses) and not recipes.same_losses(losses, other)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_every_patch_fits_the_script(tmp_path):
    """And changes it; every recipe with a patch finds its file."""
    patches = sorted((ROOT / "benchmark" / "ablations").glob("*.patch"))
    named = {recipes.patch_of(x["script"], x["patch"]) for x in RECIPES.values() if x["patch"]}
    assert all((ROOT / path).exists() for path in named)
    for patch in patches:
        name = patch.name.split("-")[0]
        copy = tmp_path / f"{name}.py"
        shutil.copy(SCRIPTS / f"{name}.py", copy)
        subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
        assert copy.read_text() != (SCRIPTS / f"{name}.py").read_text()
        compile(copy.read_text(), copy, "exec")


def test_a_second_runner_leaves_the_first_alone(monkeypatch, tmp_path):
    """Two would train in the same directories and write the same rows; here another process has the lock."""
    runner = importlib.import_module("run")
    monkeypatch.setattr(runner, "RUNS", tmp_path)
    monkeypatch.setattr(runner, "note_commit", lambda *args: pytest.fail("it went on"))
    path = str(tmp_path / ".lock")
    code = f"import filelock; x = filelock.FileLock({path!r}); x.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", code]  # ends when its input is closed
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.read(1)
        with pytest.raises(SystemExit, match=r"another run\.py"):
            runner.main(("cartpole",), seeds=(99,))


def test_a_row_names_the_machine_that_trained(monkeypatch):
    """With its GPU only where the script takes one by itself, and with the threads of the run."""
    runner = importlib.import_module("run")
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner.torch.cuda, "get_device_name", lambda: "Some GPU")
    fields = {"recipe": "", "env_id": "", "flags": "", "patch": "", "seed": 1, "commit": "", "threads": 8}
    for script, end in (("ppo_atari", "cores, Some GPU"), ("ppo_discrete", "cores")):
        columns = runner.machine(runner.Run(script=script, **fields))
        assert columns["threads"] == 8 and columns["hardware"].endswith(end)
        assert ", 8 of " in columns["hardware"]


def test_rows_with_graphs_were_made_on_a_gpu():
    found = [row for row in rows("results") if "--cuda-graphs" in row["flags"]]
    assert found and all("NVIDIA" in row["hardware"] for row in found)
    on_gpu = [row for row in rows("speed") if row["task"].startswith("gpu ")]
    assert on_gpu and all(row["gpu"] for row in on_gpu)


def test_speeds_are_shown_where_sb3_was_not_run():
    """With many games it would take minutes; ratios to it are then not measured."""
    times = dict.fromkeys(("environment_ms", "policy_ms", "update_ms", "peak_mb", "first_iteration_s"), 1.0)
    kinds = (("a", "eager", 30.0), ("a", "sb3", 10.0), ("b", "eager", 20.0))
    made = [{"task": task, "program": x, "round": 1, "sps": sps} | times for task, x, sps in kinds]
    lines = update_docs.speed_table(pd.DataFrame(made)).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == [
        "3.00 (3.00 to 3.00)",
        "1.00 (1.00 to 1.00)",
        "not measured",
    ]


def test_ratios_of_speeds_are_taken_within_a_round():
    made = [("a", "eager", 1, 20.0), ("a", "sb3", 1, 10.0), ("a", "eager", 2, 6.0), ("a", "sb3", 2, 2.0)]
    made += [("a", "eager", 3, 80.0), ("a", "sb3", 3, 20.0)]
    rows = pd.DataFrame(made, columns=["task", "program", "round", "sps"])
    absent = ["environment_ms", "policy_ms", "update_ms", "peak_mb", "first_iteration_s"]
    table = update_docs.speed_table(rows.reindex(columns=[*rows, *absent]))
    assert "| a | eager | 20 | 3.00 (2.50 to 3.50) |" in table and "environments" not in table


def test_a_table_names_the_seeds_that_were_not_run(monkeypatch):
    """In its last row; a recipe without any row is named as a whole."""
    group, results = update_docs.group_of("tutorials"), update_docs.rows_of("results")
    one, other, *rest = group
    kept = results[results["recipe"].isin(rest) | ((results["recipe"] == one) & (results["seed"] == 2))]
    monkeypatch.setattr(update_docs, "rows_of", lambda name: kept)
    *_, last = update_docs.recipes_table("tutorials").splitlines()
    missing = ", ".join(str(seed) for seed in group[one]["seeds"] if seed != 2)
    assert f"{missing} of `{one}`" in last and f"all of `{other}`" in last


def test_tables_of_a_gpu_and_of_a_cpu_are_apart():
    on_cpu, on_gpu = (update_docs.speed_table(update_docs.speeds(kind)) for kind in ("", "gpu"))
    assert "graphs" in on_gpu and "graphs" not in on_cpu
    assert "cartpole" in on_cpu and "cartpole" not in on_gpu


def test_what_the_docstrings_say_was_measured_is_what_the_rows_have():
    played = {}  # {recipe: sampled returns, in the order of seeds}
    for row in sorted(rows("results"), key=lambda row: int(row["seed"])):
        played.setdefault(row["recipe"], []).append(float(row["eval_sampled"]))
    docs = {name: " ".join((ROOT / f"{name}.py").read_text().split()) for name in NAMES}
    assert set(played["cartpole"]) == {500.0}
    lunarlander = ", ".join(f"{x:.0f}" for x in played["lunarlander"])
    cartpole = "CartPole-v1 500.0 after 100,000 steps"
    assert f"Measured: {cartpole}, LunarLander-v3 {lunarlander} after" in docs["ppo_discrete"]
    halfcheetah = ", ".join(f"{x:.0f}" for x in played["halfcheetah"])
    assert f"Measured: HalfCheetah-v5 {halfcheetah} after" in docs["ppo_continuous"]
    games = {"Breakout": ".0f", "Pong": ".1f", "BeamRider": ".0f"}
    of_games = {x: ", ".join(f"{y:{form}}" for y in played[f"{x.lower()}-10m"]) for x, form in games.items()}
    measured = ", ".join(f"{x} {returns}" for x, returns in of_games.items())
    assert f"Measured: {measured} after" in docs["ppo_atari"]


def test_other_programs_take_their_own_number_of_threads(monkeypatch):
    """With the default of the script, one, SB3 would be slower or faster than a user sees it."""
    import speed

    jobs = []
    monkeypatch.setattr(speed.subprocess, "Popen", lambda command, **_: jobs.append(json.loads(command[2])))
    monkeypatch.setattr(speed, "read", lambda process: None)
    monkeypatch.setenv("CLEANRL_PYTHON", "python")
    for program, flags in (("sb3", {}), ("cleanrl", {}), ("sb3 1 thread", {"num_threads": 1}), ("eager", {})):
        speed.start("ppo_discrete", program, {"iterations": 1} | flags, "run")
    assert [job["flags"].get("num_threads") for job in jobs] == [0, 0, 1, None]
