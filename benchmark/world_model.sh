#!/usr/bin/env bash
# The runs behind docs/world_model_rollouts.md, its table and figures. Runs are resumable, and what is under runs/ is not
# run again. About two hours of one CPU thread.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
ten="1 2 3 4 5 6 7 8 9 10"
five="1 2 3 4 5"
run="python benchmark/run.py --jobs ${JOBS:-2} --study world_model"
networks="$run --script world_model_rollouts.py"
cartpole="--total-timesteps 2000 --stop-return 475"
pendulum="--env-id Pendulum-v1 --total-timesteps 4000 --initial-steps 600 --steps-per-iteration 400 --stop-return -200"
acrobot="--env-id Acrobot-v1 --total-timesteps 20000 --initial-steps 1000 --steps-per-iteration 500 --stop-return -100"
real="--model real --num-steps 128 --stop-return 475 --policy-updates 10 --hidden 64 64 --num-minibatches 4"

# 1. Real steps to a goal: the ensemble, one network, a Gaussian process; PPO on the real environment
$networks --seeds $ten --variants "cartpole=$cartpole" "cartpole_single=$cartpole --ensemble-size 1" \
  "cartpole_cleanrl=$real --total-timesteps 500000 --num-envs 4 --learning-rate 2.5e-4 --anneal-lr --update-epochs 4 \
  --ent-coef 0.01 --clip-vloss" "cartpole_real=$real --total-timesteps 300000 --num-envs 8 --reward-scale 0.01" \
  "pendulum=$pendulum" "acrobot=$acrobot"
$run --script world_model_gp.py --seeds $ten --variants "gp=--stop-return 475"

# 2. What goes wrong: no early stopping, one network, short and long horizons, noisy actions
$networks --seeds $five --variants "cartpole_never_stop=$cartpole --improvement-share 0" \
  "pendulum_single=$pendulum --ensemble-size 1" "cartpole_initial=$cartpole --start-states initial"
for h in 5 20 50 200 500; do
  $networks --seeds $five --variants "horizon_$h=$cartpole --iterations 1 --horizon $h"
done
for noise in 0.0 0.2 0.4; do
  $networks --seeds $five --flags="--total-timesteps 600 --action-noise $noise" \
    --variants "noise_${noise}_ensemble=" "noise_${noise}_deterministic=--model deterministic"
done

# 3. Likelihoods, speed (nothing else running); the table and the figures
python benchmark/world_model_extras.py likelihood
python benchmark/world_model_extras.py speed
python benchmark/world_model_figures.py
