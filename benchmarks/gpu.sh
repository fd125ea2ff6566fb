#!/usr/bin/env bash
# Everything that needs a CUDA machine, in one call and without network: GPU tests, benchmarks of the training step,
# evaluation and loading, and a training. It has not run on a GPU yet. A part is stopped after four minutes, and the whole
# after 14: parts that are stopped, or not started by then, count as failed.
#
#   benchmarks/gpu.sh [FOLDER]          results go to FOLDER (default: benchmarks/results)
#
# If a part fails, the others still run; the failed ones are listed at the end, and the exit code is 1. The most informative
# parts come first, and each prints the elapsed seconds.
# Needs: Python >= 3.11 with torch (CUDA) and the package's dependencies; W&B is not needed (logger=csv). The package
# itself need not be installed. MLPMATCH_DATA, if set, names a folder with camvid/ and weights/ to train on,
# and voc2012/ to time loading with.
# PARTS: a regular expression of the parts to run (default: all), as PARTS='^step of'.
# PART_SECONDS, TOTAL_SECONDS: limits of a part and of the whole (default 230 and 830, a few seconds less than the minutes).
# SECONDS_EACH: time for the rounds of a step benchmark (default 45). TRAIN_STEPS: length of that training (default 2000).
# To try every line without a GPU:
#   DEVICE=cpu TRAINER=default BACKBONE=test_resnet CROPS="49 65" BATCHES="2 2" SECONDS_EACH=0 EVAL_IMAGES=4 ROUNDS=1 \
#     VITS=test_vit VIT_CROP=48 VIT_BATCH=2 SAMPLES=4 TRAIN_CROP=65 TRAIN_BATCH=2 TRAIN_STEPS=5 BENCHMARK_STEPS=3 benchmarks/gpu.sh FOLDER
set -uo pipefail  # no -e: see part
cd "$(dirname "$0")/.." || exit 1
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd) || exit 1
python=${PYTHON:-python3}
device=${DEVICE:-cuda} trainer=${TRAINER:-gpu} backbone=${BACKBONE:-resnet50s}
read -r -a crops <<< "${CROPS:-321 801}"      # VOC, Cityscapes
read -r -a batches <<< "${BATCHES:-8 2}"
classes=(21 19) criteria=(ce ohem)
seconds=${SECONDS_EACH:-45}

# conf/ is the package mlpmatch_pl.conf; a copy of the tree with conf/ inside the package needs no build tools.
stage=$(mktemp -d) || exit 1
trap 'rm -rf "$stage"' EXIT
cp -r src/mlpmatch_pl "$stage/" && cp -r conf "$stage/mlpmatch_pl/conf" || exit 1
export PYTHONPATH=$stage${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
"$python" -c 'import albumentations, cv2, hydra, lightning, omegaconf, PIL, pydantic, rich, safetensors
import scipy, tifffile, timm, torchmetrics, torchvision' \
  || { echo "a dependency is missing, see above" >&2; exit 1; }
machine=$("$python" -c 'import sys, torch
print(torch.cuda.get_device_name().replace(" ", "-").lower() if sys.argv[1] == "cuda" else sys.argv[1])' "$device") || exit 1
echo "== $machine"

failed=()
part() {  # NAME COMMAND...: run one part and record its failure
  [[ "$1" =~ ${PARTS:-.} ]] || return 0
  local left=$((${TOTAL_SECONDS:-830} - SECONDS)) code
  limit=$((left < ${PART_SECONDS:-230} ? left : ${PART_SECONDS:-230}))
  [ "$limit" -gt 0 ] || { failed+=("$1: no time left"); return 0; }
  echo "== $1"
  "${@:2}"
  code=$?
  case $code in
    0) ;;
    124 | 137) failed+=("$1: stopped after $limit s") ;;
    *) failed+=("$1: exit code $code") ;;
  esac
  echo "== $1: exit code $code after $SECONDS s"
}

timed() {  # ARGUMENTS...: run Python, at most until the limit of the part
  timeout --kill-after=5 "$limit" "$python" "$@"
}

gpu_tests() {
  # Collect only files with GPU tests: the others import packages that are missing on such machines.
  local files; mapfile -t files < <(grep -rl "mark\.gpu" tests --include="test_*.py")
  timed -m pytest "${files[@]}" -m gpu -q -p no:cacheprovider -o addopts= -o timeout=0 -o testpaths=tests
}

step() {  # INDEX
  timed -m benchmarks.step --device "$device" --backbone "$backbone" --crop "${crops[$1]}" --batch "${batches[$1]}" \
    --classes "${classes[$1]}" --criterion "${criteria[$1]}" --seconds "$seconds" \
    --out "$out/step_${crops[$1]}_$machine.json"
}

step_v2() {  # BACKBONE
  timed -m benchmarks.step_v2 --device "$device" --backbone "$1" --crop "${VIT_CROP:-518}" --batch "${VIT_BATCH:-16}" \
    --precision bfloat16 --seconds "$seconds" --out "$out/step_v2_$1_$machine.json"
}

levers() {
  timed -m benchmarks.levers --device "$device" --backbone "$backbone" --crop "${crops[0]}" --batch "${batches[0]}" \
    --seconds "$seconds" --out "$out/levers_${crops[0]}_$machine.json"
}

benchmark_command() {  # on generated images
  timed -m mlpmatch_pl.benchmark trainer="$trainer" backbone=timm backbone.name="$backbone" \
    loader.crop_size="${TRAIN_CROP:-321}" loader.batch_size="${TRAIN_BATCH:-8}" benchmark.steps="${BENCHMARK_STEPS:-50}" \
    hydra.run.dir="$stage/timing" && cp "$stage"/timing/*.json "$out/benchmark_$machine.json"
}

evaluation() {
  timed -m benchmarks.evaluate --generated --device "$device" --backbone "$backbone" --images "${EVAL_IMAGES:-100}" \
    --rounds "${ROUNDS:-5}" --out "$out/evaluate_$machine.json"
}

loading() {
  OMP_NUM_THREADS=1 timed -m benchmarks.loader --formats voc --rounds "${ROUNDS:-5}" --samples "${SAMPLES:-24}" \
    --out "$out/loader_$machine.json"
}

training() {  # METHOD
  timed -m mlpmatch_pl.train experiment=camvid_1-8_mobilenetv2 logger=csv trainer="$trainer" method="$1" \
    loader.crop_size="${TRAIN_CROP:-321}" loader.batch_size="${TRAIN_BATCH:-8}" decoder.channels=256 \
    schedule.steps="${TRAIN_STEPS:-2000}" hydra.run.dir="$stage/$1" && cp "$stage/$1/metrics.json" "$out/camvid_$1_$machine.json"
}

if ! "$python" -c 'import pytest' 2> /dev/null; then
  echo "pytest is not installed here: GPU tests left out"
else
  part "tests" gpu_tests
fi
for i in "${!crops[@]}"; do
  part "training step, $backbone, ${batches[i]} + ${batches[i]} images of ${crops[i]} px" step "$i"
done
for vit in ${VITS:-vit_small_patch14_dinov2 vit_base_patch14_dinov2}; do
  part "step of UniMatch V2, $vit" step_v2 "$vit"
done
part "levers, ${crops[0]} px" levers
part "benchmark command" benchmark_command
part "evaluation" evaluation
if [ -d "${MLPMATCH_DATA:-/nowhere}/voc2012" ]; then
  part "loading" loading
fi
if [ -n "${MLPMATCH_DATA:-}" ]; then
  part "camvid, mlpmatch" training mlpmatch
  part "camvid, supervised" training supervised
else
  echo "== MLPMATCH_DATA is not set: no loading, no training"
fi

[ ${#failed[@]} -eq 0 ] || { printf '== failed: %s\n' "${failed[@]}" >&2; exit 1; }
