#!/usr/bin/env bash
# The README's recipes, three seeds each: bash benchmark/recipes.sh [name ...]; then collect.py (see there).
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
      python "$1" --resume "$dir" --eval-episodes 0
    else
      python "$@" --seed "$seed" --num-threads 1 --run-dir "$dir" --eval-episodes 0
    fi
    touch "$dir/done"
  done
}

# Strong published settings
recipe halfcheetah ppo_continuous.py --num-steps 512 --num-minibatches 8 --update-epochs 20 \
  --learning-rate 2.0633e-5 --no-anneal-lr --gamma 0.98 --gae-lambda 0.92 --clip-coef 0.1 --no-clip-vloss \
  --ent-coef 0.0004 --vf-coef 1.16 --max-grad-norm 0.8 --activation relu --hidden-sizes 256 256 --init-log-std -2
