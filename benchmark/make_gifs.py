"""Film trained agents: docs/images/cartpole.gif, lunarlander.gif, halfcheetah.gif and breakout.gif.

    pip install -r benchmark/requirements.txt
    python benchmark/make_gifs.py benchmark/runs/{cartpole-1,lunarlander-1,halfcheetah-1,breakout-10m-1}

Each argument is a run directory. Its agent takes deterministic actions in five episodes with seeds that
training never used, and the one with the median return is filmed. The runs are not written to.
"""

import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from imageio_ffmpeg import get_ffmpeg_exe

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(1_000_001, 1_000_006)
# seconds to leave out, seconds to show, filters of ffmpeg; pictures are cut to where something happens
GIFS = {
    "CartPole": (2, 4, "fps=25,crop=360:240:120:100"),
    "LunarLander": (0, 12, "fps=50/3,scale=-1:240"),
    "HalfCheetah": (2, 3, "fps=10,crop=480:320:0:100,scale=-1:240"),
    "Breakout": (10, 10, "fps=15,scale=-1:240"),
}
# one palette for all pictures, so that still parts do not flicker
PALETTE = "split[a][b];[a]palettegen=max_colors=64[palette];[b][palette]paletteuse=dither=none"


def main(runs: tyro.conf.Positional[tuple[Path, ...]]):
    """Write a gif for the task of each run directory; the scripts are those of this checkout."""
    sys.path.append(str(ROOT))  # for the scripts
    os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")  # needs no display
    torch.set_num_threads(1)
    for run in runs:
        args = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["args"]
        script = importlib.import_module(args["exp_name"])
        returns = {seed: script.evaluate(run, 1, True, seed).item() for seed in SEEDS}
        seed = next(x for x in SEEDS if returns[x] == statistics.median_high(returns.values()))
        (name,) = [task for task in GIFS if args["env_id"].startswith(task)]
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(run / "checkpoint.pt", folder)  # videos are written beside a checkpoint
            script.evaluate(folder, 1, True, seed, capture_video=True)
            skipped, seconds, filters = GIFS[name]
            gif = ROOT / "docs" / "images" / f"{name.lower()}.gif"
            command = [get_ffmpeg_exe(), "-y", "-ss", str(skipped), "-t", str(seconds), "-i"]
            command += [next(Path(folder).rglob("*.mp4")), "-vf", f"{filters},{PALETTE}", "-loop", "0", gif]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        print(f"{gif}: {gif.stat().st_size // 1000} kB, seed {seed} of returns {returns}")


if __name__ == "__main__":
    tyro.cli(main)
