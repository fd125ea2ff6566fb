#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one call and without network: GPU tests, step and loader times, a training.
#
#   benchmarks/gpu.sh [FOLDER]          results go to FOLDER (default: benchmarks/results)
#
# Needs: Python >= 3.11 with torch (CUDA) and the package's dependencies; W&B is not needed (logger=csv). The package
# itself need not be installed. MLPMATCH_DATA, if set, names a folder with camvid/ and weights/ to train on,
# and voc2012/ to time loading with.
# TRAIN_STEPS sets the length of that training (default 2000).
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
python=${PYTHON:-python3}

# conf/ is the package mlpmatch_pl.conf; a copy of the tree with it in place needs no build tools.
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -r src/mlpmatch_pl "$stage/"
cp -r conf "$stage/mlpmatch_pl/conf"
export PYTHONPATH=$stage${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c 'import albucore, cv2, hydra, lightning, omegaconf, rich, safetensors, timm, torchmetrics' \
  || { echo "a dependency is missing, see above" >&2; exit 1; }
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())')
echo "== $gpu"

echo "== tests"
if "$python" -c 'import pytest' 2>/dev/null; then
  "$python" -m pytest tests/test_gpu.py -q -p no:cacheprovider -o addopts= -o timeout=0 -o testpaths=tests
else
  echo "pytest is not installed here: GPU tests left out"
fi

echo "== training step, resnet50s, 8 + 8 images of 321 px"
"$python" benchmarks/step.py --out "$out/step_$gpu.json"

if [ -n "${MLPMATCH_DATA:-}" ]; then
  if [ -d "$MLPMATCH_DATA/voc2012" ]; then
    echo "== loading"
    OMP_NUM_THREADS=1 "$python" benchmarks/loader.py --formats voc --out "$out/loader_$gpu.json"
  fi
  for method in mlpmatch supervised; do
    echo "== camvid, $method"
    "$python" -m mlpmatch_pl.train experiment=camvid_1-8_mobilenetv2 logger=csv trainer=gpu method=$method \
      loader.crop_size=321 loader.batch_size=8 backbone.decoder_channels=256 schedule.steps="${TRAIN_STEPS:-2000}" \
      hydra.run.dir="$stage/$method"
    cp "$stage/$method/metrics.json" "$out/camvid_${method}_$gpu.json"
  done
else
  echo "== MLPMATCH_DATA is not set: no training"
fi
