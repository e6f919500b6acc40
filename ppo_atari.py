# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0",
#                 "tqdm==4.70.1", "moviepy==2.2.1", "ale-py==0.12.1"]
# ///
"""PPO for Atari 2600 games from pixels, the whole algorithm in one file. Try --help.
Measured, torch 2.13 on one core of an AMD EPYC: Breakout 19.7, 20.1, 21.3 after 1M steps (seeds 1, 2, 3).
Papers: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438. Tags in brackets number
details of https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details and, as "ours", what is new
against CleanRL's ppo_atari.py. Shapes: T num_steps, N num_envs, B = T * N batch, M minibatch."""

import ctypes
import dataclasses
import difflib
import math
import random
import signal
import sys
import time
from contextlib import closing
from importlib import import_module, util
from pathlib import Path
from shutil import which
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

CAN_COMPILE = bool(which("g++")) and any(Path(sys.base_prefix).glob(f"include/*{sys.version[:4]}/Python.h"))


@dataclasses.dataclass
class Args:
    exp_name: str = "ppo_atari"  # name of the experiment, part of the run directory's name
    seed: int = 1  # seed of torch, numpy, Python's random and the environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda if there is one, else the CPU
    num_threads: int = 0  # CPU threads of torch and of the emulators, 0: their choice
    precision: Literal["auto", "fp32", "bf16"] = "fp32"  # of the CNN; auto: bf16 on CPUs with AVX512-BF16
    compile: bool = False  # torch.compile: 5 to 20 s later, then faster
    torch_deterministic: bool = True  # on CUDA: only deterministic cuDNN kernels
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "ppo"  # project for --track
    wandb_entity: str | None = None  # entity (team) for --track
    env_id: str = "BreakoutNoFrameskip-v4"  # <Game>NoFrameskip-v4; or ALE/<Game>-v5, with sticky actions
    total_timesteps: int = 10_000_000  # steps of 4 frames, of all games, rounded down to whole iterations
    learning_rate: float = 2.5e-4  # Adam's step size, at the start where annealed
    num_envs: int = 8  # environments in all
    num_steps: int = 128  # steps of each environment per iteration
    anneal_lr: bool = True  # lower the learning rate linearly, to one step above zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE; 1: rewards-to-go minus V, 0: one-step TD error
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over the batch per iteration
    norm_adv: bool = True  # normalise advantages in each minibatch
    objective: Literal["clip", "kl-penalty"] = "clip"  # bounds the policy's step by clipping or by a penalty
    clip_coef: float = 0.1  # epsilon of the clipped objective and of the value clipping
    kl_penalty_coef: float = 1.0  # beta of kl-penalty at first; doubles or halves after updates off target
    kl_penalty_target: float = 0.01  # KL between the policies before and after an update that beta steers to
    clip_vloss: bool = True  # clip the value loss (as openai/baselines does, not in the paper)
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss, which has a factor 1/2 of its own
    max_grad_norm: float = 0.5  # limit of the norm of the whole gradient; 0: off
    target_kl: float | None = None  # end the update before a step at an approximate KL above this
    max_episode_steps: int = 0  # truncate games after so many steps; 0: after 27,000 (108,000 frames)
    run_dir: str = ""  # directory to write to; empty: a new runs/<env>__<exp>__<seed>__<time>
    save_every: int = 50  # iterations between checkpoints; the last iteration always writes one
    resume: str = ""  # checkpoint.pt, or its directory, to continue with the flags it was started with
    evaluate: str = ""  # checkpoint.pt, or its directory, to evaluate instead of training
    eval_episodes: int = 10  # episodes of --evaluate and of the evaluation after training; 0: none
    deterministic: bool = False  # evaluate the most probable action instead of sampled ones
    capture_video: bool = False  # write the first evaluated episode to <run_dir>/videos


class UsageError(ValueError):
    """Bad input, told in one line that names the flag and the fix; main exits with code 2."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


def check_args(args):  # before anything is started or written
    counts = "num_envs num_steps num_minibatches update_epochs save_every total_timesteps"
    limits = {"gamma": (0, 1), "gae_lambda": (0, 1), "seed": (0, 10**9)}
    for name, value in vars(args).items():
        low, high = limits.get(name, (int(name in counts.split()), math.inf))  # counts: from 1
        good = not isinstance(value, int | float) or (low <= value <= high and math.isfinite(value))
        require(good, f"--{name.replace('_', '-')} {value}: use a finite number from {low} to {high}")
    B, parts = args.num_steps * args.num_envs, args.num_minibatches
    whole = B % parts == 0 and (B > parts or not args.norm_adv)  # the std of one advantage would be nan
    batch = f"--num-steps {args.num_steps} x --num-envs {args.num_envs} = {B} in --num-minibatches {parts}"
    require(whole, f"{batch} must give equal parts of 2 or more (of 1 with --no-norm-adv): change one")
    require(not args.track or util.find_spec("wandb"), "--track: pip install wandb")
    require(CAN_COMPILE or not args.compile, "--compile: apt install g++ python3-dev, or --no-compile")
    require(not args.capture_video or util.find_spec("moviepy"), "--capture-video: pip install moviepy")
    there = args.device in ("auto", "cpu") or getattr(torch, args.device).is_available()
    require(there, f"--device {args.device} is not available to this build of torch: use --device cpu")


class LearningSignal(gym.wrappers.vector.RecordEpisodeStatistics):  # which records raw returns of games
    def __init__(self, envs, colour, videos):
        super().__init__(envs)
        self.colour, self.videos, self.frames = colour, videos, []
        self.fire = {x: i for i, x in enumerate(envs.ale.get_action_set())}.get(ale_py.Action.FIRE)

    def reset(self, **kwargs):
        obs, infos = super().reset(**kwargs)
        self.lives, self.lost = infos["lives"], np.zeros(self.num_envs, bool)
        if self.videos:
            self.colour.reset(**kwargs)
        return obs, infos

    def step(self, actions):
        # [atari 4] Breakout waits for FIRE after a lost life; the action chosen there is kept, but not played
        if self.fire is not None:
            actions = np.where(self.lost, self.fire, actions)
        obs, rewards, terminated, truncated, infos = super().step(actions)
        lost, self.lives = (0 < infos["lives"]) & (infos["lives"] < self.lives), infos["lives"]  # [atari 3]
        self.lost = lost & ~(terminated | truncated)  # where a game ended, these are the lives of the next
        if self.videos and not self.return_queue:  # until the first game ends
            self.frames.append(self.colour.step(actions)[0][0, -1])  # (210, 160, 3)
        return obs, np.sign(rewards), terminated | self.lost, truncated, infos  # [atari 6]

    def close(self, **kwargs):
        if self.frames:
            import_module("gymnasium.utils.save_video").save_video(self.frames, self.videos, fps=15)
        return super().close(**kwargs)


def make_envs(args, num_envs, videos=None):
    """num_envs games as one [core 1], videos: folder for an mp4. UsageError for a bad args.env_id."""
    games = {}
    for rom in ale_py.roms.get_all_rom_ids():
        name = "".join(word.capitalize() for word in rom.split("_"))
        games |= {f"{name}NoFrameskip-v4": (rom, 0.0), f"ALE/{name}-v5": (rom, 0.25), rom: (rom, 0.0)}
    near = " or ".join(difflib.get_close_matches(args.env_id, games, cutoff=0.5)) or "breakout"
    require(args.env_id in games, f"--env-id {args.env_id}: no Atari game, try {near} (or ppo_discrete.py)")
    rom, sticky = games[args.env_id]
    # [ours 2] NEXT_STEP, the default, spends a step of reward 0 on a reset: a row nobody should learn from
    mode = gym.vector.AutoresetMode.SAME_STEP
    options = dict(autoreset_mode=mode, num_threads=args.num_threads, repeat_action_probability=sticky)
    options |= dict(noop_max=30, use_fire_reset=True, frameskip=4, maxpool=True)  # [atari 1] [atari 2]
    options |= dict(max_num_frames_per_episode=4 * args.max_episode_steps or 108_000, full_action_space=False)
    # off: one would reset games at lost lives, the others would hide where games end and raw rewards
    options |= dict(episodic_life=False, life_loss_info=False, reward_clipping=False)
    grey = dict(img_height=84, img_width=84, grayscale=True, stack_num=4)  # [atari 5] [atari 7]
    envs = ale_py.AtariVectorEnv(rom, num_envs, **options, **grey)
    assert envs.autoreset_mode == mode
    colour = dict(img_height=210, img_width=160, grayscale=False, stack_num=1)
    colour = ale_py.AtariVectorEnv(rom, 1, **options, **colour) if videos else None  # in colour
    return LearningSignal(envs, colour, videos)


def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)  # [core 2] std is their gain
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):  # Nature CNN, one trunk for policy and value function [atari 8]
    def __init__(self, obs_shape, num_actions, args):
        super().__init__()
        cpu = args.device == "cpu" or (args.device == "auto" and not torch.cuda.is_available())
        auto = "bf16" if cpu and torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"
        self.shapes, self.bf16 = (obs_shape, num_actions), args.precision.replace("auto", auto) == "bf16"
        self.network = nn.Sequential(
            *(layer_init(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU()),
            *(layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU()),
            *(layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten()),
            *(layer_init(nn.Linear(64 * 7 * 7, 512)), nn.ReLU()),
        )
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)  # the first policy is almost uniform
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)

    def normalize(self, obs, update=False):
        return obs  # as the buffer keeps them: uint8, a quarter of the memory of float32

    def trunk(self, obs):
        x = obs.contiguous(memory_format=torch.channels_last)  # (N, 4, 84, 84) uint8
        x = x.to(torch.bfloat16 if self.bf16 else torch.float32).div_(255)  # [atari 9]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x).float()  # (N, 512), heads and loss stay in float32

    def get_value(self, obs):
        return self.critic(self.trunk(obs)).squeeze(-1)  # V of each observation, (N,)

    def get_action_and_value(self, obs, action=None, deterministic=False):
        """Action (given, sampled or most probable), its log-probability, the policy's entropy, V; (N,)."""
        features = self.trunk(obs)  # (N, 512)
        dist = torch.distributions.Categorical(logits=self.actor(features), validate_args=False)
        if action is None:  # argmax(p / exponential noise) is a sample of p, faster than dist.sample()
            noise = 1.0 if deterministic else torch.empty_like(dist.probs).exponential_()
            action = (dist.probs / noise).argmax(-1)
        return action, dist.log_prob(action), dist.entropy(), self.critic(features).squeeze(-1)


def compute_gae(rewards, values, dones, next_value, gamma, gae_lambda):
    """Generalised advantage estimation [core 5], PPO paper eq. 11 and 12: (advantages, returns), (T, N) each.
    rewards, values, dones: (T, N); dones[t] is 1 where action t ended the episode (CleanRL: dones[t + 1]). If
    truncated, rewards[t] contains gamma * V(final observation). next_value: (N,), V after the last step."""
    nonterminal = 1.0 - dones.to(values.dtype)  # 0 cuts off what follows in the row: it is another episode
    next_values = torch.cat([values[1:], next_value.unsqueeze(0)])  # (T, N)
    deltas = list(rewards + gamma * next_values * nonterminal - values)  # eq. 12
    decays = list(gamma * gae_lambda * nonterminal)  # lists of T tensors (N,), faster to index than a (T, N)
    advantages, lastgaelam = deltas.copy(), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):  # eq. 11 as a recursion
        advantages[t] = lastgaelam = deltas[t] + decays[t] * lastgaelam
    advantages = torch.stack(advantages)
    return advantages, advantages + values


def ppo_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args, kl_coef=None):
    """Loss to minimise, PPO paper eq. 9, and a dict of detached scalars. Tensors: (M,), as asserted.
    newlogprob, entropy, newvalue: of the current weights; logprobs, values: of those that made the rollout.
    args: anything with clip_coef, clip_vloss, ent_coef, vf_coef, norm_adv. kl_coef: None to clip, or beta."""
    shapes = {x.shape for x in (newlogprob, entropy, newvalue, logprobs, advantages, returns, values)}
    assert len(shapes) == 1, f"shapes {shapes} would broadcast"
    logratio = newlogprob - logprobs
    ratio = logratio.exp()  # about 1 in the first minibatch: the weights have not moved yet
    kl = ratio - 1 - logratio  # (M,) estimates KL(old || new): http://joschu.net/blog/kl-approx.html
    if args.norm_adv:  # [core 7] per minibatch, not per batch
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    if kl_coef is None:  # [core 8] clipped surrogate objective, eq. 7: no gain from a ratio beyond clip_coef
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()
    else:  # eq. 8; kl is unbiased, as is its gradient, since the mean of ratio is 1 whatever the weights
        pg_loss = (-advantages * ratio + kl_coef * kl).mean()
    v_error = (newvalue - returns) ** 2
    if args.clip_vloss:  # [core 9] the worse of V and of V moved by at most clip_coef
        clipped_value = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (clipped_value - returns) ** 2)
    v_loss, entropy_loss = 0.5 * v_error.mean(), entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss  # [core 10] eq. 9
    with torch.no_grad():  # [core 12]
        stats = {"pg_loss": pg_loss.detach(), "v_loss": v_loss.detach(), "entropy": entropy_loss.detach()}
        stats |= {"old_approx_kl": (-logratio).mean(), "approx_kl": kl.mean()}
        stats["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).to(ratio.dtype).mean()
    return loss, stats


def save_checkpoint(path, agent, optimizer, envs, args, iteration, kl_coef):
    """Write what resuming and evaluating need, as tensors and plain numbers only."""
    saved = {"script": Args.exp_name, "args": vars(args) | {"resume": ""}, "iteration": iteration}
    saved |= {"global_step": iteration * args.num_steps * args.num_envs, "python_rng": random.getstate()}
    saved |= {"shapes": agent.shapes, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    cuda = torch.cuda.is_initialized()  # to ask would start CUDA in a run on the CPU
    saved |= {"torch_rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all() if cuda else []}
    saved |= {"numpy_rng": [np.asarray(x).tolist() for x in np.random.get_state()], "kl_coef": kl_coef}
    torch.save(saved, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # a crash leaves the old file or the new one, never half of one


def load_checkpoint(path):
    """What save_checkpoint wrote to path (or checkpoint.pt in it); UsageError if it is not of this script."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        require(path.read_bytes()[:2] == b"PK", "not a zip archive")  # as a bare pickle is not
        saved = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
        require(saved["script"] == Args.exp_name, f"written by {saved['script']}.py")
        agent = Agent(*saved["shapes"], Args(**saved["args"]))
        agent.load_state_dict(saved["agent"])
    except Exception as error:  # torch.load does not say what a damaged file raises
        raise UsageError(f"--resume or --evaluate {path}: not of this script: {error!r:.90}") from error
    return saved | {"run_dir": path.parent, "trained": agent.eval().requires_grad_(False)}


def load_agent(checkpoint):
    """The Agent of a checkpoint.pt, on the CPU, ready to act. UsageError (a ValueError) if there is none."""
    return load_checkpoint(checkpoint)["trained"]


@torch.no_grad()
def evaluate(checkpoint, num_episodes=10, deterministic=False, seed=1_000_000, capture_video=False):
    """Raw returns of num_episodes whole episodes, (num_episodes,). Seeds torch. UsageError for bad input."""
    require(num_episodes > 0, f"--eval-episodes {num_episodes}: use 1 or more")
    saved, agent, returns = load_checkpoint(checkpoint), load_agent(checkpoint), []
    torch.manual_seed(seed)
    videos = saved["run_dir"] / "videos" / f"step-{saved['global_step']}-seed-{seed}"
    envs = make_envs(Args(**saved["args"]), 1, str(videos) if capture_video else None)
    obs, _ = envs.reset(seed=seed)
    for _ in tqdm(range(num_episodes), unit="episode"):
        infos = {}
        while "episode" not in infos:
            action, *_ = agent.get_action_and_value(agent.normalize(torch.tensor(obs)), None, deterministic)
            obs, _, _, _, infos = envs.step(action.numpy())
        returns.append(infos["episode"]["r"][0])
    envs.close()
    return np.array(returns)


def train(args, merged=False, received=()):
    """Train; returns a dict: episodic_return (mean of the last 100 raw ones), global_step, run_dir, agent.
    With args.resume, flags that differ from the defaults (merged: from the saved ones) win. A signal
    in received ends the run. UsageError: bad input, nothing written yet; FloatingPointError: nan or inf."""
    saved = load_checkpoint(args.resume) if args.resume else {}
    if saved:
        old = vars(Args(**saved["args"]))
        new = {k: v for k, v in vars(args).items() if v != (old if merged else vars(Args()))[k]}
        free = "total_timesteps save_every resume device num_threads compile track wandb_project_name"
        for k in {*new} - {*free.split(), "wandb_entity", "eval_episodes", "deterministic", "capture_video"}:
            require(new[k] == old[k], f"--{k.replace('_', '-')} {new[k]}: --resume goes on with {old[k]}")
        args = Args(**old | new | {"compile": args.compile})
    check_args(args)
    T, N, B = args.num_steps, args.num_envs, args.num_steps * args.num_envs
    num_iterations, global_step = args.total_timesteps // B, saved.get("global_step", 0)
    kl_coef = saved.get("kl_coef", args.kl_penalty_coef) if args.objective == "kl-penalty" else None
    require(global_step < num_iterations * B, f"--total-timesteps: use at least {global_step + B}")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}".replace("/", "-")
    run_dir = saved["run_dir"] if saved else Path(args.run_dir or f"runs/{name}")
    fresh = saved or not (run_dir / "checkpoint.pt").exists()
    require(fresh, f"--run-dir {run_dir} holds a checkpoint: name another one, or --resume {run_dir}")
    device = torch.device(args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
    _ = random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    envs = make_envs(args, N)
    if args.capture_video:  # what is missing for it shows now, not after the training
        make_envs(args, 1, str(run_dir / "videos")).close()
    if sys.platform == "linux" and device.type == "cpu":  # keep freed memory: saves a quarter of an update
        libc = ctypes.CDLL(None)
        _ = libc.mallopt(-1, -1), libc.mallopt(-4, 0)  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no mappings
    agent = Agent(envs.single_observation_space.shape, int(envs.single_action_space.n), args).to(device)
    params = [x for x in agent.parameters() if x.requires_grad]
    optimizer = torch.optim.Adam(params, lr=args.learning_rate, eps=1e-5, fused=True)  # [core 3]
    next_obs = torch.as_tensor(envs.reset(seed=args.seed + global_step)[0], device=device)  # never a replay
    action, *_ = agent.get_action_and_value(agent.normalize(next_obs))  # for its shape and dtype
    if saved:
        _ = agent.load_state_dict(saved["agent"]), optimizer.load_state_dict(saved["optimizer"])
        _ = random.setstate(saved["python_rng"]), np.random.set_state(saved["numpy_rng"])
        torch.set_rng_state(saved["torch_rng"])
        torch.cuda.set_rng_state_all(saved["cuda_rng"][: torch.cuda.device_count()])
    x = agent.normalize(next_obs, update=not saved)  # (N, *obs_shape), counted here; those after it, below
    obs, actions = (torch.zeros((T, *x.shape), dtype=x.dtype, device=device) for x in (x, action))
    logprobs, values = torch.zeros((2, T, N), device=device)
    rollout = np.zeros((2, T, N), np.float32)  # rewards and dones, moved to the device once per iteration

    def act(obs, count):  # raw ones, counted in the statistics or not -> what the buffer keeps of a step
        obs = agent.normalize(obs, update=count)
        action, logprob, _, value = agent.get_action_and_value(obs)
        return obs, action, logprob, value

    def gradient(mb_inds, kl_coef, *batch):  # of the loss of a minibatch (M,), clipped; and its stats
        mb_obs, mb_actions, *others = (x.index_select(0, mb_inds) for x in batch)  # faster than x[mb_inds]
        _, *new = agent.get_action_and_value(mb_obs, mb_actions)  # logprob, entropy, value
        loss, stats = ppo_loss(*new, *others, args, kl_coef)
        grads = torch.autograd.grad(loss, params, materialize_grads=True)  # 0 where one is unused
        stats["grad_norm"] = torch.cat([x.flatten() for x in grads]).norm()  # [core 11] before it is clipped
        scale = ((args.max_grad_norm or math.inf) / (stats["grad_norm"] + 1e-6)).clamp(max=1.0)
        return [x * scale for x in grads], stats

    if args.compile:  # equal to rounding: the same random numbers; one graph for loss, gradient, clipping
        torch.compiler.reset()  # train may run again in this process, with other args
        torch._dynamo.config.trace_autograd_ops = True  # for autograd.grad inside a graph
        how = dict(fullgraph=True, options={"fallback_random": True, "cpp_wrapper": device.type == "cpu"})
        act, gradient = torch.compile(act, **how), torch.compile(gradient, **how)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir}: {error.strerror}, name another one") from error
    if args.track:
        run = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name)
        import_module("wandb").init(**run, config=vars(args), sync_tensorboard=True)
    print(f"{run_dir}: {num_iterations} iterations of {B} steps = {num_iterations * B:,} on {device}")
    bar = tqdm(total=num_iterations * B, initial=global_step, unit="step", unit_scale=True)
    with bar, closing(envs), SummaryWriter(run_dir, purge_step=global_step + 1 if saved else None) as writer:
        writer.add_text("hyperparameters", "  \n".join(f"{k}: {v}" for k, v in vars(args).items()))
        start_step, start_time, score = global_step, time.time(), math.nan
        for iteration in range(global_step // B + 1, num_iterations + 1):
            # --- 1. learning rate: from learning_rate down to learning_rate / num_iterations [core 4] ---
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate

            # --- 2. rollout: T steps of N environments, across the ends of episodes ---
            rollout_time = time.time()
            with torch.no_grad(), torch.autocast(device.type, enabled=False):  # keeps bf16 casts to its end
                for step in range(T):
                    obs[step], actions[step], logprobs[step], values[step] = act(next_obs, count=step > 0)
                    next_obs, rollout[0, step], term, trunc, infos = envs.step(actions[step].cpu().numpy())
                    rollout[1, step] = term | trunc
                    if (cut := trunc & ~term).any():  # [ours 1] time ran out: add what V expects of the rest
                        ends = agent.normalize(torch.from_numpy(np.stack(infos["final_obs"][cut])).to(device))
                        rollout[0, step, cut] += args.gamma * agent.get_value(ends).cpu().numpy()
                    next_obs = torch.from_numpy(next_obs).to(device)
                next_value = agent.get_value(agent.normalize(next_obs, update=True))  # (N,)
            global_step += B

            # --- 3. advantages ---
            update_time = time.time()
            rewards, dones = torch.as_tensor(rollout, device=device)  # (T, N) each
            advantages, returns = compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)

            # --- 4. update: every epoch visits the batch in a new order, in equal minibatches [core 6] ---
            batch = [x.flatten(0, 1) for x in (obs, actions, logprobs, advantages, returns, values)]
            order = torch.cat([torch.randperm(B, device=device) for _ in range(args.update_epochs)])
            updates = []
            for mb_inds in order.view(-1, B // args.num_minibatches):  # (M,)
                grads, stats = gradient(mb_inds, kl_coef and torch.tensor(kl_coef), *batch)
                # [ours 3] before this step goes too far; never in the first minibatch, whose KL is about 0
                if args.target_kl is not None and updates and stats["approx_kl"] > args.target_kl:
                    break
                for x, grad in zip(params, grads, strict=True):  # fused Adam needs equal strides
                    x.grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
                optimizer.step()
                updates.append(stats)
            charts = {"learning_rate": optimizer.param_groups[0]["lr"], "updates": len(updates)}
            if kl_coef is not None:  # PPO paper, section 4: beta follows the KL(old || new) of a whole update
                with torch.no_grad():
                    _, *new = agent.get_action_and_value(*batch[:2])  # (B,) each
                kl, target = ppo_loss(*new, *batch[2:], args)[1]["approx_kl"].item(), args.kl_penalty_target
                charts |= {"kl_coef": kl_coef, "kl": kl}
                kl_coef *= 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
                kl_coef = min(max(kl_coef, 1e-6), 1e6)  # thousands of halvings would end at 0

            # --- 5. diagnostics, means over all minibatches [ours 4]: nothing below changes the algorithm ---
            means = {key: torch.stack([u[key] for u in updates]).mean().item() for key in updates[0]}
            now = time.time()
            if not all(map(math.isfinite, means.values())):  # [ours 5] before such weights are saved
                means |= {"observations": float(obs.sum() + next_obs.sum()), "rewards": float(rewards.sum())}
                raise FloatingPointError(f"{means}: check --env-id or lower --learning-rate; not saved")
            last = iteration == num_iterations or bool(received)  # asked once: a signal may come at any time
            if iteration % args.save_every == 0 or last:
                save_checkpoint(run_dir / "checkpoint.pt", agent, optimizer, envs, args, iteration, kl_coef)
            charts |= {"SPS_rollout": B / (update_time - rollout_time), "SPS_update": B / (now - update_time)}
            charts["SPS"] = (global_step - start_step) / (now - start_time)
            if envs.return_queue:  # raw, of the last up to 100 episodes
                charts["episodic_return"] = score = float(np.mean(envs.return_queue))
                charts["episodic_length"] = np.mean(envs.length_queue)
            losses = {"policy_loss": means.pop("pg_loss"), "value_loss": means.pop("v_loss"), **means}
            losses["explained_variance"] = 1 - (returns - values).var() / (returns.var() or math.nan)
            for group, metrics in ("charts", charts), ("losses", losses):
                for key, value in metrics.items():
                    writer.add_scalar(f"{group}/{key}", value, global_step)
            bar.set_postfix_str(f"return {score:.1f}", refresh=False)
            bar.update(B)
            if last:
                return dict(episodic_return=score, global_step=global_step, run_dir=run_dir, agent=agent)


def main():
    """Train and evaluate, or only --evaluate; end with the commands to type next."""
    args, script, received = tyro.cli(Args), f"python {sys.argv[0]}", []
    try:
        if args.resume:  # parse again with the saved flags as defaults: only what was typed overrides them
            args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
        check_args(args)
        torch.set_num_threads(args.num_threads or torch.get_num_threads())
        checkpoint = args.evaluate
        if not checkpoint:
            for stop in (signal.SIGINT, signal.SIGTERM):  # one ends the iteration, a second one the process
                signal.signal(stop, lambda s, _: (received.append(s), signal.signal(s, signal.SIG_DFL)))
            checkpoint = train(args, True, received)["run_dir"] / "checkpoint.pt"
            if received:
                print(f"stopped by signal {received[0]}, go on with: {script} --resume {checkpoint}")
                sys.exit(128 + received[0])
            for stop in (signal.SIGINT, signal.SIGTERM):
                signal.signal(stop, signal.SIG_DFL)
        if args.evaluate or args.eval_episodes:
            how = args.deterministic, 1_000_000 + args.seed, args.capture_video
            returns = evaluate(checkpoint, args.eval_episodes, *how)
            means = np.random.default_rng(0).choice(returns, (10_000, len(returns))).mean(1)  # bootstrap
            low, high = np.percentile(means, [2.5, 97.5])
            kind = f"{len(returns)} {'deterministic' if args.deterministic else 'sampled'} episodes"
            print(f"{returns.mean():.1f}: mean return of {kind}, 95 % interval {low:.1f} to {high:.1f}")
        print(f"evaluate it: {script} --evaluate {checkpoint} --eval-episodes 100 --capture-video")
        saved = load_checkpoint(checkpoint)
        print(f"train on:    {script} --resume {checkpoint} --total-timesteps {2 * saved['global_step']}")
        print(f"look at it:  tensorboard --logdir {saved['run_dir']} (and videos/ in there)")
    except (UsageError, FloatingPointError) as error:
        print(f"{'error' if isinstance(error, UsageError) else 'stopped'}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
