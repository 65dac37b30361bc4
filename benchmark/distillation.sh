#!/usr/bin/env bash
# The studies behind docs/distillation.md: runs, table and figure. Results of all parts are collected in
# benchmark/results/distillation.csv. What is under runs/ is not run again; remove the folder of a run that was cut off.
# SEEDS="1 2" benchmark/distillation.sh sokoban states runs two parts for two seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
run="python benchmark/run.py --study distillation --script distillation.py --jobs 1"
sokoban="--eval-episodes 1000 --distill-steps 3000"
classics="--eval-episodes 100 --learning-rate 1e-3 --gamma 0.99"
agent() { ls -d runs/*__"$1"__"$seed"__*/agent.pt | tail -1; }

for seed in ${SEEDS:-1 2 3 4 5}; do
  for part in ${*:-sokoban states cartpole dqn three-tasks}; do
    case $part in
      sokoban) # a teacher, and students by size
        $run --seeds "$seed" --variants "sokoban=" --flags="$sokoban"
        $run --seeds "$seed" --variants "sokoban-small=--student-scale 0.02 0.01" \
          --flags="$sokoban --teacher-path $(agent distillation-sokoban)" ;;
      states) # the student's own states, in both directions, plain and corrected
        own="--states student --student-scale 0.01 --distill-learning-rate 3e-3"
        $run --seeds "$seed" --flags="$sokoban $own --teacher-path $(agent distillation-sokoban)" --variants \
          "own-reverse=--kl-direction reverse" "own-reverse-corrected=--kl-direction reverse --correction" \
          "own-forward=" "own-forward-corrected=--correction" ;;
      cartpole)
        $run --seeds "$seed" --variants "cartpole=--env-ids CartPole-v1" --flags="$classics --distill-steps 2000" ;;
      dqn) # Q-values, by loss; four updates a step, since one leaves these teachers weak
        for task in CartPole Acrobot; do
          name=${task,,}-dqn
          agent "$name" > /dev/null 2>&1 || python dyna_dqn.py --env-id $task-v1 --exp-name "$name" --seed "$seed" \
            --planning replay --planning-steps 3 --total-timesteps 10000 --exploration-steps 1000
          $run --seeds "$seed" --flags="$classics --env-ids $task-v1 --teacher-path $(agent "$name")" --variants \
            "$name=" "$name-nll=--loss nll" "$name-mse=--loss mse" "$name-reverse=--kl-direction reverse"
        done ;;
      three-tasks)
        teachers="$(agent distillation-cartpole) $(agent acrobot-dqn) $(agent distillation-sokoban)"
        $run --seeds "$seed" --variants "three-tasks=--env-ids CartPole-v1 Acrobot-v1 Sokoban-v0" \
          --flags="--student-scale 0.25 0.07 --teacher-path $teachers" ;;
    esac
  done
done
python benchmark/distillation_runs.py
