#!/usr/bin/env bash
# benchmark/gpu.py on a machine with a GPU and PyTorch, but without a network.
#
#     benchmark/gpu.sh wheels              # where there is a network: download what that machine lacks into .whl/
#     benchmark/gpu.sh run --minutes 9     # there: install it in a folder of its own, and run gpu.py with these flags
#
# Between the two, copy this folder there, .whl/ (under 1 MB) with it. The wheels are pure Python.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  wheels)
    python3 -m pip download --no-deps --only-binary=:all: --dest .whl \
      gymnasium==1.4.0 farama-notifications==0.0.6 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.1
    ;;
  run)
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    export PYTHONPATH="$site" PYTHONUNBUFFERED=1
    python3 benchmark/gpu.py "${@:2}"
    ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
