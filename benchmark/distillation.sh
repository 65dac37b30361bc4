#!/usr/bin/env bash
# The studies behind docs/distillation.md: runs, table and figures. What is under runs/ is not run again (a run that was
# cut off: remove its folder). SEEDS="1 2" benchmark/distillation.sh sokoban runs one part for some seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
parts=${*:-sokoban states classics tasks}
run="python benchmark/run.py --study distillation --script distillation.py --jobs 1"
short="--eval-episodes 1000 --distill-steps 3000"

for seed in ${SEEDS:-1 2 3 4 5}; do
  for part in $parts; do
    sokoban=$(ls -d runs/*__distillation-sokoban__"$seed"__*/agent.pt 2> /dev/null | tail -1 || true)
    case $part in
      sokoban) # a teacher, and students by size
        $run --seeds "$seed" --variants "sokoban=" --flags="$short" ;;
      states) # whose states, which direction, corrected or not; students of 7 %
        own="--states student --distill-learning-rate 3e-3"
        $run --seeds "$seed" --flags="$short --student-scale 0.07 --teacher-path $sokoban" --variants \
          "own-reverse=$own --kl-direction reverse" "own-reverse-corrected=$own --kl-direction reverse --correction" \
          "own-forward=$own" "own-forward-corrected=$own --correction" ;;
    esac
  done
done
