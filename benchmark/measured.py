"""A process that speed.py starts: it runs a program in turns, as a job in JSON says, and prints their times.

It imports what the program needs and nothing else, since its memory and its start are measured, too.
"""

import importlib
import json
import multiprocessing
import os
import resource
import runpy
import sys
import time
import types
from functools import partial
from pathlib import Path

WARMUP = 2  # iterations before the first turn


def around(holder, name, before=int, after=int):
    """Call before and after, which do nothing by default, around each call of holder.name."""
    function = getattr(holder, name)

    def wrapped(*args, **kwargs):
        before()
        result = function(*args, **kwargs)
        after()
        return result

    setattr(holder, name, wrapped)


class Clock:
    """Counts the time of a turn's iterations, tells it to the parent, and waits to be asked for the next."""

    def __init__(self, job, args):
        self.job, self.batch, self.first_iteration_s = job, args.num_envs * args.num_steps, None
        self.begin_turn(WARMUP)

    def begin_turn(self, iterations):
        self.iterations, self.done = iterations, 0
        self.in_envs = self.in_rollout = 0.0
        self.turn_began = self.began = time.perf_counter()

    def watch(self, envs, method="step"):
        """Count the time in a method of envs."""
        around(envs, method, self.env_step_began, self.env_step_ended)
        return envs

    def env_step_began(self):
        self.env_step_start = time.perf_counter()

    def env_step_ended(self):
        self.in_envs += time.perf_counter() - self.env_step_start

    def rollout_ended(self):
        self.in_rollout += time.perf_counter() - self.began

    def iteration_ended(self):
        self.began = time.perf_counter()
        self.first_iteration_s = self.first_iteration_s or time.time() - self.job["born"]
        self.done += 1
        if self.done == self.iterations:
            self.tell(self.began - self.turn_began)
            self.begin_turn(self.job["iterations"])

    def tell(self, seconds):
        row = {
            "sps": self.done * self.batch / seconds,
            "environment_ms": 1e3 * self.in_envs / self.done,
            "policy_ms": 1e3 * (self.in_rollout - self.in_envs) / self.done,
            "update_ms": 1e3 * (seconds - self.in_rollout) / self.done,
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


def measure_script(script, args, job):
    """train() as main calls it; the clock sees where advantages begin and when an iteration is logged."""
    if hasattr(script, "keep_freed_memory"):
        script.keep_freed_memory()
    clock, make_envs = Clock(job, args), script.make_envs
    script.make_envs = lambda *args: clock.watch(make_envs(*args))
    around(script, "compute_gae", before=clock.rollout_ended)
    around(script, "write_log", after=clock.iteration_ended)
    script.train(args)


def measure_sb3(args, job):
    """SB3's PPO, told to do what the script does with these arguments. The script itself is not imported."""
    import gymnasium
    import stable_baselines3 as sb3
    import torch
    from stable_baselines3.common import env_util, vec_env

    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    clock = Clock(job, args)
    atari = job["script"] == "ppo_atari"
    assert args.anneal_lr and args.norm_adv, "what is not passed on is the same in both"
    assert atari or (args.activation == "tanh" and args.norm_obs == args.norm_reward)
    if atari:
        env_id = f"ale_py:{args.env_id}"  # imports ale_py, which registers it, in workers as well
        kind = vec_env.SubprocVecEnv if job["program"] == "sb3 subproc" else vec_env.DummyVecEnv
        envs = env_util.make_atari_env(env_id, args.num_envs, seed=args.seed, vec_env_cls=kind)
        envs = vec_env.VecFrameStack(envs, 4)
        policy, kwargs = "CnnPolicy", {}
    else:
        envs = vec_env.DummyVecEnv([lambda: env_util.Monitor(gymnasium.make(args.env_id))] * args.num_envs)
        policy, kwargs = "MlpPolicy", {"net_arch": args.hidden_sizes, "activation_fn": torch.nn.Tanh}
        kwargs["log_std_init"] = getattr(args, "init_log_std", 0.0)  # of continuous actions
        if args.norm_obs:
            envs = vec_env.VecNormalize(envs, gamma=args.gamma)

    same = ("gamma", "gae_lambda", "ent_coef", "max_grad_norm", "device", "seed")
    model = sb3.PPO(
        policy,
        clock.watch(envs, "step_wait"),
        learning_rate=lambda remaining: remaining * args.learning_rate,
        n_steps=args.num_steps,
        batch_size=args.num_steps * args.num_envs // args.num_minibatches,
        n_epochs=args.update_epochs,
        clip_range=args.clip_coef,
        clip_range_vf=args.clip_coef if args.clip_vloss else None,
        vf_coef=args.vf_coef / 2,  # SB3's value loss lacks the factor 1/2
        policy_kwargs=kwargs,
        **{name: getattr(args, name) for name in same},
    )
    around(model, "train", clock.rollout_ended, clock.iteration_ended)
    model.learn(args.total_timesteps)


def measure_cleanrl(args, job):
    """CleanRL's script as it is, of its release 1.2.0 in the folder CLEANRL, with these arguments."""
    import torch
    from torch.utils.tensorboard import SummaryWriter

    names = {"ppo_discrete": ("ppo", "gym"), "ppo_continuous": ("ppo_continuous_action", "gymnasium")}
    name, package = names[job["script"]]
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    clock, add_scalar = Clock(job, args), SummaryWriter.add_scalar
    clock.watch(importlib.import_module(package).vector.SyncVectorEnv)
    around(torch, "zeros_like", before=clock.rollout_ended)  # once per iteration, for the advantages

    def logged(writer, tag, *args):
        add_scalar(writer, tag, *args)
        if tag == "charts/SPS":
            clock.iteration_ended()

    SummaryWriter.add_scalar = logged
    same = ("env_id", "total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "seed")
    same += ("learning_rate", "gamma", "gae_lambda", "clip_coef", "ent_coef", "vf_coef", "max_grad_norm")
    path = Path(os.environ["CLEANRL"], f"{name}.py").resolve()
    sys.argv = [str(path), *(f"--{x.replace('_', '-')}={getattr(args, x)}" for x in same)]
    Path(args.run_dir).mkdir()
    os.chdir(args.run_dir)
    runpy.run_path(str(path), run_name="__main__")


def products(script, agent, obs, training):
    """The matrix products and convolutions of one call of the agent, and if training of its gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("mm", "addmm", "convolution", "convolution_backward"):
                calls.append(partial(getattr(script.torch, name, function), *args))  # torch.mm starts faster
            return function(*args, **kwargs or {})

    obs = agent.normalize(obs)
    with Recorder(), script.torch.set_grad_enabled(training):
        _, logprob, _, value = agent.get_action_and_value(obs)
        if training:
            (logprob + value).sum().backward()
    return calls


def measure_limit(script, args, job):
    """Environments alone, and products and convolutions alone, each as often as an iteration needs them.
    The program `environments` is the first of these."""
    torch, envs = script.torch, script.make_envs(args, args.num_envs)
    bare = envs.unwrapped  # without our statistics of rewards
    obs = torch.tensor(bare.reset(seed=1)[0])
    bare.action_space.seed(1)
    actions = [bare.action_space.sample() for _ in range(args.num_steps)]
    act = update = []
    if job["program"] != "environments":
        agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
        size = args.num_steps * args.num_envs // args.num_minibatches
        act = products(script, agent, obs, training=False)
        update = products(script, agent, obs[torch.arange(size) % len(obs)], training=True)
        update *= args.update_epochs * args.num_minibatches
    torch.set_grad_enabled(False)  # the gradients are among the products
    clock = Clock(job, args)
    clock.watch(bare)
    while True:
        for action in actions:
            bare.step(action)
            for product in act:
                product()
        clock.rollout_ended()
        for product in update:
            product()
        clock.iteration_ended()


def main(job):
    others = {"sb3": measure_sb3, "cleanrl": measure_cleanrl}
    if other := others.get(job["program"].split()[0]):
        other(types.SimpleNamespace(**job["flags"]), job)
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    script = importlib.import_module(job["script"])
    args = script.Args(**job["flags"])
    script.torch.set_num_threads(args.num_threads or script.torch.get_num_threads())
    alone = job["program"] in ("limit", "bf16 limit", "environments")
    measure = measure_limit if alone else measure_script
    measure(script, args, job)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
