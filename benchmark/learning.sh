#!/usr/bin/env bash
# The runs behind the README's results, one after the other: bash benchmark/learning.sh; then collect.py (see there).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
out=benchmark/runs
for seed in 1 2 3; do
  python ppo_discrete.py --seed $seed --eval-episodes 100 --run-dir $out/cartpole-$seed
  python ppo_continuous.py --seed $seed --eval-episodes 100 --run-dir $out/halfcheetah-$seed
done
python ppo_atari.py --total-timesteps 1000000 --precision bf16 --num-threads 1 --eval-episodes 100 \
  --run-dir $out/breakout-1
python ppo_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 2000000 --precision bf16 --num-threads 1 \
  --eval-episodes 20 --run-dir $out/pong-1
python benchmark/collect.py $out/*
