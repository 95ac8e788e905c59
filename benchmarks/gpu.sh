#!/usr/bin/env bash
# Everything that needs a GPU, from the root of a checkout: bash benchmarks/gpu.sh PHOTOS
# PHOTOS is what training.photos made. Results go to benchmarks/results; a step that fails does not stop the others.
set -uo pipefail
photos=${1:?expected the folder that training.photos made}
failed=0
run() {
    echo "== python -m $*"
    python -m "$@" || failed=1
}

run pytest -m gpu
run benchmarks.evaluation --config released --device cuda --dtype bf16 --size 2048
run benchmarks.evaluation --config released --device cuda --dtype bf16 --size 4096
run benchmarks.evaluation --config released --device cuda --dtype bf16 --size 8192
run benchmarks.choices --config released --device cuda --side 2048
run benchmarks.choices --pictures "$photos" --device cuda --side 2048
run benchmarks.hidiffusion --full-width --device cuda --dtype fp16 --sizes 1024 1536 2048 4096
run benchmarks.quality --photos "$photos" --device cuda --crop 2048 --out benchmarks/results/quality_2048.json
exit $failed
