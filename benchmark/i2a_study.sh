#!/usr/bin/env bash
# The I2A study: the runs behind docs/i2a.md, then its tables and figures. Resumable: what is there is not run again.
# About 11 hours of one CPU thread, more with the full size; JOBS=4 benchmark/i2a_study.sh runs four at a time.
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
$run --task 7x7-2 --seeds 11 12 13 14 15 --variants model-free --total-timesteps 3000000
$run --task 7x7-2 --seeds 11 12 13 14 15 --variants i2a --total-timesteps 2000000
$run --task 7x7-2 --seeds 11 12 13 14 15 --variants copy --total-timesteps 400000

# 8x8 rooms with two boxes. 1. I2A against model-free, one twice as wide, and the copy model (the paper's figure 4, left)
task=8x8-2
$run --task $task --seeds 11 --variants i2a model-free --total-timesteps 4000000
$run --task $task --seeds 12 14 15 --variants i2a --total-timesteps 2000000
$run --task $task --seeds 13 --variants i2a --total-timesteps 1000000
$run --task $task --seeds 12 13 14 15 --variants model-free --total-timesteps 3000000
$run --task $task --seeds 11 12 13 --variants wide --total-timesteps 1000000
# 2. Depths (figure 4, right). 3. A poor and a middling model, no rewards (figure 5); the perfect model, bfloat16
$run --task $task --seeds 11 12 13 14 15 --variants copy poor --total-timesteps 400000
$run --task $task --seeds 11 12 13 --variants depth-1 depth-5 no-reward perfect --total-timesteps 400000
$run --task $task --seeds 11 12 --variants bf16 --total-timesteps 400000
$run --task $task --seeds 11 --variants width-4 --total-timesteps 400000

# Monte-Carlo search with the good, the poor and the perfect model. 4. Other numbers of boxes, after equal frames; how
# far from a win an agent finds it, and what it lives on
agents() { for seed in 12 14 15; do ls runs/Sokoban-${task}__"$1"__${seed}__*/agent.pt; done; }
for frames in 1000000 2000000; do
  for agent in i2a model-free; do
    [ "$agent $frames" = "i2a 2000000" ] && continue # these are there already
    for seed in 12 14 15; do
      ls runs/Sokoban-${task}__$agent-$frames__${seed}__*/agent.pt 2> /dev/null || python i2a.py --size 8 --num-boxes 2 \
        --agent $agent --seed $seed --total-timesteps $frames --exp-name $agent-$frames
    done
  done
done
evaluate="python benchmark/i2a_evaluate.py"
$evaluate search $(agents study-i2a) --episodes 100 --env-models own perfect other --model-paths $(agents study-poor)
$evaluate boxes $(agents study-i2a) $(agents model-free-2000000) --most 4 --episodes 500
$evaluate near $(agents i2a-1000000) $(agents model-free-1000000) $(agents study-i2a) $(agents model-free-2000000)
$evaluate lesions checkpoints/i2a_7x7.pt $(agents i2a-1000000) $(agents study-i2a) checkpoints/i2a_8x8_2boxes.pt

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
