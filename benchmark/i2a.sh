#!/usr/bin/env bash
# The I2A studies behind docs/i2a.md: runs, tables and figures. Runs are resumable, and what is under runs/ is not run
# again. About fifteen hours of one CPU thread; JOBS=4 benchmark/i2a.sh runs four at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
run="python benchmark/run.py --jobs ${JOBS:-2}"
# What the defaults were before: some studies have not been run with today's, which learn faster
before="--gamma 0.97 --gae-lambda 0.95 --vf-coef 0.5"
three=("i2a=" "model-free=--agent model-free" "copy=--env-model copy")

# 1. Rooms with two boxes: frames and seconds to some shares. Where imagination pays: deep rollouts of π̂'s likeliest
# actions, at a constant rate, which the others have too up to 420,000 frames
$run --study i2a_7x7 --variants "i2a=" "model-free=--agent model-free"
$run --study i2a_7x7 --variants "depth-8-greedy=--imagination-depth 8 --greedy-rollouts" \
  --flags="--no-anneal-lr --total-timesteps 300000"
$run --study i2a_7x7 --seeds 11 12 --variants "copy=--env-model copy"
$run --study i2a_7x7 --variants "i2a-before=$before" "model-free-before=--agent model-free $before"
$run --study i2a_7x7 --seeds 11 12 13 --variants "copy-before=--env-model copy $before"
$run --study i2a_8x8 --variants "i2a=" "model-free=--agent model-free" --flags="--size 8 $before"
# --sps: frames a second, of i2a_throughput.csv
python benchmark/curves.py --study i2a_7x7 --reference model-free --thresholds 0.3 0.5 0.6 0.7 0.8 0.9 \
  --at-frames 200000 300000 400000 600000 --sps model-free=2342 i2a=1103 depth-8-greedy=610
python benchmark/curves.py --study i2a_8x8 --thresholds 0.3 0.5 0.7 0.8 --at-frames 200000 400000 600000

# 2. Deep rollouts with the defaults before
$run --study i2a_depth --variants "model-free=--agent model-free" \
  "depth-8-greedy=--imagination-depth 8 --greedy-rollouts" --flags="$before --no-anneal-lr --total-timesteps 300000"
for run in runs/*__i2a_depth-model-free__*; do # on to 70 %; held-out shares are those before, from their logs
  python i2a.py --resume "$run/checkpoint.pt" --total-timesteps 450000
done
$run --study i2a_depth --variants "model-free=" "depth-8-greedy=" --collect-only
python benchmark/curves.py --study i2a_depth --reference depth-8-greedy --thresholds 0.3 0.4 0.5 0.6 0.7 \
  --at-frames 200000 300000 --sps depth-8-greedy=610 model-free=2342

# 3. 10x10 rooms with four boxes (on a GPU: benchmark/gpu.sh). An hour, on a CPU with avx512_bf16. First a tenth of the
# levels are DeepMind's, then two thirds; at last the entropy bonus is halved.
mkdir -p levels-1 levels-2
cp boxoban-levels/unfiltered/train/00[0-9].txt levels-1
python tools/sokoban.py generate --output levels-1/generated.txt --num-levels 30000 --seed 20
cp levels-1/generated.txt levels-2
python tools/sokoban.py generate --output levels-1/more.txt --num-levels 60000 --seed 22
for copy in 1 2 3 4 5 6; do
  for file in levels-1/00[0-9].txt; do cp "$file" "levels-2/$copy-${file##*/}"; done
done
five="--agent model-free --total-timesteps 5000000"
go_on="--resume runs/*__flagship-model-free-64__11__*/checkpoint.pt"
if ! compgen -G "runs/*__flagship-model-free-64__11__*" > /dev/null; then # one that was cut off goes on by hand
  python benchmark/flagship.py model-free-64 --flags="$five --levels levels-1" --until 3150000
  python benchmark/flagship.py model-free-64 --flags="$(echo $go_on) --levels levels-2" --until 3990000
  python benchmark/flagship.py model-free-64 --flags="$(echo $go_on) --ent-coef 0.005"
fi
# Agents of earlier editions; gpu-i2a-before and gpu-model-free-before in flagship.csv are the metrics.csv of gpu.sh's
ten="--size 10 --num-boxes 4 --max-episode-steps 120 --log-frequency 50000 --anneal-from 0 $before"
$run --study flagship --seeds 11 --variants "i2a-before=--model-frames 40000 --model-steps 6000" \
  "model-free-before=--agent model-free" --flags="$ten --total-timesteps 5000000"
mkdir -p levels-0
cp levels-1/00[0-9].txt levels-1/generated.txt levels-0
large="--agent model-free --levels levels-0 --cnn-channels 64 64 64 --no-cnn-padding"
$run --study flagship --seeds 11 --variants "model-free-64-before=$large --no-anneal-lr" \
  --flags="$ten --total-timesteps 4000000"
python i2a.py --resume runs/*__flagship-model-free-64-before__11__*/checkpoint.pt --anneal-lr --ent-coef 0.005 \
  --total-timesteps 5000000
$run --study flagship --seeds 11 --variants "model-free-64=" "i2a-before=" "model-free-before=" \
  "model-free-64-before=" --collect-only
python benchmark/curves.py --study flagship --reference model-free-64 --thresholds 0.1 0.3 0.5 \
  --at-frames 500000 1000000 2000000 4000000 --title "10x10, four boxes"

# 4. The paper's setting, one seed of each
$run --study i2a_paper_small --seeds 11 --variants "${three[@]}" --flags="--preset paper-small --total-timesteps 400000"
python benchmark/curves.py --study i2a_paper_small --thresholds 0.1 0.15 --at-frames 200000 240000 \
  --title "7x7, two boxes, --preset paper-small"

# 5. The learned model, speed (nothing else running), and what trained agents can do
python benchmark/i2a_model.py
python benchmark/i2a_throughput.py
python benchmark/i2a_evaluate.py retries checkpoints/{model_free,i2a}_10x10_4boxes.pt \
  --levels boxoban-levels/unfiltered/valid
python benchmark/i2a_evaluate.py random
python benchmark/i2a_evaluate.py boxes runs/*__i2a_8x8-{i2a,model-free}__1[123]__*/agent.pt \
  checkpoints/{model_free,i2a}_10x10_4boxes.pt
python benchmark/i2a_evaluate.py search runs/*__i2a_8x8-i2a__11__*/agent.pt
# What a memory of four frames does to greedy play; the last lines go into i2a_memory.csv
for frames in 1 4; do
  python i2a.py --exp-name "memory-$frames" --agent model-free --frame-stack "$frames" --total-timesteps 300000 $before
  python i2a.py --evaluate runs/*__memory-"$frames"__1__*/agent.pt --greedy
done
