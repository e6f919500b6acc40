#!/usr/bin/env bash
# The recipes of README.md and docs/, three seeds each: bash benchmark/recipes.sh [name ...]; then collect.py (see there).
# SEEDS="1" takes other seeds. What was interrupted goes on, what is finished is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
wanted=" $* "

recipe() {
  local name=$1
  shift
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  for seed in ${SEEDS:-1 2 3}; do
    local dir=benchmark/runs/$name-$seed
    if [[ -f $dir/done ]]; then continue; fi
    if [[ -f $dir/checkpoint.pt ]]; then
      python "$1" --resume "$dir" --eval-episodes 0 || [[ $? == 2 ]] # 2: it had reached its last iteration
    else
      python "$@" --seed "$seed" --num-threads 1 --run-dir "$dir" --eval-episodes 0
    fi
    touch "$dir/done"
  done
}

# Results: the defaults, and Atari as far as a CPU gets in a sitting (the Pong shown: SEEDS=1)
recipe cartpole ppo_discrete.py
recipe default-halfcheetah ppo_continuous.py
recipe breakout ppo_atari.py --total-timesteps 1000000 --precision bf16
recipe breakout-fp32 ppo_atari.py --total-timesteps 1000000 --precision fp32
recipe pong ppo_atari.py --env-id PongNoFrameskip-v4 --total-timesteps 2000000 --precision bf16

# Settings near those of strong published results
recipe halfcheetah ppo_continuous.py --num-steps 512 --num-minibatches 8 --update-epochs 20 \
  --learning-rate 2.0633e-5 --no-anneal-lr --gamma 0.98 --gae-lambda 0.92 --clip-coef 0.1 --no-clip-vloss \
  --ent-coef 0.0004 --vf-coef 1.16 --max-grad-norm 0.8 --activation relu --hidden-sizes 256 256 --init-log-std -2
recipe swimmer ppo_continuous.py --env-id Swimmer-v5 --num-envs 4 --num-steps 1024 --num-minibatches 16 \
  --gamma 0.9999 --gae-lambda 0.98 --learning-rate 6e-4 --no-anneal-lr --no-clip-vloss --vf-coef 1
recipe pendulum ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 100000 --num-envs 4 --num-steps 256 \
  --num-minibatches 16 --gamma 0.95 --learning-rate 2e-3
recipe mountaincar-continuous ppo_continuous.py --env-id MountainCarContinuous-v0 --total-timesteps 20000 \
  --num-steps 256 --num-minibatches 4 --gamma 0.9999 --gae-lambda 0.9 --no-anneal-lr --ent-coef 0.00429 --init-log-std 1
recipe mountaincar ppo_discrete.py --env-id MountainCar-v0 --total-timesteps 1000000 --num-envs 16 --num-steps 16 \
  --gae-lambda 0.98 --learning-rate 3e-4 --no-anneal-lr --ent-coef 0 --no-clip-vloss --vf-coef 1 \
  --norm-obs --norm-reward
recipe lunarlander ppo_discrete.py --env-id LunarLander-v3 --total-timesteps 1000000 --num-envs 16 --num-steps 1024 \
  --num-minibatches 256 --gamma 0.999 --gae-lambda 0.98 --learning-rate 3e-4 --no-anneal-lr --no-clip-vloss --vf-coef 1

# As the documents have it
recipe cartpole-notebook ppo_discrete.py --total-timesteps 100000 --num-envs 1 --num-steps 20 --num-minibatches 4 \
  --update-epochs 4 --hidden-sizes 256 256 --activation relu --learning-rate 3e-4 --no-anneal-lr --no-norm-adv \
  --no-clip-vloss --vf-coef 1 --ent-coef 0 --max-grad-norm 0
recipe introduction-kl ppo_continuous.py --objective kl-penalty --kl-penalty-target 0.01
recipe cartpole-kl ppo_discrete.py --objective kl-penalty
recipe ppo-torch ppo_continuous.py --env-id InvertedPendulum-v5 --total-timesteps 300000 --num-envs 4 --num-steps 1000 \
  --num-minibatches 1 --update-epochs 80 --target-kl 0.015 --learning-rate 1e-3 --no-anneal-lr --hidden-sizes 16 16 \
  --activation relu --init-log-std -0.5 --no-learn-std --no-norm-obs --no-norm-reward
recipe from-scratch ppo_continuous.py --env-id Pendulum-v1 --total-timesteps 480000 --max-episode-steps 1600 \
  --num-steps 4800 --num-minibatches 1 --update-epochs 5 --gae-lambda 1 --gamma 0.95 --learning-rate 5e-3 --no-anneal-lr \
  --activation relu --init-log-std -0.3466 --no-learn-std --no-norm-obs --no-norm-reward --no-clip-vloss --vf-coef 2 \
  --max-grad-norm 0
