#!/usr/bin/env bash
# The I2A study: the runs behind docs/i2a.md, then its tables and figures. Runs are resumable, and what is under runs/ is
# not run again. About 13 hours of one CPU thread, more with the full size; JOBS=4 benchmark/i2a_study.sh runs four at
# a time.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
run="python benchmark/i2a_runs.py --jobs ${JOBS:-2}"

# 7x7 rooms with one box; with the paper's n-step returns (λ = 1) too
$run --task 7x7-1 --seeds 11 12 13 --variants model-free --total-timesteps 2500000
$run --task 7x7-1 --seeds 11 12 13 --variants i2a --total-timesteps 1500000
$run --task 7x7-1 --seeds 11 12 13 --variants i2a-nstep model-free-nstep --total-timesteps 800000
$run --task 7x7-1 --seeds 11 --variants copy-nstep --total-timesteps 800000

# 7x7 rooms with two boxes
$run --task 7x7-2 --seeds 11 12 14 15 --variants model-free --total-timesteps 3000000
$run --task 7x7-2 --seeds 13 --variants model-free --total-timesteps 3600000
$run --task 7x7-2 --seeds 11 12 13 14 --variants i2a --total-timesteps 2000000
$run --task 7x7-2 --seeds 15 --variants i2a --total-timesteps 2400000
$run --task 7x7-2 --seeds 11 12 13 14 15 --variants copy --total-timesteps 400000

# 8x8 rooms with two boxes. 1. I2A against model-free, one twice as wide, and the copy model (the paper's figure 4, left)
task=8x8-2
$run --task $task --seeds 11 --variants i2a model-free --total-timesteps 4000000
$run --task $task --seeds 12 14 --variants i2a --total-timesteps 2000000
$run --task $task --seeds 13 15 --variants i2a --total-timesteps 1000000
$run --task $task --seeds 12 13 14 15 --variants model-free --total-timesteps 3000000
$run --task $task --seeds 11 12 13 --variants wide --total-timesteps 1000000
# 2. Depths (figure 4, right). 3. A poor and a middling model, no rewards (figure 5); the perfect model, bfloat16
$run --task $task --seeds 11 12 13 14 15 --variants copy --total-timesteps 400000
$run --task $task --seeds 11 12 13 --variants depth-1 depth-5 poor no-reward perfect --total-timesteps 400000
$run --task $task --seeds 11 12 --variants bf16 --total-timesteps 400000
$run --task $task --seeds 11 --variants width-4 --total-timesteps 400000

# Monte-Carlo search with the good, the poor and the perfect model. 4. Other numbers of boxes, after equal frames: seed 11
# after 4 M, 12 and 14 after 2 M. How far from a win an agent finds it, and what it lives on
for seed in 12 14; do
  ls runs/Sokoban-${task}__model-free-2000000__${seed}__*/agent.pt 2> /dev/null || python i2a.py --size 8 --num-boxes 2 \
    --agent model-free --seed $seed --total-timesteps 2000000 --exp-name model-free-2000000
done
agents() { for seed in "${@:2}"; do ls runs/Sokoban-${task}__"$1"__${seed}__*/agent.pt || exit 1; done; }
imaginers=$(agents study-i2a 11 12 14)
searchers=$(agents study-i2a 11 12 15)
poor=$(agents study-poor 11 12 12)
model_free=$(agents model-free-2000000 12 14)
longest=$(agents study-model-free 11)
early=$(agents study-i2a 15)
evaluate="python benchmark/i2a_evaluate.py"
$evaluate search $searchers --episodes 100 --env-models own perfect other --model-paths $poor
$evaluate boxes $imaginers $longest $model_free --most 4 --episodes 300
$evaluate near $early $imaginers $model_free --episodes 600
$evaluate lesions checkpoints/i2a_7x7.pt $early checkpoints/i2a_8x8_2boxes.pt

# A first measure at full size: BOXOBAN is a copy of DeepMind's unfiltered validation levels
if [ -n "${BOXOBAN:-}" ]; then
  for agent in i2a model-free; do
    python benchmark/i2a_full_size.py --agent $agent --eval-levels "$BOXOBAN" &
  done
  wait
  python benchmark/plot.py --task 10x10-4
fi

python benchmark/plot.py --task 7x7-1 --at-frames 400000
python benchmark/plot.py --task 7x7-2 --at-frames 400000
python benchmark/plot.py --task $task --at-frames 400000
