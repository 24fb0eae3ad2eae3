#!/usr/bin/env bash
# The whole step beside compiled and eager PyTorch in bfloat16, on the graphics card where JAX and torch both see one;
# on a CPU the same pairs with small images, small batches and float32.
#
#   benchmarks/gpu.sh [FOLDER for the JSON files, default benchmarks/results]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
folder=${1:-benchmarks/results}
mkdir -p "$folder"

backend=$("$python" -c 'import jax; print(jax.default_backend())')
cuda=$("$python" -c 'import torch; print(torch.cuda.is_available())')
case "$backend $cuda" in
  "gpu True") small='' ;;
  "cpu False") small=1 ;;
  *)
    echo "gpu.sh: JAX runs on '$backend' and torch.cuda.is_available() is $cuda: install both for the same device" >&2
    exit 2
    ;;
esac

step() { # pair, classes, side and batch on a card, side and batch on a CPU
  if [[ -z $small ]]; then
    "$python" -m benchmarks.step --pair="$1" --classes="$2" --side="$3" --batch="$4" \
      --dtype=bfloat16 --compile --steps=20 --rounds=7 --output="$folder/${1/,/-}-$backend.json"
  else
    "$python" -m benchmarks.step --pair="$1" --classes="$2" --side="$5" --batch="$6" \
      --dtype=float32 --steps=1 --rounds=2 --output="$folder/${1/,/-}-$backend.json"
  fi
}

step resnet50,resnet18 1000 224 128 64 2
step resnet32x4,resnet8x4 100 32 256 32 8
step vit_small_patch16_224,resnet18 1000 224 128 64 2
