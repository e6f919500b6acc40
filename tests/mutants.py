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


EVALUATES = 'get_action_and_value(mb["obs"]'
STEPS = "super().step(actions)"
CARRIES = STEPS + '; self.episode_returns += infos.get("episode", {"r": 0})["r"] * truncated'
STORES_LATE = "obs[t], (next_obs, rewards[t], terminated, truncated, infos) = next_obs, envs"

# the mistake that somebody might make; compute_gae and ppo_loss are tested in ppo_discrete
MUTANTS = [
    ("rollout", "b01_no_row", "discrete", "AutoresetMode.SAME_STEP", "AutoresetMode.NEXT_STEP"),
    ("rollout", "b02_truncation", "continuous", "if time_limit.any()", "if False"),
    ("rollout", "b03_bootstraps", "atari", 'infos["final_obs"][time_limit]', "next_obs[time_limit]"),
    (
        "rollout",
        "b04_bootstraps",
        "continuous",
        "agent.get_value(agent.normalize(final_obs))",
        "values[t, torch.as_tensor(time_limit)]",
    ),
    ("gae", "b05_two_episodes", "discrete", "gae_lambda * nonterminal", "gae_lambda"),
    ("gae", "b06_a_truncated", "discrete", "next_values * nonterminal", "next_values"),
    ("gae", "b07_gae_equals", "discrete", "dones.to(", "dones.roll(1, 0).to("),
    ("rollout", "b08_last_row", "atari", "agent.normalize(next_obs)", "obs[-1]"),
    ("gae", "b09_lambda_1", "discrete", "decays = gamma * gae_lambda", "decays = gae_lambda"),
    ("loss", "b10_clipping", "discrete", "torch.max(-advantages", "torch.min(-advantages"),
    ("rollout", "b11_ratio", "continuous", "actions[t].cpu()", "actions[t].clamp_(-1, 1).cpu()"),
    ("agent", "b12_log_probability", "continuous", "log_density.sum(-1)", "log_density.mean(-1)"),
    ("agent", "b13_entropy", "continuous", "(0.5 - log_peak).sum()", "(0.5 - log_peak).mean()"),
    ("loss", "b14_value_loss", "discrete", "v_error = (newvalue", "v_error = (newvalue[:, None]"),
    (
        "loss",
        "b15_value_clipping",
        "discrete",
        "values + (newvalue - values)",
        "newvalue + (newvalue - values)",
    ),
    ("update", "b16", "atari", '"advantages": advantages', '"advantages": advantages / advantages.std()'),
    ("update", "b17_minibatches", "discrete", "B > parts", "B >= parts"),
    (
        "update",
        "b18_epochs",
        "continuous",
        '"returns", "values")}',
        '"returns", "values")} | {"returns": mb["advantages"] + newvalue.detach()}',
    ),
    (
        "update",
        "b19",
        "discrete",
        "torch.randperm(B, device=device)",
        "torch.randint(B, (B,), device=device)",
    ),
    ("rollout", "b20_observations", "discrete", '"returns": returns', '"returns": returns.T'),
    ("update", "b21_learning_rate_falls", "atari", "(iteration - 1) / num", "iteration / num"),
    ("update", "b22_gradients", "continuous", "optimizer.zero_grad()", "pass"),
    ("update", "b23_target_kl_stops", "discrete", "if kl_exceeded:", "if False:"),
    ("agent", "b24_gains", "atari", "num_actions), std=0.01", "num_actions)"),
    ("agent", "b25_pixels", "atari", ".div_(255)", ""),
    ("envs", "b26_a_lost_life", "atari", '"episodic_life": False', '"episodic_life": True'),
    (
        "envs",
        "b27_rewards_are_signs",
        "atari",
        "return LearningEnvs(envs)",
        "return LearningEnvs(gym.wrappers.vector.TransformReward(envs, np.sign))",
    ),
    ("rollout", "b28_returns", "discrete", STEPS, CARRIES),
    (
        "checkpoint",
        "b29_evaluation",
        "continuous",
        "agent.normalize(torch.as_tensor(obs))",
        "agent.normalize(torch.as_tensor(obs), update=True)",
    ),
    ("rollout", "b30_final", "discrete", "agent.normalize(final_obs)", "final_obs.float()"),
    ("rollout", "b31", "continuous", EVALUATES, 'get_action_and_value(agent.normalize(mb["obs"])'),
    (
        "agent",
        "b32_running_mean_var",
        "discrete",
        "- batch_mean) ** 2).sum(0)",
        "- batch_mean) ** 2).mean(0)",
    ),
    (
        "envs",
        "b33_reward_scale",
        "continuous",
        "discounted[terminated | truncated]",
        "discounted[terminated]",
    ),
    ("envs", "b34_all", "discrete", "self.count, self.discounted", "self.count, self.discounted[None]"),
    (
        "evaluate",
        "b35_evaluation_plays",
        "discrete",
        "make_envs(args, 1, folder",
        "make_envs(args, 2, folder",
    ),
    ("rollout", "b36", "discrete", "seed=args.seed + global_step", "seed=[args.seed + global_step] * N"),
    ("checkpoint", "b37_same_seed", "continuous", "torch.manual_seed(args.seed)", "pass"),
    (
        "checkpoint",
        "b38_resumed_run_is and discrete-clip",
        "discrete",
        'optimizer.load_state_dict(checkpoint["optimizer"])',
        "pass",
    ),
    (
        "rollout",
        "b39_vector",
        "discrete",
        "next_obs, rewards[t], terminated, truncated, infos = envs",
        STORES_LATE,
    ),
    ("rollout", "b40_actions", "continuous", "np.clip(actions, space.low, space.high)", "actions"),
    (
        "update",
        "b41",
        "atari",
        "(returns - values).var() / returns.var()",
        "(returns - values).var() / values.var()",
    ),
    ("loss", "b42_ratio", "discrete", "ratio = logratio.exp()", "ratio = newlogprob.exp() / logprobs.exp()"),
    ("learning", "b43_values", "discrete", "+ args.vf_coef", "- args.vf_coef"),
]
MUTANTS = [Mutant(*fields) for fields in MUTANTS]


def copy_scripts(folder):
    for name in NAMES:
        shutil.copy(ROOT / f"{name}.py", folder)


def pytest(folder, files, expression):
    """(exit code, output) of the tests on the scripts in a folder."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", expression]
    paths = [str(ROOT / "tests" / f"test_{file}.py") for file in sorted(files)]
    environment = os.environ | {"PPO_SCRIPTS": folder}
    run = subprocess.run([*command, *paths], env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def outcome(mutant):
    """(caught, ALIVE, STALE or BROKEN; the reason)"""
    name = f"ppo_{mutant.script}"
    source = (ROOT / f"{name}.py").read_text()
    if source.count(mutant.old) != 1:
        return "STALE", f"{mutant.old!r} is {source.count(mutant.old)} times in {name}.py"
    with tempfile.TemporaryDirectory() as folder:
        copy_scripts(folder)
        Path(folder, f"{name}.py").write_text(source.replace(mutant.old, mutant.new))
        imports = [sys.executable, "-c", f"import {name}"]
        run = subprocess.run(imports, cwd=folder, capture_output=True, text=True)
        if run.returncode != 0:
            return "BROKEN", f"{name}.py does not import: {run.stderr.strip().splitlines()[-1]}"
        code, output = pytest(folder, [mutant.file], mutant.expression)
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
    with tempfile.TemporaryDirectory() as folder:
        copy_scripts(folder)
        expression = " or ".join(mutant.expression for mutant in wanted)
        code, output = pytest(folder, {mutant.file for mutant in wanted}, expression)
    if code != 0:
        sys.exit(f"{output}\nthe tests do not pass on unchanged scripts: no mutant was tried")
    caught = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (result, reason) in zip(wanted, pool.map(outcome, wanted), strict=True):
            caught += result == "caught"
            where = f"ppo_{mutant.script}.py by test_{mutant.file}.py {mutant.test}"
            print(f"{result:6} B{mutant.bug} in {where}: {reason}", flush=True)
    print(f"{caught} of {len(wanted)} mutants caught")
    sys.exit(caught < len(wanted))


if __name__ == "__main__":
    main()
