#!/usr/bin/env bash
# What a larger batch costs in frames, for docs/gpu.md. 7x7 rooms with two boxes, the model-free agent. Compare by
# eval/solved: charts/solved is of the episodes that end within a row, and of 1,024 environments in step those are not
# a fair sample.
# A variant is environments, steps of a rollout, minibatches, learning rate. Runs are resumable; a minute of one CPU
# thread for each. The rows in i2a_batches.csv are an earlier version's, which learned more slowly (check out
# db522aa).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python benchmark/run.py --study i2a_batches --jobs "${JOBS:-1}" --seeds 11 \
  --flags="--agent model-free --total-timesteps 200000 --log-frequency 10000" \
  --variants "64x32-8-1e-3=" \
  "256x32-8-1e-3=--num-envs 256" \
  "256x32-32-1e-3=--num-envs 256 --num-minibatches 32" \
  "1024x8-32-1e-3=--num-envs 1024 --num-steps 8 --num-minibatches 32" \
  "1024x32-128-1e-3=--num-envs 1024 --num-minibatches 128" \
  "256x32-8-2e-3=--num-envs 256 --learning-rate 2e-3"
