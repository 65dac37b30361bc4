#!/usr/bin/env bash
# The I2A studies behind docs/i2a.md: runs, tables and figures. Runs are resumable, and what is under runs/ is not run
# again. About ten hours of one CPU thread; JOBS=4 benchmark/i2a.sh runs four at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
run="python benchmark/run.py --jobs ${JOBS:-2}"
three=("i2a=" "model-free=--agent model-free" "copy=--env-model copy")

# 1. Rooms with two boxes: frames and seconds to some shares
$run --study i2a_7x7 --variants "${three[@]}"
# Without its parts: at a constant rate, with 20,000 frames for the model, with a narrow encoder and rollout policy, and
# three sampled steps. One change more each
parts="$run --study i2a_7x7_parts"
narrow="--encoder-channels 16 --encoder-dense 16 --lstm 32 --rollout-channels 16 --rollout-dense 32"
three_steps="--imagination-depth 3 --no-greedy-rollouts $narrow --model-frames 20000"
$parts --seeds 11 12 13 --variants "constant-rate=" "model-20k=--model-frames 20000" \
  --flags="--no-anneal-lr --total-timesteps 200000"
$parts --seeds 11 12 13 --variants "narrow=--model-frames 20000 $narrow" \
  --flags="--no-anneal-lr --total-timesteps 240000"
$parts --variants "depth-3=$three_steps" "model-free=--agent model-free" --flags="--total-timesteps 400000"
$parts --seeds 11 12 13 14 --variants "copy-depth-3=$three_steps --env-model copy" --flags="--total-timesteps 400000"
$run --study i2a_8x8 --variants "i2a=$three_steps" "model-free=--agent model-free" \
  --flags="--size 8 --total-timesteps 400000"
# The studies i2a_7x7_earlier, i2a_8x8_earlier and i2a_depth are earlier versions' (-turned: minibatches were turned,
# networks did not know the symmetries; -before: with PPO's usual critic too). Check out db522aa to run them; in its
# benchmark/i2a.sh they are i2a_7x7, i2a_8x8 and i2a_depth, without the -turned.
for study in i2a_7x7 i2a_7x7_parts; do # with --reference copy: what is imagination's share
  python benchmark/curves.py --study $study --reference model-free --thresholds 0.3 0.5 0.6 0.7 0.8 0.9 \
    --at-frames 60000 100000 150000 200000 300000 400000
done
python benchmark/curves.py --study i2a_8x8 --reference model-free --thresholds 0.3 0.5 0.7 0.8 0.9 \
  --at-frames 100000 200000 300000 400000

# 2. 10x10 rooms with four boxes (on a GPU: benchmark/gpu.sh). 76 minutes without imagination, 149 and 62 with it, on a
# CPU with avx512_bf16. First a tenth of the levels are DeepMind's, then two thirds; the entropy bonus is halved twice.
# boxoban-levels: git clone https://github.com/google-deepmind/boxoban-levels
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
  python benchmark/flagship.py model-free-64 --flags="$five --levels levels-1 --ent-coef 0.02" --until 2000000
  python benchmark/flagship.py model-free-64 --flags="$(echo $go_on) --levels levels-2 --ent-coef 0.01" --until 4000000
  python benchmark/flagship.py model-free-64 --flags="$(echo $go_on) --ent-coef 0.005"
fi
# Those that imagine; depth 8 as far as it has been run
imagining="--model-frames 40000 --model-steps 6000 --total-timesteps 5000000 --ent-coef 0.02"
if ! compgen -G "runs/*__flagship-i2a-64__11__*" > /dev/null; then
  python benchmark/flagship.py i2a-64 --flags="$imagining --levels levels-1 --imagination-depth 3 $narrow" --until 1550000
  go_on="--resume runs/*__flagship-i2a-64__11__*/checkpoint.pt"
  for folder in runs/*__flagship-i2a-64__11__*; do cp "$folder/checkpoint.pt" "$folder/at1.55M.pt"; done
  python benchmark/flagship.py i2a-64 --flags="$(echo $go_on)" --until 2000000
  python benchmark/flagship.py i2a-64 --flags="$(echo $go_on) --levels levels-2 --ent-coef 0.01" --until 4000000
  python benchmark/flagship.py i2a-64 --flags="$(echo $go_on) --ent-coef 0.005"
fi
if ! compgen -G "runs/*__flagship-i2a-64-depth-8__11__*" > /dev/null; then
  python benchmark/flagship.py i2a-64-depth-8 --flags="$imagining --levels levels-1" --until 1000000
fi
# The variants -turned and -before are earlier versions' too
$run --study flagship --seeds 11 --variants "model-free-64=" "i2a-64=" "i2a-64-depth-8=" --collect-only
python benchmark/curves.py --study flagship --reference model-free-64 --thresholds 0.1 0.3 0.5 \
  --at-frames 500000 1000000 2000000 4000000 --title "10x10, four boxes"

# 3. The paper's setting, one seed of each
$run --study i2a_paper_small --seeds 11 --variants "${three[@]}" --flags="--preset paper-small --total-timesteps 400000"
python benchmark/curves.py --study i2a_paper_small --thresholds 0.1 0.15 --at-frames 200000 240000 \
  --title "7x7, two boxes, --preset paper-small"

# 4. The learned model, speed (nothing else running), and what trained agents can do
python benchmark/i2a_model.py
python benchmark/i2a_throughput.py
python benchmark/i2a_evaluate.py retries checkpoints/{model_free,i2a}_10x10_4boxes.pt \
  --levels boxoban-levels/unfiltered/valid
python benchmark/i2a_evaluate.py random
python benchmark/i2a_evaluate.py ablation runs/*__i2a_7x7-i2a__1?__*/agent.pt \
  runs/*__i2a_7x7_parts-depth-3__1?__*/agent.pt runs/*__flagship-i2a-64__11__*/checkpoint.pt
# i2a_boxes_first_edition.csv and i2a_search_first_edition.csv are the first edition's
python benchmark/i2a_evaluate.py boxes checkpoints/{model_free,i2a}_10x10_4boxes.pt
python benchmark/i2a_evaluate.py search checkpoints/i2a_10x10_4boxes.pt
