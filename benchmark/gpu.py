"""What only a GPU can tell, in at most twelve minutes on a bare machine: python benchmark/gpu.py

    1. pong       minutes until the last 100 games of Pong have a mean of 18, from the start of the process
    2. switch     --cuda-graphs against torch.compile(mode="reduce-overhead"): first iteration, time, losses
    3. step       where a step of the rollout goes, with 8 and with 64 games: emulators, policy, the rest
    4. networks   the scripts for vectors on CPU and GPU: hidden sizes 64 to 1,024, 8 and 512 environments
    5. tests      python -m pytest -m gpu

Each part has a limit of its own and appends lines of JSON to --out as it goes, so that an early end loses
nothing. --small tries all of it within a minute, on a CPU too, where the numbers mean nothing.
"""

import dataclasses
import importlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"pong": 170, "switch": 75, "step": 45, "networks": 80, "tests": 120}  # seconds; pong twice
PONG = {"env_id": "PongNoFrameskip-v4", "num_envs": 64, "learning_rate": 3e-4, "clip_coef": 0.2}


@dataclasses.dataclass
class Args:
    parts: tuple[str, ...] = tuple(PARTS)
    seeds: tuple[int, ...] = (1, 2)  # of pong
    out: str = "gpu.jsonl"
    small: bool = False


def iterations_of(script, flags, enough, compile_mode=""):
    """Trains until enough(rows). A row per iteration: step, seconds since the start, charts, losses."""
    rows, start, module = [], time.time(), importlib.import_module(script)

    def write_log(writer, bar, charts, losses, global_step):
        rows.append({"step": global_step, "seconds": time.time() - start, **charts, **losses})

    module.write_log = write_log
    if compile_mode:  # in place of captured(function, agent)
        module.captured = lambda function, agent: torch.compile(function, mode=compile_mode)
        torch._dynamo.config.trace_autograd_ops = True
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(run_dir=f"{folder}/run", save_every=10**6, **flags)
        module.train(args, stop_requested=lambda: enough(rows))
    return rows


def measure(part, settings, pipe):
    """In a process of its own, so that no part inherits compiled code, memory or an initialised device."""
    sys.path.insert(0, str(ROOT))
    began, device, small = time.time(), settings["device"], settings["small"]
    limit = 6 if small else settings["limit"]
    late = lambda rows: time.time() - began > limit  # noqa: E731
    atari = {"device": device, "cuda_graphs": device == "cuda"}
    if part == "pong":
        flags = atari | PONG | {"total_timesteps": 2_000_000, "seed": settings["seed"]}
        flags |= {"precision": "bf16"} if device == "cuda" else {}
        flags |= {"num_envs": 4, "num_steps": 32, "total_timesteps": 512} if small else {}
        reached = lambda rows: late(rows) or (rows and rows[-1].get("episodic_return", -21) >= 18)  # noqa: E731
        rows = iterations_of("ppo_atari", flags, reached)
        last = {key: rows[-1].get(key) for key in ("step", "episodic_return", "SPS")}
        pipe.send(last | {"minutes": (time.time() - settings["born"]) / 60})
    if part == "switch":
        sizes = {"num_steps": 8, "num_envs": 2, "total_timesteps": 48} if small else {"num_envs": 64}
        flags = atari | sizes | {"max_episode_steps": 200}
        rows = iterations_of("ppo_atari", flags, lambda rows: len(rows) == 12 or late(rows), settings["mode"])
        first = {"first_iteration_s": rows[0]["seconds"], "losses": [row["pg_loss"] for row in rows[:3]]}
        seconds = (rows[-1]["seconds"] - rows[1]["seconds"]) / max(len(rows) - 2, 1)
        pipe.send(
            first | {"seconds_per_iteration": seconds, "memory_mb": torch.cuda.max_memory_allocated() / 2**20}
        )
    if part == "step":
        pipe.send(where_a_step_goes(atari, settings["num_envs"], 20 if small else 400))
    if part == "networks":
        flags = {"device": settings["on"], "num_envs": settings["num_envs"], "num_steps": 16 if small else 64}
        flags |= {"num_minibatches": 4, "hidden_sizes": (settings["size"],) * 2, "env_id": settings["env_id"]}
        rows = iterations_of(settings["script"], flags, lambda rows: len(rows) == 4 or late(rows))
        per_iteration = (rows[-1]["seconds"] - rows[0]["seconds"]) / max(len(rows) - 1, 1)
        pipe.send({"steps_per_s": rows[0]["step"] / per_iteration} if per_iteration > 0 else {})


def where_a_step_goes(flags, num_envs, steps):
    """Milliseconds of a step: the emulators alone, the policy alone, and the loop that train has."""
    module = importlib.import_module("ppo_atari")
    args = module.Args(num_envs=num_envs, **flags)
    envs, device = module.make_envs(args, num_envs), torch.device(args.device)
    agent = module.Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    act = module.captured(agent.act, agent) if args.cuda_graphs else agent.act
    obs, _ = envs.reset(seed=1)
    frames, actions = torch.as_tensor(obs, device=device), envs.action_space.sample()
    buffer = torch.zeros((steps, *frames.shape), dtype=torch.uint8, device=device)

    def loop(t):
        nonlocal obs
        buffer[t], action, *_ = act(torch.as_tensor(obs, device=device))
        obs, *_ = envs.step(action.cpu().numpy())

    parts = {
        "emulators": lambda t: envs.step(actions),
        "policy": lambda t: act(frames)[1].cpu(),
        "loop": loop,
    }
    result = {}
    with torch.no_grad():
        for name, part in parts.items():
            part(0)  # records the graph
            start = time.perf_counter()
            for t in range(steps):
                part(t)
            result[f"{name}_ms"] = 1e3 * (time.perf_counter() - start) / steps
    return result


def jobs(args, device):
    """(part, settings) in the order of what is worth most."""
    for seed in args.seeds:
        yield "pong", {"seed": seed}
    for mode in ("", "reduce-overhead"):
        yield "switch", {"mode": mode}
    for num_envs in (2,) if args.small else (8, 64):
        yield "step", {"num_envs": num_envs}
    for script, env_id in (("ppo_discrete", "CartPole-v1"), ("ppo_continuous", "Pendulum-v1")):
        for num_envs in (8,) if args.small else (8, 512):
            for size in (64,) if args.small else (64, 256, 1024):
                for on in ("cpu", device) if device == "cuda" else ("cpu",):
                    task = {"script": script, "env_id": env_id}
                    yield "networks", task | {"num_envs": num_envs, "size": size, "on": on}


def main(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    spawn = multiprocessing.get_context("spawn")
    spent = dict.fromkeys(PARTS, 0.0)
    with open(args.out, "a") as out:
        for part, settings in jobs(args, device):
            limit = PARTS[part] * (len(args.seeds) if part == "pong" else 1)
            if part not in args.parts or spent[part] > limit:
                continue
            start = time.time()
            known = settings | {"device": device, "small": args.small, "limit": PARTS[part], "born": start}
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=measure, args=(part, known, theirs))
            process.start()
            theirs.close()
            try:
                found = mine.recv() if mine.poll(PARTS[part] + 60) else {"error": "it took too long"}
            except EOFError:
                found = {"error": "see what it printed"}
            process.kill()
            process.join()
            spent[part] += time.time() - start
            line = json.dumps({"part": part} | settings | found | machine)
            print(line, file=out, flush=True)
            print(line, flush=True)
        if "tests" in args.parts:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
            print(json.dumps({"part": "tests", "last": done.stdout.splitlines()[-1]} | machine), file=out)
            print(done.stdout[-2000:])


if __name__ == "__main__":
    main(tyro.cli(Args))
