#!/usr/bin/env bash
# The studies behind docs/dyna_q.md and docs/dyna_dqn.md. Runs that are finished are not run again. About an hour of one
# CPU thread, most of it CleanRL's settings.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

# 1. Tables: the book's figures, prioritised sweeping, FrozenLake, Sokoban
python benchmark/dyna_figures.py

# 2. Networks: seeds 1 to 10 in lockstep, eight updates after each real step in replay and model, one in none
run="python benchmark/run.py --script dyna_dqn.py --jobs ${JOBS:-2}"
acrobot="--env-id Acrobot-v1"
$run --study dyna_dqn --seeds 1 --flags="--num-seeds 10" --variants \
  "cartpole-none=--planning none --total-timesteps 20000" \
  "cartpole-replay=--planning replay --total-timesteps 10000" \
  "cartpole-model=--planning model --total-timesteps 10000" \
  "acrobot-none=$acrobot --planning none --total-timesteps 20000" \
  "acrobot-replay=$acrobot --planning replay --total-timesteps 10000" \
  "acrobot-model=$acrobot --planning model --total-timesteps 10000"

# 3. CleanRL's dqn.py, all of its settings, one run at a time so that each stops when it gets there
$run --study dyna_dqn --seeds 1 2 3 4 5 6 7 8 9 10 --variants "cartpole-cleanrl=--stop-return 475" \
  "acrobot-cleanrl=$acrobot --stop-return -100" --flags="--planning none --no-double --no-standardize --hidden 120 84 \
  --total-timesteps 500000 --learning-rate 2.5e-4 --buffer-size 10000 --tau 1 --target-network-frequency 500 \
  --batch-size 128 --exploration-steps 250000 --learning-starts 10000 --train-frequency 10 --eval-frequency 2500"
python benchmark/dyna_neural.py

# 4. What the models of the default budget get wrong
$run --study dyna_dqn_model --seeds 1 --flags="--num-seeds 10" --variants "cartpole=" "acrobot=$acrobot"
python benchmark/dyna_neural.py --agents runs/*__dyna_dqn_model-*/agent.pt
