#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one call and without network: GPU tests, times of the training step, of
# loading and of evaluation, and a training. It has not run on a GPU yet; made to take less than ten minutes there.
#
#   benchmarks/gpu.sh [FOLDER]          results go to FOLDER (default: benchmarks/results)
#
# Needs: Python >= 3.11 with torch (CUDA) and the package's dependencies; W&B is not needed (logger=csv). The package
# itself need not be installed. MLPMATCH_DATA, if set, names a folder with camvid/ and weights/ to train on,
# and voc2012/ to time loading with.
# SECONDS_EACH: time for the rounds of a step benchmark (default 45). TRAIN_STEPS: length of that training (default 2000).
# To see that every line runs, without a GPU:
#   DEVICE=cpu TRAINER=default BACKBONE=test_resnet CROPS="49 65" BATCHES="2 2" SECONDS_EACH=0 EVAL_IMAGES=4 ROUNDS=1 \
#     SAMPLES=4 TRAIN_CROP=65 TRAIN_BATCH=2 TRAIN_STEPS=5 benchmarks/gpu.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
python=${PYTHON:-python3}
device=${DEVICE:-cuda} trainer=${TRAINER:-gpu} backbone=${BACKBONE:-resnet50s}
read -r -a crops <<< "${CROPS:-321 801}"      # VOC, Cityscapes
read -r -a batches <<< "${BATCHES:-8 2}"
classes=(21 19)
seconds=${SECONDS_EACH:-45}

# conf/ is the package mlpmatch_pl.conf; a copy of the tree with it in place needs no build tools.
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -r src/mlpmatch_pl "$stage/"
cp -r conf "$stage/mlpmatch_pl/conf"
export PYTHONPATH=$stage${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c 'import albucore, cv2, hydra, lightning, omegaconf, rich, safetensors, timm, torchmetrics' \
  || { echo "a dependency is missing, see above" >&2; exit 1; }
machine=$("$python" -c 'import sys, torch
print(torch.cuda.get_device_name().replace(" ", "-").lower() if sys.argv[1] == "cuda" else sys.argv[1])' "$device")
echo "== $machine"

echo "== tests"
if "$python" -c 'import pytest' 2>/dev/null; then
  "$python" -m pytest tests/test_gpu.py -q -p no:cacheprovider -o addopts= -o timeout=0 -o testpaths=tests
else
  echo "pytest is not installed here: GPU tests left out"
fi

for i in "${!crops[@]}"; do
  echo "== training step, $backbone, ${batches[i]} + ${batches[i]} images of ${crops[i]} px"
  "$python" benchmarks/step.py --device "$device" --backbone "$backbone" --crop "${crops[i]}" --batch "${batches[i]}" \
    --classes "${classes[i]}" --seconds "$seconds" --out "$out/step_${crops[i]}_$machine.json"
done
echo "== levers, ${crops[0]} px"
"$python" benchmarks/levers.py --device "$device" --backbone "$backbone" --crop "${crops[0]}" --batch "${batches[0]}" \
  --seconds "$seconds" --out "$out/levers_${crops[0]}_$machine.json"

echo "== evaluation"
"$python" benchmarks/evaluate.py --generated --device "$device" --backbone "$backbone" --images "${EVAL_IMAGES:-100}" \
  --rounds "${ROUNDS:-5}" --out "$out/evaluate_$machine.json"

if [ -n "${MLPMATCH_DATA:-}" ]; then
  if [ -d "$MLPMATCH_DATA/voc2012" ]; then
    echo "== loading"
    OMP_NUM_THREADS=1 "$python" benchmarks/loader.py --formats voc --rounds "${ROUNDS:-5}" \
      --samples "${SAMPLES:-24}" --out "$out/loader_$machine.json"
  fi
  for method in mlpmatch supervised; do
    echo "== camvid, $method"
    "$python" -m mlpmatch_pl.train experiment=camvid_1-8_mobilenetv2 logger=csv trainer="$trainer" method=$method \
      loader.crop_size="${TRAIN_CROP:-321}" loader.batch_size="${TRAIN_BATCH:-8}" backbone.decoder_channels=256 \
      schedule.steps="${TRAIN_STEPS:-2000}" hydra.run.dir="$stage/$method"
    cp "$stage/$method/metrics.json" "$out/camvid_${method}_$machine.json"
  done
else
  echo "== MLPMATCH_DATA is not set: no training"
fi
