"""Film trained agents: docs/images/cartpole.gif, lunarlander.gif, halfcheetah.gif and breakout.gif.

    python benchmark/make_gifs.py benchmark/runs/{cartpole-1,lunarlander-1,halfcheetah-1,breakout-10m-1}

Each argument is a run directory. Its agent plays five episodes with seeds that training never used, with
deterministic actions but for Breakout, and the one with the median return is filmed. The runs are not written
to.
"""

import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium
import torch
import tyro
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from imageio_ffmpeg import get_ffmpeg_exe

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(1_000_001, 1_000_006)
# seconds to leave out, seconds to show, filters of ffmpeg; pictures are cut to where something happens
GIFS = {
    "CartPole": (2, 4, "fps=25,crop=360:240:120:100"),
    "LunarLander": (0, 12, "fps=50/3,scale=-1:240"),
    "HalfCheetah": (2, 3, "fps=10"),
    "Breakout": (111, 14, "fps=15,scale=-1:240"),
}
# one palette for all pictures, so that still parts do not flicker
PALETTE = "split[a][b];[a]palettegen=max_colors=64[palette];[b][palette]paletteuse=dither=none"


class FollowedCheetah(HalfCheetahEnv):
    """With a camera that runs along and looks down on the chequered floor."""

    def render(self):
        if self.mujoco_renderer.viewer is not None:  # it is made for the first picture
            self.mujoco_renderer.viewer.cam.lookat[0] = self.data.qpos[0]
        return super().render()


place = {"distance": 3.4, "elevation": -20.0, "azimuth": 100.0}
camera = {"camera_id": -1, "default_camera_config": place, "width": 360, "height": 240}
gymnasium.register("FollowedCheetah-v0", FollowedCheetah, max_episode_steps=1000, kwargs=camera)


def main(runs: tyro.conf.Positional[tuple[Path, ...]]):
    """Write a gif for the task of each run directory; the scripts are those of this checkout."""
    sys.path.append(str(ROOT))  # for the scripts
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # needs no display
    torch.set_num_threads(1)
    for run in runs:
        args = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["args"]
        script = importlib.import_module(args["exp_name"])
        (name,) = [task for task in GIFS if args["env_id"].startswith(task)]
        best = name != "Breakout"  # its most probable actions can repeat themselves until the time limit
        returns = {seed: script.evaluate(run, 1, best, seed).item() for seed in SEEDS}
        seed = next(x for x in SEEDS if returns[x] == statistics.median_high(returns.values()))
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(run / "checkpoint.pt", folder)  # videos are written beside a checkpoint
            task = {"env_id": "FollowedCheetah-v0"} if name == "HalfCheetah" else {}
            script.evaluate(folder, 1, best, seed, capture_video=True, **task)
            skipped, seconds, filters = GIFS[name]
            gif = ROOT / "docs" / "images" / f"{name.lower()}.gif"
            command = [get_ffmpeg_exe(), "-y", "-ss", str(skipped), "-t", str(seconds), "-i"]
            command += [next(Path(folder).rglob("*.mp4")), "-vf", f"{filters},{PALETTE}", "-loop", "0", gif]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        print(f"{gif}: {gif.stat().st_size // 1000} kB, seed {seed} of returns {returns}")


if __name__ == "__main__":
    tyro.cli(main)
