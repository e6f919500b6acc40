"""Break the scripts on purpose, one numbered bug at a time, and see a test fail:

    python tests/mutants.py [7 or b07 or part of a test's name ...] [--jobs 2]

Each mutant changes one fragment of one script in a temporary copy and runs one test on it (PPO_SCRIPTS, see
conftest.py). Before that, the tests have to pass on an unchanged copy. What may come out:

  caught  the test fails
  ALIVE   it passes all the same, so it would not notice the bug
  STALE   the fragment is not in the script, or is there more than once: write the mutant anew
  BROKEN  nothing is proved: the script does not import, or the test does not run, or stops at a slip

The exit code is 0 if all are caught, else 1. tests/README.md says what the bugs are.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ppo_discrete", "ppo_continuous", "ppo_atari")


class Mutant(NamedTuple):
    file: str  # tests/test_<file>.py
    test: str  # part of the test's name, from its number on; any expression that pytest -k takes
    script: str  # ppo_<script>.py
    old: str
    new: str

    @property
    def bug(self):
        return int(self.test[1:3])

    @property
    def expression(self):
        """For pytest -k: of a test that takes several scripts, only this one."""
        return f"({self.test} and (ppo_{self.script} or not ppo_))"


# the longer ones: episodes are recorded with signs for rewards; a truncated return is added to the next one;
# an observation is kept as a reference, which is read after the step; targets move with the value function
RECORDS_SIGNS = "LearningEnvs(gym.wrappers.vector.TransformReward(envs, np.sign), sticky)"
CARRIES_ON = 'super().step(actions); self.episode_returns += infos.get("episode", {"r": 0})["r"] * truncated'
STEPS = "next_obs, rewards[t], terminated, truncated, infos = envs"
STORES_LATE = f"obs[t], ({STEPS.removesuffix(' = envs')}) = as_tensor(next_obs), envs"
LEARNS_FROM_NEW_VALUES = 'mb["advantages"], mb["advantages"] + new[2].detach(), mb'
NOT_NORMALISED = "agent.get_value(as_tensor(np.stack(infos['final_obs'][time_limit])).float())"
BEFORE_THE_ACTION = "agent.get_value(obs[t, torch.as_tensor(time_limit)])"

# a mistake that somebody might make for each bug; compute_gae and ppo_loss are tested in ppo_discrete
MUTANTS = [
    ("rollout", "b01_no_row", "discrete", "AutoresetMode.SAME_STEP}", "AutoresetMode.NEXT_STEP}"),
    ("rollout", "b02_truncation", "continuous", "if time_limit.any()", "if False"),
    ("rollout", "b03_bootstraps", "atari", 'infos["final_obs"][time_limit]', "next_obs[time_limit]"),
    (
        "rollout",
        "b04",
        "continuous",
        "agent.get_value(final_obs)",
        BEFORE_THE_ACTION,
    ),
    ("gae", "b05", "discrete", "decays[t] *", "gamma * gae_lambda *"),
    ("gae", "b06", "discrete", "next_values * nonterminal", "next_values"),
    ("gae", "b07_gae_equals", "discrete", "dones.to(", "dones.roll(1, 0).to("),
    ("rollout", "b08", "atari", "agent.normalize(as_tensor(next_obs))", "obs[-1]"),
    ("gae", "b09_lambda_1", "discrete", "decays = gamma * gae_lambda", "decays = gae_lambda"),
    ("loss", "b10_clipping", "discrete", "-torch.min(advantages", "-torch.max(advantages"),
    ("rollout", "b11", "continuous", "actions[t].cpu()", "actions[t].clamp_(-1, 1).cpu()"),
    ("agent", "b12", "continuous", "log_density.sum(-1)", "log_density.mean(-1)"),
    ("agent", "b13_entropy", "continuous", "(0.5 - log_peak).sum()", "(0.5 - log_peak).mean()"),
    ("loss", "b14_value_loss", "discrete", "v_error = (newvalue", "v_error = (newvalue[:, None]"),
    ("loss", "b15_value_clipping", "discrete", "values + change", "newvalue + change"),
    ("update", "b16", "atari", '"advantages": advantages', '"advantages": advantages / advantages.std()'),
    ("update", "b17", "discrete", "B > parts", "B >= parts"),
    ("update", "b18", "continuous", 'mb["advantages"], mb["returns"], mb', LEARNS_FROM_NEW_VALUES),
    ("update", "b19", "discrete", "randperm(B,", "randint(B, (B,),"),
    ("rollout", "b20", "discrete", '"returns": returns', '"returns": returns.T'),
    ("update", "b21_learning_rate_falls", "atari", "(iteration - 1) / num", "iteration / num"),
    ("update", "b22_gradients", "continuous", "optimizer.zero_grad()", "pass"),
    ("update", "b23_target_kl_stops", "discrete", "args.target_kl < stats", "args.target_kl < 0 * stats"),
    ("agent", "b24_gains", "atari", "num_actions), std=0.01", "num_actions)"),
    ("agent", "b25", "atari", ".div_(255)", ""),
    ("envs", "b26", "atari", '"episodic_life": False', '"episodic_life": True'),
    ("envs", "b27_rewards_are_signs", "atari", "LearningEnvs(envs, sticky)", RECORDS_SIGNS),
    ("rollout", "b28", "discrete", "super().step(actions)", CARRIES_ON),
    ("checkpoint", "b29_evaluation", "continuous", "as_tensor(obs))", "as_tensor(obs), update=True)"),
    (
        "rollout",
        "b30",
        "discrete",
        "agent.get_value(final_obs)",
        NOT_NORMALISED,
    ),
    ("rollout", "b31", "continuous", 'and_value(mb["obs"]', 'and_value(agent.normalize(mb["obs"])'),
    ("agent", "b32_running_mean_var", "discrete", "** 2).sum(0)", "** 2).mean(0)"),
    ("envs", "b33_reward_scale_is", "continuous", "[terminated | truncated]", "[terminated]"),
    ("envs", "b34", "discrete", "reward_stats, self.discounted", "reward_stats, self.discounted[None]"),
    (
        "evaluate",
        "b35_evaluation",
        "discrete",
        "make_envs(args, 1, str(folder)",
        "make_envs(args, 2, str(folder)",
    ),
    (
        "rollout",
        "b36",
        "discrete",
        "seed=(args.seed + global_step) % 10**9",
        "seed=[args.seed + global_step] * N",
    ),
    ("checkpoint", "b37", "continuous", "torch.manual_seed(args.seed)", "pass"),
    ("checkpoint", "b38_resumed_run_is and discrete-clip", "discrete", "optimizer.load_state_dict", "dict"),
    ("rollout", "b39_vector", "discrete", STEPS, STORES_LATE),
    ("rollout", "b40", "continuous", "actions.clip(space.low, space.high)", "actions"),
    ("update", "b41", "atari", "/ returns.var()", "/ values.var()"),
    ("loss", "b42", "discrete", "ratio = logratio.exp()", "ratio = newlogprob.exp() / logprobs.exp()"),
    ("learning", "b43_values", "discrete", "+ args.vf_coef", "- args.vf_coef"),
    (
        "torchrun",
        "b44_b45",
        "atari",
        "    if WORLD_SIZE > 1:  # torchrun: the mean",
        "    if False:  # torchrun: the mean",
    ),
    ("torchrun", "b45_the_gradient", "atari", "ReduceOp.AVG", "ReduceOp.SUM"),
    ("torchrun", "b46", "atari", "global_step + RANK * N, device", "global_step, device"),
    (
        "torchrun",
        "b46",
        "atari",
        "seed=(args.seed + global_step + RANK * N)",
        "seed=(args.seed + global_step)",
    ),
    ("cuda_graphs", "b47", "atari", "x.grad = gradient", "pass"),
    ("cuda_graphs", "b48", "atari", "old.copy_(new)", "pass"),
]
MUTANTS = [Mutant(*fields) for fields in MUTANTS]


def pytest(folder, files, expression):
    """(exit code, output) of the tests on the scripts in a folder, which have to import first."""
    imports = f"import sys, {', '.join(NAMES)}, pytest; print('imported', flush=True)"
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-k", expression]
    paths = [str(ROOT / "tests" / f"test_{file}.py") for file in sorted(files)]
    environment = os.environ | {"PPO_SCRIPTS": folder}
    command = [sys.executable, "-c", f"{imports}; sys.exit(pytest.main(sys.argv[1:]))", *flags, *paths]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def outcome(mutant, clean):
    """Of a mutant of the scripts in folder clean: caught, ALIVE, STALE or BROKEN; and the reason."""
    name = f"ppo_{mutant.script}.py"
    source = Path(clean, name).read_text()
    if source.count(mutant.old) != 1:
        return "STALE", f"{mutant.old!r} is {source.count(mutant.old)} times in {name}"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(clean, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, name).write_text(source.replace(mutant.old, mutant.new))
        code, output = pytest(folder, [mutant.file], mutant.expression)
    if not output.startswith("imported\n"):
        return "BROKEN", f"{name} does not import: {output.strip()[-100:]}"
    if code == 0:
        return "ALIVE", "the test passes"
    errors = re.findall(r"^E +(.*)", output, re.M) or [""]
    slip = re.match(r"(Name|Attribute|Type|Syntax|Import)Error", errors[0])
    if code != 1 or slip or not re.search(r"^FAILED ", output, re.M):
        return "BROKEN", f"pytest ended with {code}: {errors[0] or output[-300:]}"
    return "caught", errors[0][:80]


def is_wanted(mutant, part):
    number = re.fullmatch(r"b?(\d+)", part.lower())
    return mutant.bug == int(number[1]) if number else part.removeprefix("test_") in mutant.test


def main():
    parser = argparse.ArgumentParser(description="Break the scripts on purpose and see the tests fail.")
    parser.add_argument("which", nargs="*", help="numbers of bugs, or parts of tests' names; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time")
    args = parser.parse_args()
    wanted = [x for x in MUTANTS if not args.which or any(is_wanted(x, part) for part in args.which)]
    if not wanted:
        sys.exit("no such mutant")
    with tempfile.TemporaryDirectory() as clean:
        for name in NAMES:
            shutil.copy(ROOT / f"{name}.py", clean)
        expression = " or ".join(mutant.expression for mutant in wanted)
        code, output = pytest(clean, {mutant.file for mutant in wanted}, expression)
        if code != 0:
            sys.exit(f"{output}\nthe tests do not pass on unchanged scripts: no mutant was tried")
        caught = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            results = pool.map(outcome, wanted, [clean] * len(wanted))
            for mutant, (result, reason) in zip(wanted, results, strict=True):
                caught += result == "caught"
                where = f"ppo_{mutant.script}.py by test_{mutant.file}.py {mutant.test}"
                print(f"{result:6} B{mutant.bug} in {where}: {reason}", flush=True)
    print(f"{caught} of {len(wanted)} mutants caught")
    sys.exit(caught < len(wanted))


if __name__ == "__main__":
    main()
