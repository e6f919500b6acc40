# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0",
#                 "tqdm==4.70.1", "moviepy==2.2.1", "pygame-ce==2.5.8", "mujoco==3.6.0"]
# ///
"""PPO for continuous (Box) actions and vector observations: the whole algorithm, top to bottom.

    python ppo_continuous.py                                 # CartPole-v1, 500k steps
    python ppo_continuous.py --env-id Acrobot-v1 --seed 2    # all flags: --help

Papers: PPO https://arxiv.org/abs/1707.06347, GAE https://arxiv.org/abs/1506.02438. Tags like [core 5] number the
details of https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/ (README: tag -> line -> why).
RESULT
Unlike CleanRL's ppo.py, whose hyperparameters these are: 1. a truncated episode bootstraps from its final
observation [ours 1]; 2. no row of the batch belongs to an automatic reset [ours 2]; 3. dones[t] means that action t
ended the episode, so GAE needs no special case for its last row; 4. --target-kl is tested before every optimiser
step [ours 3]; 5. logged losses are means over all minibatches [ours 4].
Shapes in comments: T num_steps, N num_envs, B = T * N batch, M = B / num_minibatches minibatch.
"""

import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.distributions import Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# fmt: off
@dataclasses.dataclass
class Args:
    """PPO for continuous (Box) actions and vector observations."""

    exp_name: str = "ppo_continuous"  # name of the experiment, part of the run directory's name
    seed: int = 1  # seed of torch, numpy, Python's random and the environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the CPU, networks this small gain nothing
    num_threads: int = 1  # CPU threads of torch, 0: torch's choice; networks this small gain nothing from more
    torch_deterministic: bool = True  # on CUDA: only deterministic cuDNN kernels
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "ppo"  # project for --track
    wandb_entity: str | None = None  # entity (team) for --track

    env_id: str = "HalfCheetah-v5"  # gymnasium id; package:Env-v0 imports package first and so reaches your own
    total_timesteps: int = 1_000_000  # steps over all environments, rounded down to whole iterations
    learning_rate: float = 3e-4  # Adam's step size, at the start where annealed
    num_envs: int = 1  # environments in all
    num_steps: int = 2048  # steps of each environment per iteration
    anneal_lr: bool = True  # lower the learning rate linearly, to one step above zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE; 1: rewards-to-go minus V, 0: one-step TD error
    num_minibatches: int = 32  # minibatches per epoch
    update_epochs: int = 10  # passes over the batch per iteration
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: float = 0.2  # epsilon of the clipped objective and of the value clipping
    clip_vloss: bool = True  # clip the value loss (as openai/baselines does, not in the paper)
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss, which has a factor 1/2 of its own
    max_grad_norm: float = 0.5  # limit of the norm of the whole gradient; 0: off
    target_kl: float | None = None  # end the update before a step at an approximate KL above this
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers, actor and critic alike
    activation: Literal["tanh", "relu", "elu", "gelu"] = "tanh"  # after each hidden layer
    max_episode_steps: int = 0  # truncate episodes after so many steps; 0: the environment's own limit
    vectorization: Literal["sync", "async"] = "sync"  # async: a process each, for steps above 1 ms
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation, clip to +-10
    norm_reward: bool = True  # divide rewards by the running std of the discounted return, clip to +-10

    run_dir: str = ""  # directory to write to; empty: a new runs/<env>__<exp>__<seed>__<time>
    save_every: int = 50  # iterations between checkpoints; the last iteration always writes one
    resume: str = ""  # checkpoint.pt, or its directory, to continue with the flags it was started with
    evaluate: str = ""  # checkpoint.pt, or its directory, to evaluate instead of training
    eval_episodes: int = 10  # episodes of --evaluate and of the evaluation after training; 0: none
    deterministic: bool = False  # evaluate the most probable action instead of sampled ones
    capture_video: bool = False  # write the first evaluated episode to <run_dir>/videos


# fmt: on
class UsageError(ValueError):
    """Bad input: one line that names the flag and the fix; main prints it and exits with code 2."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


def check_args(args):
    """UsageError for flags that cannot work, before anything is started or written."""
    counts = "num_envs num_steps num_minibatches update_epochs hidden_sizes save_every total_timesteps"
    for name, value in vars(args).items():
        low, high = float(name in counts.split()), 1.0 if name in ("gamma", "gae_lambda") else math.inf
        for x in value if isinstance(value, tuple) else [value]:
            good = not isinstance(x, int | float) or (low <= x <= high and math.isfinite(x))
            flag = f"--{name.replace('_', '-')}"
            require(good, f"{flag} {x}: use a finite number of at least {low:g} and at most {high:g}")
    B, parts, total = args.num_steps * args.num_envs, args.num_minibatches, args.total_timesteps
    batch = f"--num-steps {args.num_steps} x --num-envs {args.num_envs} = {B}"
    require(B % parts == 0, f"{batch} is not a multiple of --num-minibatches {parts}: change one of them")
    alone = B == parts and args.norm_adv
    require(not alone, f"{batch} in --num-minibatches {parts} makes minibatches of 1: add --no-norm-adv")
    require(total >= B, f"--total-timesteps {total} is less than one iteration, {batch}: raise it")
    for flag, package in {"track": "wandb", "capture_video": "moviepy"}.items():
        there = not getattr(args, flag) or importlib.util.find_spec(package)
        require(there, f"--{flag.replace('_', '-')} needs the package {package}: pip install {package}")
    there = args.device in ("auto", "cpu") or getattr(torch, args.device).is_available()
    require(there, f"--device {args.device} is not available to this build of torch: use --device cpu")


class RunningMeanStd(nn.Module):
    """Mean and variance over all rows given to update, in float64 (parallel formula of Chan et al. 1979)."""

    def __init__(self, shape):
        super().__init__()
        for name, x in ("mean", torch.zeros(shape)), ("var", torch.ones(shape)), ("count", torch.zeros(())):
            self.register_buffer(name, x.double())

    def update(self, x):
        var, mean = torch.var_mean(x.double(), dim=0, correction=0)
        total, delta = self.count + len(x), mean - self.mean
        weight = len(x) / total
        self.var.copy_((1 - weight) * self.var + weight * var + weight * (1 - weight) * delta**2)
        self.mean += weight * delta
        self.count.copy_(total)


class ClipActionScaleReward(gym.wrappers.vector.RecordEpisodeStatistics):
    """Clipped actions for the environment, scaled rewards for learning. Raw returns are recorded inside of it."""

    def __init__(self, envs, args):
        super().__init__(envs)
        self.args, self.return_rms = args, RunningMeanStd(())
        self.discounted = torch.zeros(self.num_envs, dtype=torch.float64)  # (N,) sum of gamma^k * r so far

    def step(self, actions):
        space = self.single_action_space
        actions = np.clip(actions, space.low, space.high)  # [cont 5] the buffer keeps the raw sample
        obs, rewards, terminated, truncated, infos = super().step(actions)
        if self.args.norm_reward:  # [cont 8] one statistic for all environments; no mean is subtracted
            self.discounted = self.discounted * self.args.gamma + torch.as_tensor(rewards)
            self.return_rms.update(self.discounted)
            self.discounted[torch.as_tensor(terminated | truncated)] = 0
            std = math.sqrt(self.return_rms.var.item() + 1e-8)
            rewards = np.clip(rewards / std, -10, 10)  # [cont 9]
        return obs, rewards, terminated, truncated, infos

    def state_dict(self):
        return {"discounted": self.discounted, "return_rms": self.return_rms.state_dict()}

    def load_state_dict(self, state):
        self.discounted = state[
            "discounted"
        ]  # what is carried into the new episode fades in 1 / (1 - gamma) steps
        self.return_rms.load_state_dict(state["return_rms"])


def make_envs(args, num_envs, render=False):
    """num_envs environments as one [core 1]; UsageError if args.env_id is unknown or not for this script."""

    def make_env():
        if multiprocessing.parent_process():  # in a process of async: Ctrl-C is for the main one
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mode, limit = "rgb_array" if render else None, args.max_episode_steps or None
        env = gym.make(args.env_id, render_mode=mode, max_episode_steps=limit)
        actions, shape, name = env.action_space, env.observation_space.shape or (), f"--env-id {args.env_id}"
        known = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1
        require(known, f"{name} acts in {actions}, not in a Box of vectors: try ppo_discrete.py for Discrete")
        require(len(shape) != 3, f"{name} observes pixels {shape}: try ppo_atari.py")
        # a matrix, a dict of boxes or a Discrete observation becomes one vector
        return env if len(shape) == 1 else gym.wrappers.FlattenObservation(env)

    use_async = args.vectorization == "async" and not render
    vector_env = gym.vector.AsyncVectorEnv if use_async else gym.vector.SyncVectorEnv
    # [ours 2] SAME_STEP resets an episode in the step that ends it. The default, NEXT_STEP, takes another step for
    # that, with reward 0 and an ignored action: a row of the batch that nobody should learn from
    mode = gym.vector.AutoresetMode.SAME_STEP
    try:
        envs = vector_env([make_env] * num_envs, copy=False, autoreset_mode=mode)
    except (gym.error.Error, ImportError) as error:  # gymnasium names close matches and missing packages
        raise UsageError(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from error
    assert envs.metadata["autoreset_mode"] == mode
    return ClipActionScaleReward(envs, args)


def layer_init(layer, std=2**0.5, bias_const=0.0):
    """Orthogonal weights with gain std, constant bias [core 2]."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(num_inputs, num_outputs, output_std, args):
    """Layers of --hidden-sizes with --activation, then a linear one: (N, num_inputs) -> (N, num_outputs)."""
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU}[args.activation]
    layers, sizes = [], [num_inputs, *args.hidden_sizes]
    for size, next_size in zip(sizes, args.hidden_sizes, strict=False):
        layers += [layer_init(nn.Linear(size, next_size)), activation()]
    return nn.Sequential(*layers, layer_init(nn.Linear(sizes[-1], num_outputs), output_std))


class Agent(nn.Module):
    """Gaussian policy and value function in separate networks [core 13] [cont 4]; observations are vectors."""

    def __init__(self, obs_shape, action_dim, args):
        super().__init__()
        self.shapes = obs_shape, action_dim
        self.critic = mlp(obs_shape[0], 1, 1.0, args)
        self.actor_mean = mlp(obs_shape[0], action_dim, 0.01, args)  # 0.01: the first means are almost 0
        self.actor_logstd = nn.Parameter(torch.zeros(action_dim))  # [cont 2] the same in every state
        self.obs_rms = RunningMeanStd(obs_shape) if args.norm_obs else None  # [ours 6] saved with the weights

    def normalize(self, obs, update=False):
        """Raw observations (N, *obs_shape) as the buffer keeps them and the networks take them."""
        if self.obs_rms is None:
            return obs.float()
        if update:  # in the rollout only: evaluation does not move the statistics
            self.obs_rms.update(obs)
        obs = (obs - self.obs_rms.mean) / torch.sqrt(self.obs_rms.var + 1e-8)  # [cont 6]
        return obs.clamp(-10, 10).float()  # [cont 7]

    def get_value(self, obs):
        """V of each observation, (N,)."""
        return self.critic(obs).squeeze(-1)

    def get_action_and_value(self, obs, action=None, deterministic=False):
        """Action (given, sampled or the mean), (N, A), its log-probability, the policy's entropy, V; (N,) each."""
        mean = self.actor_mean(obs)
        dist = Normal(mean, self.actor_logstd.exp().expand_as(mean), validate_args=False)  # [cont 1]
        if action is None:
            action = mean if deterministic else dist.sample()
        # [cont 3] components are independent: the log-probability and the entropy of the action are sums
        return action, dist.log_prob(action).sum(-1), dist.entropy().sum(-1), self.get_value(obs)


def compute_gae(rewards, values, dones, next_value, gamma, gae_lambda):
    """Generalised advantage estimation [core 5], PPO paper eq. 11 and 12: (advantages, returns), (T, N) each.

    rewards, values, dones: (T, N). dones[t] is 1 where action t ended the episode, by termination or truncation;
    where by truncation, rewards[t] already contains gamma * V(final observation). next_value: (N,), V of the
    observation after the last step. returns = advantages + values, the lambda-returns.
    """
    nonterminal = 1.0 - dones.to(values.dtype)  # 0 cuts off what follows in the row: it is another episode
    next_values = torch.cat([values[1:], next_value.unsqueeze(0)])  # (T, N)
    deltas = rewards + gamma * next_values * nonterminal - values  # eq. 12
    advantages, lastgaelam = torch.zeros_like(values), torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):  # eq. 11 as a recursion
        advantages[t] = lastgaelam = deltas[t] + gamma * gae_lambda * nonterminal[t] * lastgaelam
    return advantages, advantages + values


def ppo_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args):
    """Loss to minimise, PPO paper eq. 7 and 9, and a dict of detached scalars. All tensors: (M,).

    newlogprob, entropy, newvalue: under the current weights; logprobs, values: under those of the rollout.
    args: anything with clip_coef, clip_vloss, ent_coef, vf_coef, norm_adv. AssertionError where shapes differ.
    """
    tensors = (newlogprob, entropy, newvalue, logprobs, advantages, returns, values)
    assert len({x.shape for x in tensors}) == 1, "(M,) with (M, 1) would broadcast to (M, M)"
    logratio = newlogprob - logprobs
    ratio = logratio.exp()  # 1 in the first minibatch: the weights have not moved yet

    if args.norm_adv:  # [core 7] per minibatch, not per batch
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    # [core 8] clipped surrogate objective, eq. 7: no gain from moving the ratio further than clip_coef
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()

    v_error = (newvalue - returns) ** 2
    if args.clip_vloss:  # [core 9] the worse of V and of V moved by at most clip_coef
        clipped_value = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (clipped_value - returns) ** 2)
    v_loss = 0.5 * v_error.mean()

    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss  # [core 10] eq. 9

    with torch.no_grad():  # [core 12] two estimators of KL(old || new): http://joschu.net/blog/kl-approx.html
        stats = {"pg_loss": pg_loss.detach(), "v_loss": v_loss.detach(), "entropy": entropy_loss.detach()}
        stats["old_approx_kl"] = (-logratio).mean()
        stats["approx_kl"] = ((ratio - 1) - logratio).mean()
        stats["clipfrac"] = ((ratio - 1).abs() > args.clip_coef).to(ratio.dtype).mean()
    return loss, stats


def explained_variance(values, returns):
    """1 - Var(returns - values) / Var(returns): 1 perfect, 0 as good as a constant, nan for constant returns."""
    return (1 - (returns - values).var() / returns.var()).item() if returns.var() > 0 else math.nan


def save_checkpoint(path, agent, optimizer, envs, args, iteration):
    """Write what resuming and evaluating need, as tensors and plain numbers only."""
    generator, keys, *position = np.random.get_state()
    checkpoint = {
        "script": Args.exp_name,
        "args": dataclasses.asdict(args) | {"resume": ""},
        "shapes": agent.shapes,
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "envs": envs.state_dict(),
        "iteration": iteration,
        "global_step": iteration * args.num_steps * args.num_envs,
        "python_rng": random.getstate(),
        "numpy_rng": (generator, torch.from_numpy(keys.astype(np.int64)), *position),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),  # [] without CUDA
    }
    torch.save(checkpoint, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # a crash leaves the old file or the new one, never half of one


def load_checkpoint(path):
    """What save_checkpoint wrote to path (or checkpoint.pt in it); UsageError if this script did not write it."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    wanted = "--resume and --evaluate take a checkpoint.pt that this script wrote, or its directory"
    require(path.is_file(), f"{path} does not exist: {wanted}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # never runs code from the file
        script = checkpoint["script"]
    except Exception as error:  # torch.load does not say which exceptions a damaged file raises
        raise UsageError(f"{path} is damaged or foreign ({type(error).__name__}): {wanted}") from error
    require(script == Args.exp_name, f"{path} was written by {script}.py: {wanted}")
    return checkpoint | {"run_dir": path.parent}


def load_agent(checkpoint):
    """The Agent of a checkpoint.pt, on the CPU, ready to act. UsageError (a ValueError) if there is none."""
    saved = load_checkpoint(checkpoint)
    agent = Agent(*saved["shapes"], Args(**saved["args"]))
    agent.load_state_dict(saved["agent"])
    return agent.eval()


@torch.no_grad()
def evaluate(checkpoint, num_episodes=10, deterministic=False, seed=1_000_000, capture_video=False):
    """Raw returns of num_episodes whole episodes, (num_episodes,); UsageError for bad input. Seeds torch.

    Up to 10 environments play a fixed share each: the first num_episodes to end would favour short episodes.
    """
    require(num_episodes > 0, f"--eval-episodes {num_episodes}: use 1 or more")
    saved, agent, num_envs = load_checkpoint(checkpoint), load_agent(checkpoint), min(num_episodes, 10)
    shares = (num_episodes + np.arange(num_envs)) // num_envs  # (num_envs,), their sum is num_episodes
    returns = [[] for _ in shares]
    torch.manual_seed(seed)
    envs = make_envs(Args(**saved["args"]), num_envs, render=capture_video)
    obs, _ = envs.reset(seed=seed)
    if capture_video:
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

        path = saved["run_dir"] / "videos" / f"step-{saved['global_step']}-seed-{seed}.mp4"
        path.parent.mkdir(exist_ok=True)
        frame, fps = envs.unwrapped.envs[0].render(), envs.metadata.get("render_fps", 30)
        video = FFMPEG_VideoWriter(str(path), frame.shape[1::-1], fps)  # (width, height)
    with tqdm(total=num_episodes, desc="evaluation", unit="episode") as bar:
        while bar.n < num_episodes:
            if capture_video and not returns[0]:
                video.write_frame(envs.unwrapped.envs[0].render())
            obs = agent.normalize(torch.as_tensor(obs))
            action, *_ = agent.get_action_and_value(obs, deterministic=deterministic)
            obs, _, _, _, infos = envs.step(action.numpy())
            for i in np.flatnonzero(infos.get("_episode", [])):
                if len(returns[i]) < shares[i]:
                    returns[i].append(infos["episode"]["r"][i])
                    bar.update()
    envs.close()
    if capture_video:
        video.close()
    return np.concatenate(returns)


def resumed_args(args, saved, given):
    """The saved flags, but those named in given (None: all that are not at their default) from args."""
    free = "total_timesteps device num_threads track wandb_project_name wandb_entity save_every resume"
    free += " eval_episodes deterministic capture_video"
    if given is None:
        given = [f.name for f in dataclasses.fields(args) if getattr(args, f.name) != f.default]
    for name in given:
        same = name in free.split() or getattr(args, name) == saved[name]
        require(same, f"--{name.replace('_', '-')} was {saved[name]}: --resume cannot change it")
    return Args(**saved | {name: getattr(args, name) for name in given})


def train(args, given=None, received=()):
    """Train; return a dict of episodic_return (the mean of the last 100 raw returns), global_step, run_dir, agent.

    given: with args.resume, the names of flags that override the saved ones (None: those not at their default).
    received: the signals that main has caught; the run ends after the iteration in which one arrives.
    UsageError (a ValueError) for bad input, before anything is written; FloatingPointError for a loss of nan or inf.
    """
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint, first_iteration, run_dir = None, 1, Path(args.run_dir or f"runs/{name.replace('/', '-')}")
    if args.resume:
        checkpoint = load_checkpoint(args.resume)
        args, run_dir = resumed_args(args, checkpoint["args"], given), checkpoint["run_dir"]
        first_iteration = checkpoint["iteration"] + 1
    check_args(args)
    T, N = args.num_steps, args.num_envs
    batch_size, num_iterations = T * N, args.total_timesteps // (T * N)
    global_step = start_step = (first_iteration - 1) * batch_size
    todo = first_iteration <= num_iterations
    require(todo, f"--resume {args.resume} is done at step {global_step}: raise --total-timesteps")
    free = checkpoint or not (run_dir / "checkpoint.pt").exists()
    require(free, f"--run-dir {run_dir} holds a checkpoint: name another one, or --resume {run_dir}")
    device = torch.device("cpu" if args.device == "auto" else args.device)
    to_device = functools.partial(torch.as_tensor, device=device)

    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    envs = make_envs(args, N)
    agent = Agent(envs.single_observation_space.shape, envs.single_action_space.shape[0], args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [core 3]
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        envs.load_state_dict(checkpoint["envs"])
    # the seed moves with the step, so that a resumed run does not play the start of the first one again
    next_obs = to_device(envs.reset(seed=args.seed + global_step)[0])
    next_obs = agent.normalize(next_obs, update=not checkpoint)  # (N, *obs_shape)
    action, *_ = agent.get_action_and_value(next_obs)  # only for the shape and dtype of actions
    if checkpoint:  # the last to be restored: what stands above draws from the generators
        generator, keys, *position = checkpoint["numpy_rng"]
        np.random.set_state((generator, keys.numpy(), *position))
        random.setstate(checkpoint["python_rng"])
        torch.set_rng_state(checkpoint["torch_rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])

    obs, actions = (torch.zeros((T, *x.shape), dtype=x.dtype, device=device) for x in (next_obs, action))
    logprobs, values = torch.zeros((2, T, N), device=device)
    rewards, dones = np.zeros((2, T, N), np.float32)  # filled on the CPU, moved once per iteration

    run_dir.mkdir(parents=True, exist_ok=True)
    if args.track:
        import wandb

        where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": run_dir.name}
        wandb.init(**where, config=vars(args), sync_tensorboard=True)
    total_steps = num_iterations * batch_size
    print(f"{run_dir}: {num_iterations} iterations of {T} x {N} steps on {device}, {total_steps:,} in all")
    bar = tqdm(total=total_steps, initial=global_step, unit="step", unit_scale=True)
    with bar, SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None) as writer:
        flags = [f"|{name}|{value}|" for name, value in vars(args).items()]
        writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *flags]))
        start_time = time.time()
        for iteration in range(first_iteration, num_iterations + 1):
            # --- 1. learning rate: from learning_rate down to learning_rate / num_iterations [core 4] ---
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate

            # --- 2. rollout: T steps of N environments, across the ends of episodes ---
            rollout_time = time.time()
            with torch.no_grad():
                for step in range(T):
                    obs[step] = next_obs
                    action, logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
                    actions[step] = action
                    next_obs, rewards[step], terminated, truncated, infos = envs.step(action.cpu().numpy())
                    dones[step] = terminated | truncated
                    cut = truncated & ~terminated
                    if cut.any():  # [ours 1] time ran out, the task went on: add what V expects of the rest
                        final_obs = agent.normalize(to_device(np.stack(infos["final_obs"][cut])))
                        rewards[step, cut] += args.gamma * agent.get_value(final_obs).cpu().numpy()
                    next_obs = agent.normalize(to_device(next_obs), update=True)
                next_value = agent.get_value(next_obs)  # (N,)
            global_step += batch_size

            # --- 3. advantages ---
            rollout = to_device(rewards), values, to_device(dones), next_value
            advantages, returns = compute_gae(*rollout, args.gamma, args.gae_lambda)

            # --- 4. update: every epoch visits the batch in a new order, in equal minibatches [core 6] ---
            update_time = time.time()
            b_obs, b_actions = obs.view(batch_size, -1), actions.flatten(0, 1)  # (B, ...)
            b_others = [x.flatten() for x in (logprobs, advantages, returns, values)]  # (B,) each
            order = torch.cat([torch.randperm(batch_size, device=device) for _ in range(args.update_epochs)])
            updates = []
            for mb_inds in order.view(-1, batch_size // args.num_minibatches):  # (M,)
                # copies whole rows: for frames 40 times faster than b_obs[mb_inds]
                mb_obs = b_obs.index_select(0, mb_inds).view(-1, *agent.shapes[0])
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb_obs, b_actions[mb_inds])
                loss, stats = ppo_loss(newlogprob, entropy, newvalue, *(x[mb_inds] for x in b_others), args)
                # [ours 3] before this step goes too far; never in the first minibatch, whose KL is 0
                if args.target_kl is not None and updates and stats["approx_kl"] > args.target_kl:
                    break
                optimizer.zero_grad()
                loss.backward()
                limit = args.max_grad_norm or math.inf  # [core 11]
                stats["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), limit)
                optimizer.step()
                updates.append(stats)

            # --- 5. diagnostics: nothing below changes the algorithm ---
            means = {key: torch.stack([u[key] for u in updates]).mean().item() for key in stats}  # [ours 4]
            if not all(map(math.isfinite, means.values())):  # [ours 5] before such weights are saved
                suspects = {"observations": obs.sum(), "rewards": rewards.sum(), **means}
                bad = ", ".join(key for key, x in suspects.items() if not math.isfinite(x))
                fix = "look at --env-id if observations or rewards are named, else lower --learning-rate"
                raise FloatingPointError(f"{bad} not finite: {fix}; {run_dir} keeps its last good checkpoint")
            if iteration % args.save_every == 0 or iteration == num_iterations or received:
                save_checkpoint(run_dir / "checkpoint.pt", agent, optimizer, envs, args, iteration)
            now = time.time()
            metrics = {
                "charts/learning_rate": optimizer.param_groups[0]["lr"],
                "charts/SPS": (global_step - start_step) / (now - start_time),
                "charts/SPS_rollout": batch_size / (update_time - rollout_time),
                "charts/SPS_update": batch_size / (now - update_time),
                "charts/action_std": agent.actor_logstd.exp().mean().item(),
                "losses/policy_loss": means.pop("pg_loss"),
                "losses/value_loss": means.pop("v_loss"),
                **{f"losses/{key}": value for key, value in means.items()},
                "losses/explained_variance": explained_variance(values, returns),
                "losses/updates": len(updates),
            }
            if envs.return_queue:  # raw returns and lengths of the last up to 100 episodes
                metrics["charts/episodic_return"] = np.mean(envs.return_queue)
                metrics["charts/episodic_length"] = np.mean(envs.length_queue)
            for key, value in metrics.items():
                writer.add_scalar(key, value, global_step)
            episodic_return = float(metrics.get("charts/episodic_return", math.nan))
            bar.set_postfix_str(f"return {episodic_return:.1f}", refresh=False)
            bar.update(batch_size)
            if received:
                break
    envs.close()
    return dict(episodic_return=episodic_return, global_step=global_step, run_dir=run_dir, agent=agent)


def main():
    """Train and evaluate, or only --evaluate; end with the commands to type next."""
    args, given, received = tyro.cli(Args), None, []

    def on_signal(signum, frame):
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # the first ends the iteration, a second one the process

    try:
        if args.resume:  # parse again with the saved flags as defaults: only what was typed overrides them
            saved = load_checkpoint(args.resume)["args"]
            args = tyro.cli(Args, default=Args(**saved))
            given = [name for name in saved if getattr(args, name) != saved[name]]
        check_args(args)
        if args.num_threads:
            torch.set_num_threads(args.num_threads)
        script, checkpoint = f"python {sys.argv[0]}", args.evaluate
        if not args.evaluate:
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, on_signal)
            result = train(args, given, received)
            checkpoint = result["run_dir"] / "checkpoint.pt"
            print(f"{result['episodic_return']:.1f}: mean of the last 100 training returns, {checkpoint}")
            if received:
                print(f"stopped by {signal.Signals(received[0]).name}; go on: {script} --resume {checkpoint}")
                sys.exit(128 + received[0])
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if args.evaluate or args.eval_episodes:
            kind, seed = "deterministic" if args.deterministic else "sampled", 1_000_000 + args.seed
            returns = evaluate(checkpoint, args.eval_episodes, args.deterministic, seed, args.capture_video)
            means = np.random.default_rng(0).choice(returns, (10_000, len(returns))).mean(1)  # bootstrap
            low, high = np.percentile(means, [2.5, 97.5])
            print(
                f"{returns.mean():.1f}: mean of {len(returns)} {kind} episodes, 95 % {low:.1f} to {high:.1f}"
            )
        print(f"evaluate it: {script} --evaluate {checkpoint} --eval-episodes 100 --capture-video")
        print(f"train on:    {script} --resume {checkpoint} --total-timesteps {2 * args.total_timesteps}")
        print(f"look at it:  tensorboard --logdir {Path(checkpoint).parent}  (videos/ there holds the mp4)")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"stopped: {error}")  # exit code 1


if __name__ == "__main__":
    main()
