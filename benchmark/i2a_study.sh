#!/usr/bin/env bash
# The I2A study: the runs behind docs/i2a.md, then its tables and figures. Resumable: what is there is not run again.
# About JOBS x 4 hours of one CPU thread; JOBS=4 benchmark/i2a_study.sh runs four at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
task=7x7-1
run="python benchmark/i2a_runs.py --task $task --jobs ${JOBS:-2}"

# 1. I2A against model-free, one twice as wide, and the copy model (the paper's figure 4, left)
$run --seeds 11 12 13 14 15 --variants i2a model-free wide copy --total-timesteps 800000
# 2. Depths (figure 4, right), 3. a poor model and no rewards (figure 5)
$run --seeds 11 12 13 --variants depth-1 depth-5 poor no-reward --total-timesteps 500000

# 3. Monte-Carlo search with the good, the poor and the perfect model, 4. other numbers of boxes
agents() { ls -d runs/Sokoban-${task}__study-"$1"__*/agent.pt; }
python benchmark/i2a_evaluate.py search $(agents i2a) $(agents poor)
python benchmark/i2a_evaluate.py boxes $(agents i2a) $(agents model-free) --most 3

python benchmark/plot.py --task $task
