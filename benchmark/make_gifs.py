"""Film trained agents: docs/images/cartpole.gif, lunarlander.gif, halfcheetah.gif and breakout.gif.

    pip install -r benchmark/requirements.txt
    python benchmark/make_gifs.py benchmark/runs/{cartpole-1,lunarlander-1,halfcheetah-1,breakout-10m-1}

Each argument is a run directory. Agents take deterministic actions in episodes with seeds that training never
used. Of several runs of one task the one with the highest mean return is filmed, in the episode that is its
median. The runs are not written to.
"""

import importlib
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import gymnasium
import imageio.v3 as iio
import numpy as np
import torch
import tyro
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from PIL import Image

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
HEIGHT = 240  # pixels of each picture
MOST_BYTES = 1_500_000
BRICKS = slice(57, 93)  # rows of Breakout's screen, 210 in all


def best_loop(frames, length):
    """Index of the first frame of a loop: the jump from its last frame back is small against its motion."""
    small = np.stack([np.asarray(Image.fromarray(x).convert("L").resize((48, 48))) for x in frames])
    small = small.astype(np.float32)
    motion = np.abs(np.diff(small, axis=0)).mean((1, 2))  # from each frame to the next
    starts = range(len(frames) // 10, len(frames) - length)  # not the first moments
    ratios = [
        np.abs(small[start + length] - small[start]).mean() / (motion[start : start + length].mean() + 0.1)
        for start in starts
    ]
    return starts[int(np.argmin(ratios))]


def most_bricks(frames, length):
    """Index of the first frame of the excerpt of Breakout in which most bricks fall."""
    bricks = (frames[:, BRICKS].max(-1) > 60).sum((1, 2))  # coloured pixels
    starts = range(len(frames) - length)
    return max(starts, key=lambda start: int(bricks[start]) - int(bricks[start + length]))


def from_the_start(frames, length):
    return 0


# every: which frames of the video are kept, to save bytes; the speed stays that of the video
WHOLE = (slice(None), slice(None))
MIDDLE = (slice(100, 340), slice(120, 480))  # of 400 rows and 600 columns, which are mostly empty
GIFS = {
    "CartPole": {"seconds": 4, "every": 2, "excerpt": best_loop, "crop": MIDDLE},
    "LunarLander": {"seconds": 12, "every": 3, "excerpt": from_the_start, "crop": WHOLE},
    "HalfCheetah": {"seconds": 3, "every": 2, "excerpt": best_loop, "crop": WHOLE},
    "Breakout": {"seconds": 10, "every": 1, "excerpt": most_bricks, "crop": WHOLE},
}
# looks down on the chequered floor of the cheetah
CAMERA = {"distance": 3.4, "elevation": -20.0, "azimuth": 100.0}


class FollowedCheetah(HalfCheetahEnv):
    """With a camera that runs along."""

    def render(self):
        if self.mujoco_renderer.viewer is not None:  # it is made for the first picture
            self.mujoco_renderer.viewer.cam.lookat[0] = self.data.qpos[0]
        return super().render()


camera = {"camera_id": -1, "default_camera_config": CAMERA, "width": 360, "height": 240}
gymnasium.register("FollowedCheetah-v0", FollowedCheetah, max_episode_steps=1000, kwargs=camera)


def film(checkpoint, script, seed):
    """The frames of one episode, (F, height, width, 3), and how many are shown in a second."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(checkpoint, folder)  # videos are written beside a checkpoint
        task = {"env_id": "FollowedCheetah-v0"} if script.__name__ == "ppo_continuous" else {}
        script.evaluate(folder, 1, deterministic=True, seed=seed, capture_video=True, **task)
        video = next(Path(folder).rglob("*.mp4"))
        return iio.imread(video, plugin="FFMPEG"), iio.immeta(video, plugin="FFMPEG")["fps"]


def write_gif(frames, milliseconds, path):
    """All pictures share one palette, so that still parts do not flicker; fewer colours until it is small."""
    width = round(frames.shape[2] * HEIGHT / frames.shape[1])
    pictures = [Image.fromarray(frame).resize((width, HEIGHT), Image.Resampling.LANCZOS) for frame in frames]
    sample = Image.new("RGB", (width, 8 * HEIGHT))  # eight pictures one below the other, for the palette
    for i in range(8):
        sample.paste(pictures[i * len(pictures) // 8], (0, i * HEIGHT))
    for colours in (128, 64, 32, 16):
        palette = sample.quantize(colours)
        paletted = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        options = {"save_all": True, "append_images": paletted[1:], "loop": 0, "optimize": False}
        paletted[0].save(path, duration=milliseconds, **options)
        if path.stat().st_size <= MOST_BYTES:
            break
    kilobytes = path.stat().st_size // 1000
    print(f"{path.name}: {len(pictures)} pictures of {width} x {HEIGHT}, {colours} colours, {kilobytes} kB")


def main(runs: tyro.conf.Positional[tuple[Path, ...]], episodes: int = 5):
    """Write a gif for each task among the runs.

    Args:
        runs: run directories of scripts of this checkout.
        episodes: to choose from.
    """
    sys.path.append(str(HERE.parent))  # for the scripts
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # needs no display
    torch.set_num_threads(1)
    seeds = range(1_000_001, 1_000_001 + episodes)
    best = {}  # task: (mean return, checkpoint, return per seed, script)
    for run in runs:
        checkpoint = run / "checkpoint.pt"
        args = torch.load(checkpoint, map_location="cpu", weights_only=True)["args"]
        script = importlib.import_module(args["exp_name"])
        (name,) = [task for task in GIFS if args["env_id"].startswith(task)]
        returns = [float(script.evaluate(checkpoint, 1, True, seed)[0]) for seed in seeds]
        mean = statistics.mean(returns)
        print(f"{run}: returns {', '.join(f'{x:.1f}' for x in returns)}")
        if name not in best or mean > best[name][0]:
            best[name] = (mean, checkpoint, returns, script)

    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, (_, checkpoint, returns, script) in best.items():
        gif = GIFS[name]
        median = statistics.median_high(returns)
        seed = seeds[returns.index(median)]
        print(f"{name}: {checkpoint}, seed {seed}, return {median:.1f}")
        frames, fps = film(checkpoint, script, seed)
        length = min(round(gif["seconds"] * fps), len(frames) - 2)
        start = gif["excerpt"](frames, length)
        excerpt = frames[start : start + length : gif["every"], *gif["crop"]]
        write_gif(excerpt, round(1000 * gif["every"] / fps), IMAGES / f"{name.lower()}.gif")


if __name__ == "__main__":
    tyro.cli(main)
