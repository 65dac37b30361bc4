#!/usr/bin/env bash
# The Distral studies behind docs/distral.md. Runs are resumable, and what is under runs/ or in the results is not run
# again. About half an hour of one idle CPU thread.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

# 1. Sokoban: four tasks, every variant and baseline
python benchmark/run.py --study distral --script distral.py --jobs "${JOBS:-2}" --seeds 1 2 3 4 5 \
  --flags="--total-timesteps 200000 --log-frequency 10000" \
  --variants "kl+ent=" "multitask=--algorithm multitask" "independent=--algorithm independent" \
  "two-column=--algorithm two-column" "kl=--alpha 1" "one-column=--columns 1"
python benchmark/curves.py --study distral --reference multitask --thresholds 0.5 0.6
python benchmark/distral_sokoban.py

# 2. Two rooms
python benchmark/distral_tabular_figures.py
