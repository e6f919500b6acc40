# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium==1.4.0", "tyro==1.0.17", "tensorboard==2.21.0",
#                 "tqdm==4.70.1", "moviepy==2.2.1", "ale-py==0.12.1"]
# ///
"""PPO for Atari 2600 games from pixels: the whole algorithm in one file.

    python ppo_atari.py --env-id BreakoutNoFrameskip-v4 --seed 1        (--help explains every flag)

Measured: Breakout 416, 388, Pong 20.1, 21.0, BeamRider 2620 after 10,000,000 steps with --precision bf16
(means of 100 evaluated games; seeds from 1 on; torch 2.13; 5.6 to 7.0 hours each on one core of an AMD EPYC).
PPO comes first, then environments, then what runs it. Tags like [core 5] number details of
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details. Beyond these:
  ours 1  a time limit does not end the task: the return goes on with V of the final observation;
  ours 2  environments reset within the step that ends an episode; by default, gymnasium 1 adds dummy steps;
  ours 3  --target-kl is checked before each optimiser step, not after each epoch;
  ours 4  logged losses are means over all minibatches of an iteration;
  ours 5  a run whose numbers become nan or infinite stops before it saves them.
Shapes: T num_steps, N num_envs, B = T * N the batch, M a minibatch. dones[t], (N,), is 1 where action t ended
the episode; CleanRL keeps that in dones[t + 1].
"""

import ctypes
import dataclasses
import math
import os
import random
import shlex
import signal
import sys
import time
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from importlib import util
from pathlib import Path
from typing import Literal, get_args, get_origin

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # --- PPO ---
    total_timesteps: int = 10_000_000  # steps of 4 frames, of all games together
    learning_rate: float = 2.5e-4  # Adam's step size
    anneal_lr: bool = True  # lower the learning rate linearly, almost to 0
    num_envs: int = 8  # environments that step together
    num_steps: int = 128  # steps of each environment per iteration
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 4  # passes over the batch per iteration
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE; 1: rewards-to-go minus V, 0: TD error
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: float = 0.1  # epsilon: no gain from a ratio beyond 1 +- this; --clip-vloss uses it too
    clip_vloss: bool = True  # clip the value loss too; not in the paper
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss, which has its own 1/2
    max_grad_norm: float = 0.5  # limit of the gradient's norm; 0: off
    target_kl: float = 0.0  # end an update beyond this approximate KL; 0: off
    objective: Literal["clip", "kl-penalty"] = "clip"  # what keeps the policy near the old one
    kl_penalty_coef: float = 1.0  # kl-penalty: coefficient at first; it adapts
    kl_penalty_target: float = 0.01  # kl-penalty: the KL(old || new) to steer to

    # --- network ---
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: faster with AVX512-BF16 and on GPUs

    # --- environment ---
    env_id: str = "BreakoutNoFrameskip-v4"  # or ALE/<Game>-v5: sticky actions
    max_episode_steps: int = 0  # time limit of a game; 0: 27,000 (108,000 frames)

    # --- this run ---
    exp_name: str = Path(__file__).stem  # part of the run directory's name
    seed: int = 1  # of torch, numpy, random and the environments
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else cpu
    num_threads: int = 0  # of torch and of the emulators; 0: their choice
    torch_deterministic: bool = True  # on CUDA: deterministic cuDNN kernels
    cuda_graphs: bool = False  # on CUDA: record policy step and gradient, then replay
    run_dir: str = ""  # empty: runs/<env>__<exp>__<seed>__<time>
    save_every: int = 50  # iterations between checkpoints
    resume: str = ""  # run directory to continue; flags you type replace saved ones
    evaluate: str = ""  # run directory to evaluate; --env-id and --max-episode-steps replace saved ones
    eval_episodes: int = 10  # episodes of --evaluate and after training; 0: none after training
    deterministic: bool = False  # evaluate most probable actions, not samples
    capture_video: bool = False  # film the first evaluated episode: videos/ in the run directory
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "ppo"  # project for --track
    wandb_entity: str = ""  # entity (team) for --track; empty: your default one


def layer_init(layer, std=2**0.5, bias_const=0.0):
    """Orthogonal weights with gain std, constant biases [core 2]."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """The Nature CNN, whose features a Categorical policy and V share [atari 8]."""

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        num_actions = int(action_space.n)
        self.bf16 = args.precision == "bf16"
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            layer_init(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            layer_init(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = layer_init(nn.Linear(512, num_actions), std=0.01)  # 0.01: almost uniform at first
        self.critic = layer_init(nn.Linear(512, 1), std=1.0)
        self.shapes = observation_space.shape, num_actions  # for checkpoints

    def normalize(self, raw_obs, update=False):
        """The frames themselves: buffers keep them as uint8, a quarter of float32; features() scales them."""
        return raw_obs

    def features(self, obs):
        """(N, 4, 84, 84) uint8 -> (N, 512) float32. Heads and loss stay in float32 whatever the precision."""
        x = obs.contiguous(memory_format=torch.channels_last)  # convolutions are faster on it
        x = x.to(torch.bfloat16 if self.bf16 else torch.float32).div_(255)  # [atari 9]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x).float()

    def get_value(self, obs):
        """V, (N,), of frames (N, 4, 84, 84)."""
        return self.critic(self.features(obs)).squeeze(-1)

    def get_action_and_value(self, obs, action=None, deterministic=False):
        """Action (given, sampled or most probable); (N,) each: its log-probability, the policy's entropy, V.
        obs: (N, 4, 84, 84) uint8."""
        features = self.features(obs)
        logprobs = self.actor(features).log_softmax(-1)  # (N, actions)
        if action is None and deterministic:
            action = logprobs.argmax(-1)
        elif action is None:  # a sample: argmax of logprobs + Gumbel noise, which is -log(exponential)
            exponential = torch.empty_like(logprobs).exponential_()
            action = (logprobs - exponential.log()).argmax(-1)
        logprob = logprobs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return action, logprob, entropy, self.critic(features).squeeze(-1)

    def act(self, raw_obs):
        """One step of the rollout: returns obs, actions, logprobs, values."""
        obs = self.normalize(raw_obs, update=True)
        action, logprob, _, value = self.get_action_and_value(obs)
        return obs, action, logprob, value


def compute_gae(rewards, values, dones, next_value, gamma, gae_lambda):
    """Generalised advantage estimation [core 5], https://arxiv.org/abs/1506.02438; PPO paper, eq. 11, 12.
    Returns (advantages, returns), (T, N) each.

    rewards, values, dones: (T, N). dones[t] is 1 where action t ended the episode. If it was truncated,
    rewards[t] already contains gamma * V(final observation). next_value: (N,), V after the last step.
    """
    nonterminal = 1.0 - dones.to(values.dtype)  # 0: the next row is of another episode
    next_values = torch.cat([values[1:], next_value.unsqueeze(0)])  # (T, N)
    deltas = rewards + gamma * next_values * nonterminal - values  # eq. 12
    decays = gamma * gae_lambda * nonterminal
    advantages = torch.empty_like(deltas)
    advantage = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):  # eq. 11 as a recursion
        advantage = deltas[t] + decays[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def ppo_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args, kl_coef=None):
    """(loss, stats): what to minimise, minus eq. 9 of https://arxiv.org/abs/1707.06347, and a dict of
    detached scalars. All tensors: (M,).

    newlogprob, entropy, newvalue: of the current weights; logprobs, values: of the weights that made the
    rollout. args: anything with clip_coef, clip_vloss, ent_coef, vf_coef, norm_adv. kl_coef: beta of the KL
    penalty; None: the clipped objective.
    """
    shapes = {x.shape for x in (newlogprob, entropy, newvalue, logprobs, advantages, returns, values)}
    assert len(shapes) == 1, f"shapes {shapes} would broadcast"
    logratio = newlogprob - logprobs
    ratio = logratio.exp()  # 1 before the first step of each iteration, up to rounding
    kl = ratio - 1 - logratio  # KL(old || new), http://joschu.net/blog/kl-approx.html
    if args.norm_adv:  # [core 7] per minibatch, not per batch
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    if kl_coef is None:  # [core 8] eq. 7: no gain from a ratio beyond 1 +- clip_coef
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = -torch.min(advantages * ratio, advantages * clipped_ratio).mean()
    else:  # eq. 8
        pg_loss = (-advantages * ratio + kl_coef * kl).mean()

    v_error = (newvalue - returns) ** 2
    if args.clip_vloss:  # [core 9] the larger of this error and that of V moved by at most clip_coef
        change = (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_error = torch.max(v_error, (values + change - returns) ** 2)
    v_loss = 0.5 * v_error.mean()
    mean_entropy = entropy.mean()
    loss = pg_loss - args.ent_coef * mean_entropy + args.vf_coef * v_loss  # [core 10] minus eq. 9

    stats = {  # [core 12]
        "pg_loss": pg_loss.detach(),
        "v_loss": v_loss.detach(),
        "entropy": mean_entropy.detach(),
        "old_approx_kl": (-logratio).mean().detach(),  # noisier, may be < 0
        "approx_kl": kl.mean().detach(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).to(ratio.dtype).mean(),
    }
    return loss, stats


@torch.no_grad()
def adapt_kl_coef(kl_coef, agent, batch, target):
    """Double, halve or keep kl_coef for the next update (PPO paper, section 4). Returns KL(old || new)."""
    _, newlogprob, *_ = agent.get_action_and_value(batch["obs"], batch["actions"])
    logratio = newlogprob - batch["logprobs"]
    kl = (logratio.exp() - 1 - logratio).mean().item()  # on the whole batch
    if kl > 1.5 * target:
        kl_coef.mul_(2)
    elif kl < target / 1.5:
        kl_coef.div_(2)
    kl_coef.clamp_(1e-6, 1e6)  # 150 halvings in a row would make it 0 for good
    return kl


def compute_gradients(agent, batch, mb_inds, args, kl_coef=None):
    """Put the clipped gradient of the loss into .grad; return the stats. mb_inds, (M,): rows of the batch."""
    mb = {name: x.index_select(0, mb_inds) for name, x in batch.items()}  # (M, ...), faster than x[mb_inds]
    _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb["obs"], mb["actions"])
    rest = mb["logprobs"], mb["advantages"], mb["returns"], mb["values"]
    loss, stats = ppo_loss(newlogprob, entropy, newvalue, *rest, args, kl_coef)
    loss.backward()
    if WORLD_SIZE > 1:  # torchrun: the mean of all processes
        for x in [*stats.values(), *(x.grad for x in agent.parameters() if x.requires_grad)]:
            distributed.all_reduce(x, op=distributed.ReduceOp.AVG)
    # [core 11] one norm over policy and V; inf only measures it; torch.compile needs foreach=False
    norm = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm or math.inf, foreach=False)
    return stats | {"grad_norm": norm}


def train(args, stop_requested=lambda: False, compute_gradients=compute_gradients):
    """Train an agent. Returns a dict: episodic_return (mean of the last 100 raw returns, nan if no episode
    ended), global_step, run_dir, agent. stop_requested(): asked once per iteration; True saves and ends the
    run. compute_gradients: yours, in place of the one above. UsageError for bad input, before training
    starts; FloatingPointError for nan. To resume: dataclasses.replace(load_checkpoint(x)["args"], resume=x).
    """
    args, checkpoint = prepare(args)  # seeds; checkpoint: of --resume, or None
    T, N = args.num_steps, args.num_envs // WORLD_SIZE  # N, M: of this process
    B = T * args.num_envs
    M = T * N // args.num_minibatches
    num_iterations = args.total_timesteps // B
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(best if args.device == "auto" else args.device)
    if WORLD_SIZE > 1 and device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    as_tensor = partial(torch.as_tensor, device=device)
    envs = make_envs(args, N)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)  # [core 3]
    kl_coef = None
    if args.objective == "kl-penalty":  # a tensor: a compiled or recorded step would freeze a number
        kl_coef = torch.tensor(args.kl_penalty_coef, device=device)
    global_step = checkpoint["global_step"] if checkpoint else 0
    next_obs, _ = envs.reset(seed=(args.seed + global_step + RANK * N) % 10**9)  # others after --resume
    if checkpoint:
        restore(checkpoint, agent, optimizer, envs)
    if WORLD_SIZE > 1:
        join_processes(agent, args.seed + global_step + RANK * N, device)

    obs = torch.zeros((T, N, *envs.single_observation_space.shape), dtype=torch.uint8, device=device)
    actions = torch.zeros((T, N, *envs.single_action_space.shape), dtype=torch.int64, device=device)
    logprobs = torch.zeros((T, N), device=device)
    values = torch.zeros((T, N), device=device)
    rewards = np.zeros((T, N), np.float32)  # numpy, as from environments
    dones = np.zeros((T, N), np.float32)
    act = agent.act
    if args.cuda_graphs and device.type == "cuda":
        act, compute_gradients = captured(act, agent), captured(compute_gradients, agent)

    start_step, start_time = global_step, time.time()
    log = open_log(args, global_step, device) if RANK == 0 else nullcontext((None, None))
    with closing(envs), log as (writer, bar):
        for iteration in range(global_step // B + 1, num_iterations + 1):
            # --- 1. learning rate: down to learning_rate / num_iterations [core 4] ---
            fraction_left = 1 - (iteration - 1) / num_iterations if args.anneal_lr else 1
            lr = fraction_left * args.learning_rate
            optimizer.param_groups[0]["lr"] = lr

            # --- 2. rollout: T steps of N environments, across the ends of episodes ---
            # casts nothing itself, but keeps the weights that features() cast to bf16, for all T steps
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                for t in range(T):
                    obs[t], actions[t], logprobs[t], values[t] = act(as_tensor(next_obs))
                    next_obs, rewards[t], terminated, truncated, infos = envs.step(actions[t].cpu().numpy())
                    dones[t] = terminated | truncated
                    time_limit = truncated & ~terminated  # (N,)
                    if time_limit.any():  # [ours 1] add the value of what was cut off
                        final_obs = agent.normalize(as_tensor(np.stack(infos["final_obs"][time_limit])))
                        rewards[t, time_limit] += args.gamma * agent.get_value(final_obs).cpu().numpy()
                # (N,); where step T ended an episode, compute_gae ignores it
                next_value = agent.get_value(agent.normalize(as_tensor(next_obs)))
            global_step += B

            # --- 3. advantages; rewards contain values by now, so do not log them ---
            rollout = as_tensor(rewards), values, as_tensor(dones), next_value
            advantages, returns = compute_gae(*rollout, args.gamma, args.gae_lambda)

            # --- 4. update: epochs visit the batch in a new order, in minibatches [core 6] ---
            batch = {"obs": obs, "actions": actions, "logprobs": logprobs, "values": values}
            batch |= {"advantages": advantages, "returns": returns}
            batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # (B, ...)
            step_stats = []  # of each optimiser step
            for _ in range(args.update_epochs):
                for mb_inds in torch.randperm(T * N, device=device).split(M):  # (M,)
                    optimizer.zero_grad()
                    stats = compute_gradients(agent, batch, mb_inds, args, kl_coef)
                    kl_exceeded = len(step_stats) > 0 and 0 < args.target_kl < stats["approx_kl"]
                    if kl_exceeded:  # [ours 3] drop this gradient; the first one of an update is always used
                        break
                    optimizer.step()
                    step_stats.append(stats)
                if kl_exceeded:
                    break

            charts = {"learning_rate": lr, "updates": len(step_stats)}
            if args.objective == "kl-penalty":
                charts["kl_coef"] = kl_coef.item()
                charts["kl"] = adapt_kl_coef(kl_coef, agent, batch, args.kl_penalty_target)
                args.kl_penalty_coef = kl_coef.item()  # saved: --resume goes on from it

            # --- 5. logs, checkpoint: no part of the algorithm; losses are means [ours 4] ---
            losses = {k: torch.stack([step[k] for step in step_stats]).mean().item() for k in step_stats[0]}
            check_finite(losses, agent, global_step)  # [ours 5] before it is saved
            if returns.var() > 0:  # V before the update; 1: right up to a constant, 0: no better than one
                losses["explained_variance"] = 1 - (returns - values).var() / returns.var()
            charts["SPS"] = (global_step - start_step) / (time.time() - start_time)
            if len(envs.return_queue) > 0:  # the last 100 episodes
                charts["episodic_return"] = float(np.mean(envs.return_queue))
                charts["episodic_length"] = float(np.mean(envs.length_queue))
            stop = stop_requested()
            if WORLD_SIZE > 1:
                stop = agree(stop, kl_coef, device)
            last_iteration = global_step + B > args.total_timesteps or stop
            if RANK == 0 and (iteration % args.save_every == 0 or last_iteration):
                save_checkpoint(args, global_step, agent, optimizer, envs)
            if RANK == 0:
                write_log(writer, bar, charts, losses, global_step)
            if last_iteration:
                break
    result = {"episodic_return": charts.get("episodic_return", math.nan), "agent": agent}
    return result | {"global_step": global_step, "run_dir": Path(args.run_dir)}


# ---------------------------------------- the environments ----------------------------------------


class LearningEnvs(gym.wrappers.vector.RecordEpisodeStatistics):
    """Records raw returns of whole games; hands the agent signs of rewards, and a lost life as terminated."""

    def __init__(self, envs, sticky=0.0):
        assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
        super().__init__(envs)
        buttons = envs.unwrapped.ale.get_action_set()
        self.fire = buttons.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in buttons else None
        self.presses = 2 if sticky > 0 else 1  # a sticky action may take the place of FIRE, hardly twice
        self.presses_at_start = 2 if sticky > 0 else 0  # else the emulator's own is enough

    def reset(self, **kwargs):
        obs, infos = super().reset(**kwargs)
        self.lives = infos["lives"]
        self.press_fire = np.full(self.num_envs, self.presses_at_start)  # (N,) FIRE for so many more steps
        return obs, infos

    def step(self, actions):
        if self.fire is not None:  # [atari 4] the game gets FIRE, while the buffer keeps the agent's action
            actions = np.where(self.press_fire > 0, self.fire, actions)
        obs, rewards, terminated, truncated, infos = super().step(actions)
        fewer = (infos["lives"] < self.lives) & (infos["lives"] > 0)
        game_over = terminated | truncated  # infos["lives"] are those of the next game then
        life_lost = fewer & ~game_over
        self.press_fire -= 1
        self.press_fire[life_lost] = self.presses
        self.press_fire[game_over] = self.presses_at_start
        self.lives = infos["lives"]
        return obs, np.sign(rewards), terminated | life_lost, truncated, infos  # [atari 3] [atari 6]


class RecordColour(gym.vector.VectorWrapper):
    """Films the first game: since the agent's frames are small and grey, a second emulator plays along."""

    def __init__(self, envs, colour_envs, folder):
        super().__init__(envs)
        self.colour_envs, self.folder = colour_envs, folder
        self.frames, self.filming = [], True

    def reset(self, **kwargs):
        self.colour_envs.reset(**kwargs)
        return super().reset(**kwargs)

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = super().step(actions)
        if self.filming:
            frame = self.colour_envs.step(actions[:1])[0][0, -1]  # (210, 160, 3)
            self.filming = not (terminated[0] or truncated[0])  # then the frame is of the next game
            if self.filming:
                self.frames.append(frame)
            elif self.frames:
                from gymnasium.utils.save_video import save_video  # wants moviepy, which only films need

                save_video(self.frames, self.folder, fps=15)  # 60 / frameskip
        return obs, rewards, terminated, truncated, infos


def make_envs(args, num_envs, video_folder=None):
    """num_envs games as one [core 1], the first of them filmed if there is a video_folder. UsageError for a
    game that is not there."""
    hint = "use <Game>NoFrameskip-v4, or ALE/<Game>-v5 with sticky actions"
    try:
        game = gym.spec(args.env_id).kwargs
    except gym.error.Error as error:
        raise UsageError(f"--env-id {args.env_id}: {' '.join(str(error).split())}; {hint}") from error
    known = "game" in game and args.env_id.endswith(("NoFrameskip-v4", "-v5"))
    require(known, f"--env-id {args.env_id}: not Atari from pixels, {hint} (or try ppo_discrete.py)")
    rom, sticky = game["game"], game["repeat_action_probability"]
    options = {
        # [ours 2] NEXT_STEP, the default, spends a step of reward 0 on a reset: nothing to learn from
        "autoreset_mode": gym.vector.AutoresetMode.SAME_STEP,
        "num_threads": args.num_threads,
        "noop_max": 30,  # [atari 1]
        "frameskip": 4,  # [atari 2]
        "maxpool": True,  # the maximum of the last two frames
        "use_fire_reset": True,
        "repeat_action_probability": sticky,
        "max_num_frames_per_episode": 4 * min(args.max_episode_steps or 27_000, 27_000),  # 4: frameskip
        "episodic_life": False,  # True would reset the game at a lost life
        "life_loss_info": False,  # True would hide where games end
        "reward_clipping": False,  # True would hide the raw rewards
    }
    small = {"img_height": 84, "img_width": 84, "grayscale": True, "stack_num": 4}  # [atari 5] [atari 7]
    envs = ale_py.AtariVectorEnv(rom, num_envs, **options, **small)
    if video_folder:
        require(util.find_spec("moviepy"), "--capture-video: pip install moviepy")
        large = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
        envs = RecordColour(envs, ale_py.AtariVectorEnv(rom, 1, **options, **large), video_folder)
    return LearningEnvs(envs, sticky)


# ------------------- what runs it: nothing below changes the algorithm -------------------

# set by torchrun, which starts a process per GPU; without it there is one
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0


class UsageError(ValueError):
    """Bad input, in one line that names the flag and the fix; main exits with code 2."""


def require(condition, message):
    if not condition:
        raise UsageError(message)


RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "seed": (0, 10**9), "kl_penalty_target": (1e-6, math.inf)}
RANGES |= dict.fromkeys(["num_envs", "num_steps", "num_minibatches", "update_epochs"], (1, math.inf))
RANGES |= {"save_every": (1, math.inf)}  # others: 0 or more


def prepare(args):
    """Check and seed. Returns the arguments, run_dir filled in, and the checkpoint of --resume or None."""
    args = dataclasses.replace(args)
    for field in dataclasses.fields(args):
        flag = f"--{field.name.replace('_', '-')}"
        value = np.array(getattr(args, field.name)).tolist()  # numpy's numbers cannot be saved
        setattr(args, field.name, type(field.default)(value))
        if get_origin(field.type) is Literal:
            require(value in get_args(field.type), f"{flag} {value}: use one of {get_args(field.type)}")
        elif not isinstance(field.default, str):
            low, high = RANGES.get(field.name, (0, math.inf))
            fits = all(low <= x <= high and x < math.inf for x in np.ravel(value))
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            require(fits, f"{flag} {value}: use {wanted}")
    shared = args.num_envs % WORLD_SIZE == 0
    require(shared, f"--num-envs {args.num_envs}: use a multiple of {WORLD_SIZE}, the processes of torchrun")
    B, parts = args.num_steps * args.num_envs // WORLD_SIZE, args.num_minibatches  # of one process
    equal = B % parts == 0 and (B > parts or not args.norm_adv)  # one advantage has no std
    share = f"{args.num_envs}" if WORLD_SIZE == 1 else f"{args.num_envs} / {WORLD_SIZE} processes"
    sizes = f"--num-steps {args.num_steps} x --num-envs {share} = {B} in --num-minibatches {parts}"
    require(equal, f"{sizes} must give equal parts of 2 or more (of 1 with --no-norm-adv): change one")
    found = args.device in ("auto", "cpu") or getattr(torch, args.device).is_available()
    require(found, f"--device {args.device}: torch finds none, use cpu")
    require(not args.track or util.find_spec("wandb"), "--track: pip install wandb")

    checkpoint = load_checkpoint(args.resume) if args.resume else None
    done = checkpoint["global_step"] if checkpoint else 0
    total, least = args.total_timesteps, B * WORLD_SIZE + done
    require(total >= least, f"--total-timesteps {total}: use at least {least}, of which {done} are done")
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}".replace("/", "-")
    args.run_dir = args.run_dir or f"runs/{name.replace(':', '-')}"
    newest = Path(args.run_dir, "checkpoint.pt")
    free = not newest.exists() or (checkpoint and newest.samefile(checkpoint["path"]))
    require(free, f"--run-dir {args.run_dir} holds a checkpoint: name another, or --resume {args.run_dir}")
    if args.capture_video:  # what is missing for it shows now, not after the training
        make_envs(args, 1, f"{args.run_dir}/videos").close()
    random.seed(args.seed + done)  # environments may draw from these two: others after --resume
    np.random.seed(args.seed + done)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = args.torch_deterministic
    return args, checkpoint


def keep_freed_memory():
    """Let glibc keep freed memory: asking the system for it again in each minibatch slows updates down."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give memory back
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks


def captured(function, agent):
    """The function as a CUDA graph, which launches all its kernels at once. The first call records it; later
    calls copy their tensors into those of the first one, and overwrite what the call before returned."""
    graph, inputs, outputs, gradients = torch.cuda.CUDAGraph(), [], [], []

    def record(args):
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up in their first calls
            for _ in range(3):
                function(*args)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.set_rng_state(random_state)  # as if nothing had been drawn
        agent.zero_grad()  # so that backward() makes new ones, in the memory of the graph
        with torch.cuda.graph(graph):
            outputs.append(function(*args))
        gradients.extend(x.grad for x in agent.parameters())

    def replay(*args):
        nested = [x.values() if isinstance(x, dict) else [x] for x in args]
        tensors = [x for values in nested for x in values if torch.is_tensor(x)]
        if not inputs:
            # autocast would cache weights in bf16, and the graph would use these for ever
            with torch.autocast("cuda", enabled=False, cache_enabled=False):
                record(args)
            inputs.extend(tensors)
        for old, new in zip(inputs, tensors, strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
        graph.replay()
        for x, gradient in zip(agent.parameters(), gradients, strict=True):
            x.grad = gradient  # zero_grad() took it away
        stats = outputs[0]
        return {name: x.clone() for name, x in stats.items()} if isinstance(stats, dict) else stats

    return replay


def join_processes(agent, seed, device):
    """Connect with the other processes of torchrun: the same weights in all, other random numbers in each."""
    if not distributed.is_initialized():  # train may run again in this process
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for x in agent.parameters():
        distributed.broadcast(x.data, src=0)
    torch.manual_seed(seed)


def agree(stop, kl_coef, device):
    """True if one process has to stop; gives all of them the kl_coef of the first."""
    if kl_coef is not None:
        distributed.broadcast(kl_coef, src=0)
    stops = torch.tensor(float(stop), device=device)
    distributed.all_reduce(stops, op=distributed.ReduceOp.MAX)
    return bool(stops > 0)


def save_checkpoint(args, global_step, agent, optimizer, envs):
    """Write run_dir/checkpoint.pt: what resuming and evaluating need, as tensors and plain values only."""
    checkpoint = {
        "args": {x.name: getattr(args, x.name) for x in dataclasses.fields(Args)} | {"resume": ""},
        "global_step": global_step,
        "shapes": agent.shapes,
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    path = Path(args.run_dir, "checkpoint.pt")
    torch.save(checkpoint, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # a crash leaves the old file or the new one, never half of one


def restore(checkpoint, agent, optimizer, envs):
    """Set everything as save_checkpoint found it, except that the environments have begun new episodes."""
    try:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UsageError("--resume: another network or environment, drop flags that change these") from error
    torch.set_rng_state(checkpoint["torch_rng"])
    torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][: torch.cuda.device_count()])


def load_checkpoint(path):
    """What save_checkpoint wrote to path or path/checkpoint.pt; "args" as Args, the Agent as "trained".
    A file of another name than checkpoint.pt, a copy, begins a new run directory: its args have none."""
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    path = path.resolve() if path.is_symlink() else path  # the run goes on where the file is
    require(path.is_file(), f"{path}: no such file, name a run directory or its checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        run_dir = str(path.parent) if path.name == "checkpoint.pt" else ""
        args = Args(**checkpoint["args"] | {"run_dir": run_dir})
        obs_shape, num_actions = checkpoint["shapes"]
        observation_space = gym.spaces.Box(0, 255, obs_shape, np.uint8)
        agent = Agent(observation_space, gym.spaces.Discrete(num_actions), args)
        agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # torch.load does not say what a damaged file raises
        raise UsageError(f"{path}: damaged, or not of this script ({error!r:.200})") from error
    return checkpoint | {"path": path, "args": args, "trained": agent.eval().requires_grad_(False)}


def load_agent(checkpoint):
    """The Agent of a checkpoint.pt, on the CPU, ready to act. UsageError (a ValueError) if there is none."""
    return load_checkpoint(checkpoint)["trained"]


@torch.no_grad()
@torch.random.fork_rng(devices=[])  # a training that evaluates keeps its random numbers
def evaluate(checkpoint, num_episodes=10, deterministic=False, seed=2**30, capture_video=False, **changes):
    """Raw returns of whole episodes on the CPU, (num_episodes,). seed: by default beyond those of training.
    changes: of saved arguments. UsageError for bad input, endless episodes."""
    require(num_episodes > 0, f"--eval-episodes {num_episodes}: use 1 or more")
    states = random.getstate(), np.random.get_state()
    saved = load_checkpoint(checkpoint)
    args, agent = dataclasses.replace(saved["args"], **changes), saved["trained"]
    require(args.max_episode_steps >= 0, f"--max-episode-steps {args.max_episode_steps}: use 0 or more")
    folder = saved["path"].parent / "videos" / f"step-{saved['global_step']}-seed-{seed}"
    returns = []
    with closing(make_envs(args, 1, str(folder) if capture_video else None)) as envs:
        fits = Agent(envs.single_observation_space, envs.single_action_space, args).shapes == agent.shapes
        require(fits, f"--env-id {args.env_id} has observations or actions of other shapes than the agent")
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        for _ in tqdm(range(num_episodes), unit="episode", disable=None):
            infos = {}
            while "episode" not in infos:
                obs = agent.normalize(torch.as_tensor(obs))
                action, *_ = agent.get_action_and_value(obs, deterministic=deterministic)
                obs, _, _, _, infos = envs.step(action.numpy())
                endless = envs.episode_lengths[0] > max(100_000, args.max_episode_steps)
                require(not endless, "evaluation: an episode does not end, cut it: --max-episode-steps 1000")
            returns.append(infos["episode"]["r"][0])
    random.setstate(states[0])
    np.random.set_state(states[1])
    return np.array(returns)


def check_finite(losses, agent, global_step):
    """FloatingPointError if a loss, the gradient's norm or a weight is nan or infinite."""
    weights = sum(x.sum() for x in agent.state_dict().values()).item()
    broken = [name for name, x in (losses | {"weights": weights}).items() if not math.isfinite(x)]
    if broken:
        fix = "look at rewards and observations, or lower --learning-rate; this iteration is not saved"
        raise FloatingPointError(f"nan or infinity in {', '.join(broken)} by step {global_step}: {fix}")


@contextmanager
def open_log(args, global_step, device):
    """Yields TensorBoard's writer, which makes the run directory, and the progress bar."""
    if args.track:
        import wandb

        run = {"project": args.wandb_project_name, "entity": args.wandb_entity or None, "config": vars(args)}
        wandb.init(**run, name=Path(args.run_dir).name, sync_tensorboard=True, reinit="finish_previous")
    B = args.num_steps * args.num_envs
    total = args.total_timesteps // B * B
    print(f"{args.run_dir}: {total // B} iterations of {B} steps = {total:,} on {device}", flush=True)
    writer = SummaryWriter(args.run_dir, purge_step=global_step + 1)  # later points are of an earlier run
    writer.add_text("hyperparameters", "  \n".join(f"{x}: {y}" for x, y in vars(args).items()))
    with writer, tqdm(total=total, initial=global_step, unit="step", unit_scale=True, disable=None) as bar:
        yield writer, bar  # disable=None: no bar in a file


def write_log(writer, bar, charts, losses, global_step):
    """A point of each curve; the progress bar, or lines of text where output goes to a file."""
    names = {"pg_loss": "policy_loss", "v_loss": "value_loss"}  # CleanRL's
    for name, value in charts.items():
        writer.add_scalar(f"charts/{name}", value, global_step)
    for name, value in losses.items():
        writer.add_scalar(f"losses/{names.get(name, name)}", value, global_step)
    text = f"return {charts.get('episodic_return', math.nan):.1f}"
    before, bar.n = bar.n, global_step
    bar.set_postfix_str(text)
    if bar.disable and 20 * before // bar.total < 20 * global_step // bar.total:
        print(f"step {global_step:,} of {bar.total:,}: {text}, {charts['SPS']:.0f} steps/s", flush=True)


def main():
    """The command line. Exit codes: 2 bad input, 1 nan, 128 + its number for a signal (Ctrl-C: 130)."""
    command = shlex.join(["python", sys.argv[0]])
    received = []  # signals
    signals = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # not on Windows

    def on_signal(number, frame):  # the first one ends the iteration, a second one the process
        received.append(number)
        # under torchrun it may come twice: from the terminal, and handed on by torchrun
        signal.signal(number, signal.SIG_DFL if WORLD_SIZE == 1 else signal.SIG_IGN)

    keep_freed_memory()
    args = tyro.cli(Args)
    path = args.evaluate or args.resume
    try:
        if path:  # parse again over the saved arguments: what was typed wins
            args = tyro.cli(Args, default=load_checkpoint(path)["args"])
        if not args.evaluate:
            signals = [x for x in signals if signal.getsignal(x) != signal.SIG_IGN]  # nohup ignores SIGHUP
            for number in signals:
                signal.signal(number, on_signal)
            path = train(args, stop_requested=lambda: len(received) > 0)["run_dir"]
            if distributed.is_initialized():
                distributed.destroy_process_group()
            for number in signals:
                signal.signal(number, signal.SIG_DFL)
        quoted = shlex.quote(str(path))
        if received:
            if RANK == 0:
                print(f"stopped by signal {received[0]}, go on with: {command} --resume {quoted}")
            sys.exit(128 + received[0])
        if RANK > 0:
            return
        if args.evaluate or args.eval_episodes > 0:
            how = {"deterministic": args.deterministic, "capture_video": args.capture_video}
            how |= {"env_id": args.env_id, "max_episode_steps": args.max_episode_steps}
            returns = evaluate(path, args.eval_episodes or 10, seed=2**30 + args.seed % 2**30, **how)
            kind = f"{len(returns)} {'deterministic' if args.deterministic else 'sampled'} episodes"
            std_error = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else math.nan
            print(f"{returns.mean():.1f} +- {1.96 * std_error:.1f}: mean return of {kind}, 95 % interval")
        if not args.evaluate:
            print(f"evaluate it: {command} --evaluate {quoted} --eval-episodes 100 --capture-video")
            print(f"look at it:  tensorboard --logdir {quoted}")
    except (UsageError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
