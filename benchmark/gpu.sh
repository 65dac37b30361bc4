#!/usr/bin/env bash
# The programs gpu.py and flagship.py on a machine with a GPU and PyTorch, but without a network.
#
#     benchmark/gpu.sh wheels           # where there is a network: download what that machine lacks into .whl/
#     benchmark/gpu.sh levels           # there too: the training levels of the 10x10 agents, in levels/ (five minutes)
#     benchmark/gpu.sh model            # there too: the environment model of the 10x10 agent that imagines (a minute)
#     benchmark/gpu.sh run --minutes 3  # with a GPU: gpu.py with these flags
#     benchmark/gpu.sh flagship         # with a GPU: both 10x10 agents at once, in eight minutes
#
# Before the last two, copy this folder there, with .whl/ (under 1 MB, pure Python), levels/ and runs/.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
install() {
  PYTHONPATH=$(mktemp -d)
  export PYTHONPATH
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$PYTHONPATH" .whl/*.whl
}
case "${1:-}" in
  wheels)
    python3 -m pip download --no-deps --only-binary=:all: --dest .whl \
      gymnasium==1.4.0 farama-notifications==0.0.6 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1
    ;;
  levels) # DeepMind's ten files six times beside 90,000 of the generator's, so that two episodes in five are DeepMind's
    mkdir -p levels
    for copy in 1 2 3 4 5 6; do
      for file in boxoban-levels/unfiltered/train/00[0-9].txt; do cp "$file" "levels/$copy-${file##*/}"; done
    done
    python3 tools/sokoban.py generate --output levels/generated.txt --num-levels 30000 --seed 20
    python3 tools/sokoban.py generate --output levels/more.txt --num-levels 60000 --seed 22
    ;;
  model)
    python3 i2a.py --exp-name model-10x10 --seed 21 --size 10 --num-boxes 4 --max-episode-steps 120 --levels levels \
      --model-frames 40000 --model-steps 6000 --total-timesteps 42048
    ;;
  run)
    install
    python3 benchmark/gpu.py "${@:2}"
    ;;
  flagship)
    install
    # gpu_flagship.csv holds an earlier version's two tables, with its contests; its column `seconds` is the wall clock's.
    # Its agents learned more slowly: their networks did not know the symmetries, and encoder and rollout policy were
    # narrower (check out db522aa)
    python3 benchmark/flagship.py gpu-model-free --seconds 470 --flags="--agent model-free" "${@:2}" &
    model="--env-model-path $(ls runs/*__model-10x10__*/agent.pt)"
    python3 benchmark/flagship.py gpu-i2a --seconds 440 --flags="--imagination-depth 3 $model" "${@:2}"
    wait
    ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
