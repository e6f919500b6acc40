"""Steps per second of the scripts, of Stable-Baselines3 at the same hyperparameters, and of the machine.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                         # speed.csv, speed_summary.csv; prints a table
    python benchmark/speed.py --tasks cartpole --rounds 20
    python benchmark/speed.py --growth                # --num-envs 1 to 256: growth.csv
    python benchmark/speed.py --share                 # one thread, two, two runs: threads.csv
    python benchmark/speed.py --against ../old        # this checkout against another one: against.csv

Each program is a process of its own, with its own start and peak of memory, on the CPU but for the tasks
called gpu, which are left out where torch finds no CUDA. After two iterations they take turns of some
seconds, one at a time, so that whatever else the machine does hits all of them. Times are means over the
iterations of a turn; tables show medians and quartiles over rounds of turns, and of ratios within a round.
With no --threads, every program takes as many as it does by itself: the small networks one, Atari and SB3
what torch chooses; OMP_NUM_THREADS is taken out of their environment.

The limit is the time that the environments take with random actions plus that of the matrix products and
convolutions of rollout and update, and nothing else. In the parts of an iteration, SB3's environments contain
the normalisation of observations and its policy GAE, which are in the scripts' policy and update. The memory
of `sb3 subproc` includes its worker processes; what they share counts once for each. On a GPU, kernels of the
update may still run when its end is noted, and then count as policy; steps per second are right.
"""

import csv
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent

VECTORS = ("eager", "compile", "sb3", "sb3 1 thread", "limit")
ATARI = ("eager", "sb3", "sb3 1 thread", "sb3 subproc", "limit", "bf16", "bf16 limit")
GPU = ("eager", "graphs", "graphs bf16", "sb3", "environments")
MANY_GAMES = ("eager", "graphs", "graphs bf16", "environments")  # SB3 would take minutes for a turn
CLEANRL = {"num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4}
CLEANRL |= {"learning_rate": 2.5e-4, "norm_obs": False, "norm_reward": False, "clip_vloss": True}
# What is not said is a default of the script. iterations: of one turn; flags: of all programs
TASKS = {
    "cartpole": {"script": "ppo_discrete", "iterations": 20, "programs": VECTORS, "flags": CLEANRL},
    "halfcheetah": {"script": "ppo_continuous", "iterations": 2, "programs": VECTORS},
    "breakout": {"script": "ppo_atari", "iterations": 1, "programs": ATARI},
    "gpu breakout": {"script": "ppo_atari", "iterations": 4, "programs": GPU, "flags": {"device": "cuda"}},
    "gpu breakout 64": {
        "script": "ppo_atari",
        "iterations": 2,
        "programs": MANY_GAMES,
        "flags": {"device": "cuda", "num_envs": 64},
    },
}
PROGRAMS = {  # one that is not sb3, limit or environments is the script with these flags
    "eager": {},
    "compile": {"compile": True},
    "graphs": {"cuda_graphs": True},
    "graphs bf16": {"cuda_graphs": True, "precision": "bf16"},
    "sb3": {},
    "sb3 1 thread": {"num_threads": 1},
    "sb3 subproc": {},
    "environments": {},
    "limit": {},
    "bf16": {"precision": "bf16"},
    "bf16 limit": {"precision": "bf16"},
}
WARMUP = 2


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = ()  # none: all on the CPU, and those on a GPU if there is one
    rounds: int = 10  # of turns
    threads: int = 0  # of torch and of the emulators, in all programs; 0: what each takes by itself
    growth: bool = False  # instead: the scripts with 1 to 256 environments
    share: bool = False  # instead: the scripts with one thread and with two, and two runs side by side
    against: str = ""  # instead: the scripts of this checkout against those in this folder
    programs: tuple[str, ...] = ("eager", "compile")  # what --against compares


# ---------------------------------------- in a measured process ----------------------------------------


class Clock:
    """Turns of some iterations each, after WARMUP others; the times of one go to the parent when it ends."""

    def __init__(self, job, batch):
        self.job, self.batch = job, batch
        self.iterations = 0
        self.first_iteration_s = None
        self.clear()

    def clear(self):
        self.times = []  # of the iterations of this turn
        self.in_envs = 0.0
        self.rollout = 0.0
        self.began = time.perf_counter()

    def watch(self, envs, method="step"):
        """Count the time in a method of envs."""
        step = getattr(envs, method)

        def timed(*args):
            start = time.perf_counter()
            result = step(*args)
            self.in_envs += time.perf_counter() - start
            return result

        setattr(envs, method, timed)
        return envs

    def rollout_ended(self, now):
        self.rollout += now - self.began

    def iteration_ended(self):
        now = time.perf_counter()
        self.times.append(now - self.began)
        self.began = now
        self.iterations += 1
        if self.iterations == 1:
            self.first_iteration_s = time.time() - self.job["born"]
        warm = self.iterations == WARMUP
        full = self.iterations > WARMUP and len(self.times) == self.job["iterations"]
        if warm or full:
            self.tell()
            self.clear()

    def tell(self):
        """Report a turn and wait for the next one."""
        count = len(self.times)
        row = {
            "sps": count * self.batch / sum(self.times),
            "environment_ms": 1e3 * self.in_envs / count,
            "policy_ms": 1e3 * (self.rollout - self.in_envs) / count,
            "update_ms": 1e3 * (sum(self.times) - self.rollout) / count,
            "first_iteration_s": self.first_iteration_s,
            "peak_mb": peak_mb(),
            "threads": sys.modules["torch"].get_num_threads(),
        }
        print(json.dumps({key: round(value, 2) for key, value in row.items()}), flush=True)
        if not sys.stdin.readline():  # the parent has seen enough
            for child in multiprocessing.active_children():
                child.terminate()
            os._exit(0)


def peak_mb():
    """Of this process and its children, so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/status")
        if status.exists():
            peak += int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return peak


def measure_ours(script, args, job):
    """train() as it is; the clock sees where advantages begin and what is logged."""
    clock = Clock(job, args.num_envs * args.num_steps)

    class Writer(script.SummaryWriter):
        def add_scalar(self, key, value, step):
            super().add_scalar(key, value, step)
            if key == "charts/SPS":  # once per iteration
                clock.iteration_ended()

    def advantages(*args):
        clock.rollout_ended(time.perf_counter())
        return compute_gae(*args)

    make_envs, script.SummaryWriter = script.make_envs, Writer
    compute_gae, script.compute_gae = script.compute_gae, advantages
    script.make_envs = lambda *args: clock.watch(make_envs(*args))
    script.train(args)


def sb3_model(script, args, kind="DummyVecEnv", watch=lambda envs: envs):
    """SB3's PPO, told to do what the script does with args. The script itself is not imported."""
    vector = script != "ppo_atari"
    assert args.anneal_lr and args.norm_adv, "what is not passed on is the same in both"
    assert not vector or (args.activation == "tanh" and args.norm_obs == args.norm_reward)
    import gymnasium
    import stable_baselines3 as sb3
    import torch
    from stable_baselines3.common import env_util, vec_env

    if script == "ppo_atari":
        env_id = f"ale_py:{args.env_id}"  # imports ale_py, which registers it, in workers as well
        kind = getattr(vec_env, kind)
        envs = env_util.make_atari_env(env_id, args.num_envs, seed=args.seed, vec_env_cls=kind)
        envs = vec_env.VecFrameStack(envs, 4)
        policy, kwargs = "CnnPolicy", {}
    else:
        envs = vec_env.DummyVecEnv([lambda: env_util.Monitor(gymnasium.make(args.env_id))] * args.num_envs)
        policy = "MlpPolicy"
        kwargs = {"net_arch": list(args.hidden_sizes), "activation_fn": torch.nn.Tanh}
        if hasattr(args, "init_log_std"):
            kwargs["log_std_init"] = args.init_log_std
        if args.norm_obs:
            envs = vec_env.VecNormalize(envs, gamma=args.gamma)
    return sb3.PPO(
        policy,
        watch(envs),
        learning_rate=lambda remaining: remaining * args.learning_rate,
        n_steps=args.num_steps,
        batch_size=args.num_steps * args.num_envs // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef if args.clip_vloss else None,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # SB3's value loss lacks the factor 1/2
        max_grad_norm=args.max_grad_norm,
        policy_kwargs=kwargs,
        device=args.device,
        seed=args.seed,
    )


def measure_sb3(job):
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    args = types.SimpleNamespace(**job["hyperparameters"])
    torch.set_num_threads(job["flags"].get("num_threads", 0) or torch.get_num_threads())
    clock = Clock(job, args.num_steps * args.num_envs)

    class Callback(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps:  # the first one starts before anything was trained
                clock.iteration_ended()

        def _on_rollout_end(self):
            clock.rollout_ended(time.perf_counter())

        def _on_step(self):
            return True

    kind = "SubprocVecEnv" if "subproc" in job["program"] else "DummyVecEnv"
    model = sb3_model(TASKS[job["task"]]["script"], args, kind, lambda envs: clock.watch(envs, "step_wait"))
    model.learn(args.total_timesteps, Callback())


def products(torch, agent, obs):
    """A function that does the matrix products and convolutions of a forward pass, one of a backward pass."""
    layers = []
    hooks = [
        module.register_forward_hook(lambda module, x, y: layers.append((module, x[0], torch.randn_like(y))))
        for module in agent.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    with torch.no_grad():
        agent.get_action_and_value(agent.normalize(obs))
    for hook in hooks:
        hook.remove()
    layers = [
        (x, dy.to(x.dtype), m.weight.detach().to(x.dtype), getattr(m, "stride", 0)) for m, x, dy in layers
    ]
    convolution, linear = torch.conv2d, torch.nn.functional.linear
    backward_of = torch.ops.aten.convolution_backward

    def forward():
        for x, _, weight, stride in layers:
            convolution(x, weight, None, stride) if stride else linear(x, weight)

    def backward():
        for i, (x, dy, weight, stride) in enumerate(layers):
            first = i == 0 or x.shape[1:] == layers[0][0].shape[1:]  # needs no gradient of its input
            if stride:
                mask = [not first, True, False]
                backward_of(dy, x, weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, mask)
            else:
                dy.T @ x
                None if first else dy @ weight

    return forward, backward


def measure_limit(script, args, job):
    """Environments alone, and products and convolutions alone, each as often as an iteration needs them.
    The program `environments` is the first of these."""
    torch, envs = script.torch, script.make_envs(args, args.num_envs)
    bare = envs.unwrapped  # without our statistics of rewards
    obs = torch.tensor(bare.reset(seed=1)[0])
    bare.action_space.seed(1)
    actions = [bare.action_space.sample() for _ in range(args.num_steps)]
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    batch = args.num_steps * args.num_envs
    minibatch = obs[torch.arange(batch // args.num_minibatches) % len(obs)]
    act, (forward, backward) = products(torch, agent, obs)[0], products(torch, agent, minibatch)
    if job["program"] == "environments":
        act = forward = backward = int  # does nothing
    clock = Clock(job, batch)
    clock.watch(bare)
    while True:
        for action in actions:
            bare.step(action)
            act()
        clock.rollout_ended(time.perf_counter())
        for _ in range(args.update_epochs * args.num_minibatches):
            forward()
            backward()
        clock.iteration_ended()


def measure(job):
    """What a child process does: turns of one program, until nobody asks for another."""
    if job["program"].startswith("sb3"):
        measure_sb3(job)
        return
    sys.path.insert(0, job["scripts"])
    script = importlib.import_module(TASKS[job["task"]]["script"])
    args = script.Args(run_dir=f"{job['folder']}/run", **job["flags"])
    script.torch.set_num_threads(args.num_threads or script.torch.get_num_threads())
    if "limit" in job["program"] or job["program"] == "environments":
        measure_limit(script, args, job)
    else:
        measure_ours(script, args, job)


# ---------------------------------------- in the parent ----------------------------------------


def start(task, program, flags, iterations, scripts=HERE.parent):
    """A process with the program, past its warm-up. scripts: the folder that holds them."""
    flags = {"device": "cpu"} | TASKS[task].get("flags", {}) | flags
    flags["total_timesteps"] = 10**9  # it runs until it is stopped
    job = {"task": task, "program": program, "flags": flags, "iterations": iterations}
    job["scripts"] = str(Path(scripts).resolve())
    if program.startswith("sb3"):
        job["hyperparameters"] = defaults_of(TASKS[task]["script"]) | flags
    job["folder"] = tempfile.mkdtemp()
    job["born"] = time.time()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    process = subprocess.Popen(command, **pipes, text=True, env=environment)
    process.folder = job["folder"]
    read(process)
    return process


def defaults_of(name):
    """The defaults of a script, as a dict."""
    if str(HERE.parent) not in sys.path:
        sys.path.append(str(HERE.parent))
    return dataclasses.asdict(importlib.import_module(name).Args())


def read(process):
    """The times of its turn."""
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"it stopped; to see why: {shlex.join(process.args)}")


def turn(process):
    print("go", file=process.stdin, flush=True)
    return read(process)


def stop(process):
    process.stdin.close()
    process.wait()
    shutil.rmtree(process.folder)


def on_cpu():
    """The tasks that need no GPU."""
    return [task for task in TASKS if not task.startswith("gpu")]


def found():
    """All tasks that this machine can do."""
    import torch  # not above: it is not part of what is measured

    return list(TASKS) if torch.cuda.is_available() else on_cpu()


def flags_of(args, program):
    """The program's flags, and the threads that were asked for."""
    flags = {"num_threads": args.threads} if args.threads > 0 else {}
    return flags | PROGRAMS[program]


def commit_of(folder):
    """Short hash of a checkout, marked if its scripts have been changed since; empty if it is none."""
    git = ["git", "-C", str(folder)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "ppo_*.py"], capture_output=True, text=True)
    return found.stdout.strip() + ("-changed" if changed.stdout else "")


def machine():
    """What numbers depend on."""
    names = ["torch", "gymnasium", "ale-py", "mujoco", "numpy", "stable-baselines3"]
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), platform.processor())
    torch = sys.modules.get("torch")  # where tasks on a GPU are measured, this process has asked it for one
    gpu = torch.cuda.get_device_name() if torch and torch.cuda.is_available() else ""
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in names)
    cores = len([x for x in info if x.startswith("processor")])
    return {"cpu": cpu, "cores": cores, "gpu": gpu, "versions": versions}


def save(name, rows):
    """Write rows to a CSV file of this folder, in place of older ones of the same tasks; return all."""
    tasks = {row["task"] for row in rows}
    made = {"commit": commit_of(HERE.parent), "date": datetime.now(UTC).date().isoformat()}
    path, rows = HERE / name, [row | machine() | made for row in rows]
    if path.exists():
        rows += [row for row in csv.DictReader(path.open(newline="")) if row["task"] not in tasks]
    rows.sort(key=lambda row: list(TASKS).index(row["task"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def quartiles(numbers):
    """First quartile, median, third quartile."""
    numbers = [float(x) for x in numbers]
    return statistics.quantiles(numbers, n=4, method="inclusive") if len(numbers) > 1 else numbers * 3


def with_quartiles(key, numbers, digits=2):
    """Columns for the median and the quartiles."""
    low, middle, high = (round(x, digits) for x in quartiles(numbers))
    return {key: middle, f"{key}_q1": low, f"{key}_q3": high}


def compare(args):
    rows = []
    for task in args.tasks or found():
        chosen = TASKS[task]["programs"]
        iterations = TASKS[task]["iterations"]
        processes = {x: start(task, x, flags_of(args, x), iterations) for x in chosen}
        for number in range(args.rounds):
            first = number % len(chosen)  # each round starts with another program
            turns = {x: turn(processes[x]) for x in chosen[first:] + chosen[:first]}
            for program in chosen:
                rows.append({"task": task, "program": program, "round": number + 1} | turns[program])
                print(*rows[-1].values(), flush=True)
        for process in processes.values():
            stop(process)
        save("speed.csv", rows)
        summary = save("speed_summary.csv", summarise(rows))
    print("\n".join(table(summary)))


def summarise(rows):
    """Medians and quartiles over the rounds; x_sb3 is the ratio to sb3 within a round, where sb3 was run."""
    sb3 = {(row["task"], str(row["round"])): float(row["sps"]) for row in rows if row["program"] == "sb3"}
    summary = []
    for task, program in dict.fromkeys((row["task"], row["program"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["program"]) == (task, program)]
        columns = {"task": task, "program": program, "rounds": len(mine)}
        columns |= with_quartiles("sps", [row["sps"] for row in mine])
        ratios = [
            float(x["sps"]) / sb3[task, str(x["round"])] for x in mine if (task, str(x["round"])) in sb3
        ]
        if ratios:
            columns |= with_quartiles("x_sb3", ratios, 3)
        for key in ("environment_ms", "policy_ms", "update_ms"):
            columns |= with_quartiles(key, [row[key] for row in mine])
        for key in ("peak_mb", "first_iteration_s"):  # one start: no spread
            columns[key] = quartiles(row[key] for row in mine)[1]
        columns["threads"] = mine[0].get("threads", "")
        summary.append(columns)
    return summary


def table(summary):
    """Lines of Markdown."""
    lines = [
        "| task | program | steps/s (quartiles) | x SB3 (quartiles) | environments | policy | update "
        "| memory | first iteration | threads |",
        "| --- " * 10 + "|",
    ]
    for row in summary:
        kinds = ("ms", "mb", "_s", "q1", "q3")
        x = {key: float(value) for key, value in row.items() if key.endswith(kinds) and value != ""}
        ratio = "not measured"
        if row.get("x_sb3", "") != "":
            ratio = f"{float(row['x_sb3']):.2f} ({x['x_sb3_q1']:.2f} to {x['x_sb3_q3']:.2f})"
        cells = [
            f"{row['task']} | {row['program']}",
            f"{float(row['sps']):,.0f} ({x['sps_q1']:,.0f} to {x['sps_q3']:,.0f})",
            ratio,
            f"{x['environment_ms']:.0f} ms | {x['policy_ms']:.0f} ms | {x['update_ms']:.0f} ms",
            f"{x['peak_mb']:.0f} MB | {x['first_iteration_s']:.1f} s | {row['threads']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compare_against(args):
    """Both checkouts in turns, whose order alternates, so that a drift of the machine cancels."""
    folders = {"new": HERE.parent, "old": Path(args.against)}
    rows = []
    for task, program in itertools.product(args.tasks or on_cpu(), args.programs):
        if program not in TASKS[task]["programs"]:
            continue
        flags, iterations = flags_of(args, program), TASKS[task]["iterations"]
        processes = {x: start(task, program, flags, iterations, folders[x]) for x in folders}
        for number in range(args.rounds):
            order = ("new", "old") if number % 2 == 0 else ("old", "new")
            turns = {x: turn(processes[x]) for x in order}
            row = {"task": task, "program": program, "round": number + 1}
            row["ratio"] = round(turns["new"]["sps"] / turns["old"]["sps"], 4)
            for key in ("sps", "environment_ms", "policy_ms", "update_ms", "peak_mb", "first_iteration_s"):
                row |= {f"{key}_{x}": turns[x][key] for x in folders}
            row["threads"] = turns["new"]["threads"]
            row["commit_old"] = commit_of(args.against)
            rows.append(row)
            print(*list(row.values())[:6], flush=True)
        for process in processes.values():
            stop(process)
        save("against.csv", rows)
    print("\n".join(against_table(rows)))


def against_table(rows):
    """Lines of Markdown: steps per second of both, and new / old: its median, quartiles and every round."""
    lines = ["| task | program | old | new | new / old (quartiles) | every round |", "| --- " * 6 + "|"]
    for task, program in dict.fromkeys((row["task"], row["program"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["program"]) == (task, program)]
        old, new = (quartiles(row[key] for row in mine)[1] for key in ("sps_old", "sps_new"))
        low, middle, high = quartiles(row["ratio"] for row in mine)
        ratios = " ".join(f"{row['ratio']:.3f}" for row in mine)
        cells = [task, program, f"{old:,.0f}", f"{new:,.0f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
        lines.append(f"| {' | '.join([*cells, ratios])} |")
    return lines


def grow(args):
    """Few steps per environment, since 256 environments with a whole rollout each would fill minutes."""
    rows = []
    for task, number in itertools.product(args.tasks or on_cpu(), (1, 2, 4, 8, 16, 32, 64, 128, 256)):
        flags = flags_of(args, "bf16" if task == "breakout" else "eager")
        flags |= {"num_envs": number, "num_steps": 32 if task == "breakout" else 128}
        process = start(task, "eager", flags, max(1, 32 // number))
        turns = [turn(process) for _ in range(3 if number < 64 else 1)]
        stop(process)
        row = {"task": task, "num_envs": number} | with_quartiles("sps", [x["sps"] for x in turns])
        row |= {key: quartiles(x[key] for x in turns)[1] for key in turns[0] if key != "sps"}
        rows.append(row)
        print(*row.values(), flush=True)
        save("growth.csv", rows)
    print("now draw docs/images/growth.png: python benchmark/plots.py")


def share(args):
    """Steps/s of a run with one thread, of one with two, and of two at once with one thread each."""
    rows = []
    for task in args.tasks or on_cpu():
        program, iterations = "bf16" if task == "breakout" else "eager", TASKS[task]["iterations"]
        one, other, wide = (
            start(task, program, PROGRAMS[program] | {"num_threads": threads}, iterations)
            for threads in (1, 1, 2)
        )
        for number in range(args.rounds):
            row = {"task": task, "round": number + 1, "one thread": turn(one)["sps"]}
            row["two threads"] = turn(wide)["sps"]
            for process in (one, other):
                print("go", file=process.stdin, flush=True)
            slower = min(read(process)["sps"] for process in (one, other))
            row["two runs"] = 2 * slower  # all of it is done when the slower one has ended
            rows.append(row)
            print(*row.values(), flush=True)
        for process in (one, other, wide):
            stop(process)
        save("threads.csv", rows)


def main():
    import tyro  # not above: it is not part of what is measured

    args = tyro.cli(Args)
    if args.against:
        compare_against(args)
    elif args.growth:
        grow(args)
    elif args.share:
        share(args)
    else:
        compare(args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:  # this file starts itself with it
        measure(json.loads(sys.argv[2]))
    else:
        main()
