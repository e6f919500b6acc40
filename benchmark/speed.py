"""Steps per second of the scripts, of Stable-Baselines3 at the same hyperparameters, and of the machine.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                         # writes benchmark/speed.csv and prints its table
    python benchmark/speed.py --tasks cartpole --rounds 20
    python benchmark/speed.py --growth                # --num-envs 1 to 256: benchmark/growth.csv, growth.png
    python benchmark/speed.py --share                 # one thread, two, two runs: benchmark/threads.csv

Each program is a process of its own, on the CPU, with its own start and peak of memory. After two iterations
they take turns of some seconds, one at a time, so that whatever else the machine does hits all of them. Times
are means over the iterations of a turn; tables show medians over rounds of turns, and of ratios in a round.
The limit is the time that the environments take with random actions plus that of the matrix products and
convolutions of rollout and update, and nothing else. In the parts of an iteration, SB3's environments contain
the normalisation of observations and its policy GAE, which are in the scripts' policy and update.
"""

import csv
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
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
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # behind what a caller has: tests point at copies

# What is not said is a default of the script. iterations: of one turn
TASKS = {
    "cartpole": dict(script="ppo_discrete", iterations=20),
    "halfcheetah": dict(script="ppo_continuous", iterations=2),
    "breakout": dict(script="ppo_atari", iterations=1),
}
PROGRAMS = {  # a program that is neither sb3 nor limit is the script with these flags
    "eager": {},
    "compile": {"compile": True},
    "sb3": {},
    "limit": {},
    "bf16": {"precision": "bf16"},
    "bf16 compile": {"precision": "bf16", "compile": True},
    "bf16 limit": {"precision": "bf16"},
}
WARMUP = 2


@dataclasses.dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    rounds: int = 10  # of turns
    threads: int = 0  # of torch and of the emulators, in all programs; 0: what each takes by itself
    growth: bool = False  # instead: the scripts with 1 to 256 environments
    share: bool = False  # instead: the scripts with one thread and with two, and two runs side by side
    measure: str = ""  # one measurement, in JSON: this file starts itself with it


class Clock:
    """Turns of some iterations each, after WARMUP others; the times of one go to the parent when it ends."""

    def __init__(self, job, batch):
        self.job, self.batch = job, batch
        self.iterations, self.in_envs, self.rollout, self.first = 0, 0.0, 0.0, None
        self.times, self.began = [], time.perf_counter()

    def watch(self, envs, method="step"):
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

    def end(self):
        now = time.perf_counter()
        self.iterations += 1
        self.first = self.first or round(time.time() - self.job["born"], 2)
        self.times.append(now - self.began)
        count = len(self.times)
        if self.iterations == WARMUP or (self.iterations > WARMUP and count == self.job["iterations"]):
            row = {"sps": count * self.batch / sum(self.times), "environment_ms": 1e3 * self.in_envs / count}
            row["policy_ms"] = 1e3 * (self.rollout - self.in_envs) / count
            row["update_ms"] = 1e3 * (sum(self.times) - self.rollout) / count
            tell(row | {"first_iteration_s": self.first})
            self.times, self.in_envs, self.rollout = [], 0.0, 0.0
        self.began = time.perf_counter()


def tell(row):
    """Report a turn and wait for the next one."""
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({key: round(value, 2) for key, value in row.items()}), flush=True)
    if not sys.stdin.readline():  # the parent has seen enough
        os._exit(0)


def measure_ours(script, args, job):
    """train() as it is; the clock reads what it logs."""
    clock = Clock(job, args.num_envs * args.num_steps)

    class Writer(script.SummaryWriter):
        def add_scalar(self, key, value, step):
            now = time.perf_counter()
            super().add_scalar(key, value, step)
            if key == "charts/SPS_update":  # the update ended just now: subtract what it took
                clock.rollout_ended(now - clock.batch / value)
            if key == "losses/explained_variance":  # the last of an iteration
                clock.end()

    make_envs, script.SummaryWriter = script.make_envs, Writer
    script.make_envs = lambda *args: clock.watch(make_envs(*args))
    script.train(args)


def measure_sb3(args, job):
    """SB3's PPO, told to do what the script does by default."""
    import gymnasium
    import stable_baselines3 as sb3
    import torch
    from stable_baselines3.common import callbacks, env_util, vec_env

    if hasattr(args, "precision"):
        envs = env_util.make_atari_env(args.env_id, args.num_envs, seed=1)
        envs, policy = vec_env.VecFrameStack(envs, 4), "CnnPolicy"
        kwargs = {}
    else:
        envs = vec_env.DummyVecEnv([lambda: env_util.Monitor(gymnasium.make(args.env_id))] * args.num_envs)
        policy = "MlpPolicy"
        kwargs = dict(net_arch=list(args.hidden_sizes), activation_fn=torch.nn.Tanh)
        if args.norm_obs:
            envs = vec_env.VecNormalize(envs, gamma=args.gamma)
    clock = Clock(job, args.num_steps * args.num_envs)

    class Callback(callbacks.BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps:  # the first one starts before anything was trained
                clock.end()

        def _on_rollout_end(self):
            clock.rollout_ended(time.perf_counter())

        def _on_step(self):
            return True

    model = sb3.PPO(
        policy,
        clock.watch(envs, "step_wait"),
        learning_rate=lambda remaining: remaining * args.learning_rate,
        n_steps=args.num_steps,
        batch_size=clock.batch // args.num_minibatches,
        n_epochs=args.update_epochs,
        gamma=args.gamma,
        gae_lambda=args.gae_lambda,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef,
        ent_coef=args.ent_coef,
        vf_coef=args.vf_coef / 2,  # SB3's value loss lacks the factor 1/2
        max_grad_norm=args.max_grad_norm,
        policy_kwargs=kwargs,
        device="cpu",
        seed=1,
    )
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
    """Environments alone, and products and convolutions alone, each as often as an iteration needs them."""
    torch, envs = script.torch, script.make_envs(args, args.num_envs)
    bare, space = envs.unwrapped, envs.single_action_space  # without our statistics of rewards
    obs = torch.tensor(bare.reset(seed=1)[0])
    bare.action_space.seed(1)
    actions = [bare.action_space.sample() for _ in range(args.num_steps)]
    outputs = space.n.item() if hasattr(space, "n") else space.shape[0]
    agent = script.Agent(obs.shape[1:], outputs, args)
    batch = args.num_steps * args.num_envs
    minibatch = obs[torch.arange(batch // args.num_minibatches) % len(obs)]
    act, (forward, backward) = products(torch, agent, obs)[0], products(torch, agent, minibatch)
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
        clock.end()


def measure(job):
    """What a child process does: turns of one program, until nobody asks for another."""
    script = importlib.import_module(TASKS[job["task"]]["script"])
    args = script.Args(run_dir=f"{job['folder']}/run", device="cpu", **job["flags"])
    threads = job["flags"].get("num_threads", 0) if job["program"] == "sb3" else args.num_threads
    script.torch.set_num_threads(threads or script.torch.get_num_threads())
    if job["program"] == "sb3":
        measure_sb3(args, job)
    elif "limit" in job["program"]:
        measure_limit(script, args, job)
    else:
        measure_ours(script, args, job)


def start(task, program, flags, iterations):
    """A process with the program, past its warm-up."""
    job = dict(task=task, program=program, flags=flags, iterations=iterations, born=time.time())
    job["folder"] = tempfile.mkdtemp()
    command = [sys.executable, __file__, "--measure", json.dumps(job)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    process.folder = job["folder"]
    read(process)
    return process


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


def machine():
    """What numbers depend on."""
    names = "torch gymnasium ale-py mujoco numpy stable-baselines3".split()
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), platform.processor())
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in names)
    return {"cpu": cpu, "cores": len([x for x in info if x.startswith("processor")]), "versions": versions}


def save(name, rows, tasks):
    """Write rows to a CSV file of this folder, in place of older ones of the same tasks; return all."""
    path, rows = HERE / name, [row | machine() for row in rows]
    if path.exists():
        rows += [row for row in csv.DictReader(path.open(newline="")) if row["task"] not in tasks]
    rows.sort(key=lambda row: list(TASKS).index(row["task"]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def compare(args):
    rows = []
    for task in args.tasks:
        flags = {"num_threads": args.threads} if args.threads else {}
        chosen = {k: v | flags for k, v in PROGRAMS.items() if task == "breakout" or "bf16" not in k}
        processes = {k: start(task, k, v, TASKS[task]["iterations"]) for k, v in chosen.items()}
        for number in range(args.rounds):
            order = list(processes)  # of a round: each one starts with another program
            turns = {
                x: turn(processes[x]) for x in order[number % len(order) :] + order[: number % len(order)]
            }
            for program in order:
                rows.append({"task": task, "program": program, "round": number + 1} | turns[program])
                print(*rows[-1].values(), flush=True)
        for process in processes.values():
            stop(process)
    print("\n".join(table(save("speed.csv", rows, args.tasks))))


def table(rows):
    """Lines of Markdown: medians over the rounds; ratios are medians of the ratios within a round."""
    lines = [
        "| task | program | steps/s | x SB3 | environments | policy | update | memory | first iteration |"
    ]
    lines.append("| --- " * 9 + "|")
    sb3 = {(row["task"], str(row["round"])): float(row["sps"]) for row in rows if row["program"] == "sb3"}
    for task, program in dict.fromkeys((row["task"], row["program"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["program"]) == (task, program)]
        ratio = statistics.median(float(row["sps"]) / sb3[task, str(row["round"])] for row in mine)
        keys = "sps environment_ms policy_ms update_ms peak_mb first_iteration_s".split()
        sps, *times, memory, first = (statistics.median(float(row[key]) for row in mine) for key in keys)
        cells = [task, program, f"{sps:,.0f}", f"{ratio:.2f}", *(f"{x:.0f} ms" for x in times)]
        lines.append("| " + " | ".join([*cells, f"{memory:.0f} MB", f"{first:.1f} s"]) + " |")
    return lines


def growth_table(rows):
    """Lines of Markdown: steps per second, and megabytes, of each task by number of environments."""
    numbers = list(dict.fromkeys(row["num_envs"] for row in rows))
    lines = [f"| `--num-envs` | {' | '.join(map(str, numbers))} |", "| --- " * (1 + len(numbers)) + "|"]
    for key, unit in ("sps", "steps/s"), ("peak_mb", "MB"):
        for task in dict.fromkeys(row["task"] for row in rows):
            cells = [f"{float(row[key]):,.0f}" for row in rows if row["task"] == task]
            lines.append(f"| {task}, {unit} | {' | '.join(cells)} |")
    return lines


def share_table(rows):
    """Lines of Markdown: medians over rounds, relative to one run with one thread."""
    keys = ("one thread", "two threads", "two runs")
    lines = ["| at once | one run, one thread | one run, two threads | two runs, one thread each |"]
    lines.append("| --- " * 4 + "|")
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        cells = [f"{statistics.median(float(x['one thread']) for x in mine):,.0f} steps/s"]
        for key in keys[1:]:
            cells.append(f"x {statistics.median(float(x[key]) / float(x['one thread']) for x in mine):.2f}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def grow(args):
    """Few steps per environment, since 256 environments with a whole rollout each would fill minutes."""
    rows = []
    for task, number in itertools.product(args.tasks, (1, 2, 4, 8, 16, 32, 64, 128, 256)):
        flags = {"num_envs": number, "num_steps": 32 if task == "breakout" else 128}
        flags |= {"precision": "bf16"} if task == "breakout" else {}
        flags |= {"num_threads": args.threads} if args.threads else {}
        process = start(task, "eager", flags, max(1, 32 // number))
        turns = [turn(process) for _ in range(3 if number < 64 else 1)]
        stop(process)
        row = {key: statistics.median(x[key] for x in turns) for key in turns[0]}
        rows.append({"task": task, "num_envs": number} | row)
        print(*rows[-1].values(), flush=True)
    draw(save("growth.csv", rows, args.tasks), HERE / "growth.png")


def share(args):
    """Steps/s of a run with one thread, of one with two, and of two at once with one thread each."""
    rows = []
    for task in args.tasks:
        flags, iterations = {"precision": "bf16"} if task == "breakout" else {}, TASKS[task]["iterations"]
        one, other, wide = (start(task, "eager", flags | {"num_threads": n}, iterations) for n in (1, 1, 2))
        for number in range(args.rounds):
            row = {"task": task, "round": number + 1, "one thread": turn(one)["sps"]}
            row["two threads"] = turn(wide)["sps"]
            for process in (one, other):
                print("go", file=process.stdin, flush=True)
            row["two runs"] = 2 * min(
                read(process)["sps"] for process in (one, other)
            )  # all by the last one's end
            rows.append(row)
            print(*row.values(), flush=True)
        for process in (one, other, wide):
            stop(process)
    save("threads.csv", rows, args.tasks)


def draw(rows, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, label in zip(
        axes, ("sps", "peak_mb"), ("steps per second", "peak memory, MB"), strict=True
    ):
        for task in dict.fromkeys(row["task"] for row in rows):
            mine = [row for row in rows if row["task"] == task]
            axis.plot([int(x["num_envs"]) for x in mine], [float(x[key]) for x in mine], "o-", label=task)
        axis.set(xscale="log", yscale="log", xlabel="--num-envs", ylabel=label)
        axis.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        ticks = (100, 1_000, 10_000, 100_000) if key == "sps" else (300, 600, 1_200, 2_400)
        axis.set_yticks(ticks, [f"{x:,}" for x in ticks])
        axis.minorticks_off()
        axis.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    chosen = tyro.cli(Args)
    if chosen.measure:
        measure(json.loads(chosen.measure))
    else:
        (grow if chosen.growth else share if chosen.share else compare)(chosen)
