"""What each of the two processes of test_torchrun.py does: one program, so that they share a start.

    torchrun --standalone --nproc-per-node 2 torchrun_worker.py {main,all} [flags of ppo_atari.py]

main: ppo_atari.main() with these flags. all: the same; then, with the same connection, the gradient of
half a minibatch, a run that goes on from the first one, and one with a target KL. What a process finds out
is in rank<RANK>.pt afterwards. Last comes a main() that waits for Ctrl-C, in a folder of its own.
"""

import dataclasses
import os
import sys
from pathlib import Path

import ale_py
import stub_envs
import torch
from torch import distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

import ppo_atari

RANK = int(os.environ.get("RANK", 0))
# clipping off, without effect, and active; rows of one minibatch
LIMITS, M = (0.0, 1e6, 1e-3), 8


class Game(stub_envs.FakeAtari):
    """Three steps, each of which pays the seed of the environment: returns tell whose they are."""

    story, seeds = {"ends": stub_envs.THREE, "reward": lambda step, tag: tag}, []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)


def spy(name, before=lambda *args: None):
    """The results of a function of ppo_atari from now on, before(*args) run before each call."""
    results, function = [], getattr(ppo_atari, name)

    def spied(*args, **kwargs):
        before(*args)
        results.append(function(*args, **kwargs))
        return results[-1]

    setattr(ppo_atari, name, spied)
    return results


def run_main(flags):
    """What main trained, and what only this process has."""
    betas, drawn, adapt = [], [], ppo_atari.adapt_kl_coef

    def gone_astray(kl_coef, *args):
        kl = adapt(kl_coef, *args)
        return kl_coef.fill_(77.0).item() if RANK == 1 else kl

    def look(agent, batch, rows, args, kl_coef=None):
        betas.append(kl_coef.item() if kl_coef is not None else None)
        drawn.append(rows.tolist())

    ppo_atari.adapt_kl_coef = gone_astray
    watched = spy("compute_gradients", look), ppo_atari.compute_gradients
    ppo_atari.train.__defaults__ = *ppo_atari.train.__defaults__[:-1], watched[1]
    trained = spy("train")
    sys.argv = ["ppo_atari.py", *flags]
    ppo_atari.main()
    ppo_atari.adapt_kl_coef = adapt
    (result,) = trained
    if RANK == 0:
        print("=====", flush=True)
        print("=====", file=sys.stderr, flush=True)
    found = {
        "betas": list(betas),
        "drawn": list(drawn),
        "seed": Game.seeds[0],
        "return": result["episodic_return"],
    }
    files = [str(path) for path in Path("runs").rglob("*")]
    return found | {"agent": result["agent"].state_dict(), "files": files}


def average():
    """{limit: differences} between a minibatch in two halves and as a whole, with max_grad_norm at each."""
    torch.manual_seed(0)  # the same numbers in both
    frames = torch.randint(0, 256, (2 * M, 4, 84, 84), dtype=torch.uint8)
    batch = {"obs": frames, "actions": torch.randint(0, 3, (2 * M,)), "logprobs": torch.full((2 * M,), -1.1)}
    batch |= {name: torch.randn(2 * M) for name in ("advantages", "returns", "values")}
    batch["advantages"][M:] *= 10  # the halves have gradients of their own
    half = {name: x[RANK * M :][:M] for name, x in batch.items()}
    space = ppo_atari.gym.spaces.Box(0, 255, (4, 84, 84), "uint8"), ppo_atari.gym.spaces.Discrete(3)
    found = {}
    for limit in LIMITS:
        args = ppo_atari.Args(norm_adv=False, max_grad_norm=limit)
        agent = ppo_atari.Agent(*space, args)
        learned = list(agent.parameters())
        agent.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)  # has no gradient to average
        ppo_atari.WORLD_SIZE = 1  # the whole minibatch, in this process alone
        whole = ppo_atari.compute_gradients(agent, batch, torch.arange(2 * M), args)
        expected = torch.cat([x.grad.flatten() for x in learned])
        agent.zero_grad()
        ppo_atari.WORLD_SIZE = 2
        stats = ppo_atari.compute_gradients(agent, half, torch.arange(M), args)
        gradient = torch.cat([x.grad.flatten() for x in learned])
        found[limit] = {
            "norms": [gradient.norm().item(), expected.norm().item()],
            "difference": ((gradient - expected).norm() / expected.norm()).item(),
            "stats": {name: [x.item(), whole[name].item()] for name, x in stats.items()},
        }
    return found


def resume():
    """One iteration more, from the checkpoint that rank 0 wrote."""
    (run_dir,) = Path("runs").iterdir()
    saved = ppo_atari.load_checkpoint(run_dir)
    more = {"resume": str(run_dir), "total_timesteps": saved["global_step"] + 64}
    result = ppo_atari.train(dataclasses.replace(saved["args"], **more))
    return result["agent"].state_dict()


def stop_by_kl():
    """Optimiser steps taken with --target-kl 0.1, where only rank 0 sees a KL: 0, 0.15 and 0.3."""
    steps, loss, kls = [], ppo_atari.ppo_loss, iter([0.0, 0.15, 0.3, *[9.0] * 99])

    def scripted(*args, **kwargs):
        total, stats = loss(*args, **kwargs)
        return total, stats | {"approx_kl": torch.tensor(next(kls) * (RANK == 0))}

    ppo_atari.ppo_loss = scripted
    register_optimizer_step_post_hook(lambda *args: steps.append(1))
    sizes = {"num_envs": 4, "num_steps": 16, "total_timesteps": 64, "num_minibatches": 4, "update_epochs": 2}
    ppo_atari.train(ppo_atari.Args(target_kl=0.1, run_dir="kl", device="cpu", **sizes))
    return len(steps)


def main():
    what, *flags = sys.argv[1:]
    Path(f"pid{RANK}").write_text(str(os.getpid()))
    ale_py.AtariVectorEnv = Game
    if what == "main":
        run_main(flags)
        return
    disconnect, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    found = run_main(flags)
    found |= {"average": average(), "resumed": resume(), "steps": stop_by_kl()}
    torch.save(found, f"rank{RANK}.pt")
    distributed.destroy_process_group = disconnect
    Path("interrupted").mkdir(exist_ok=True)
    os.chdir("interrupted")
    spy("write_log", lambda *args: Path("logged").touch())
    sys.argv = ["ppo_atari.py", *flags, "--total-timesteps", "1000000", "--save-every", "1000000"]
    ppo_atari.main()


if __name__ == "__main__":
    main()
