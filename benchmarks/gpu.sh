#!/usr/bin/env bash
# What needs a GPU, in steps planned for less than ten minutes each on an H100, from the root of a checkout:
#
#     bash benchmarks/gpu.sh PHOTOS [STEP ...]
#
# PHOTOS is what training.photos made; without a STEP all of them run. Results are in benchmarks/results after every row,
# also of a step that is stopped; a step that fails does not stop the others.
set -uo pipefail
photos=${1:?expected the folder that training.photos made}
shift
failed=0
run() {
    echo "== python -m $*"
    python -m "$@" || failed=1
}
evaluation() { run benchmarks.evaluation --config released --device cuda --dtype bf16 --rounds 1 "$@"; }

tests() { run pytest -m gpu; }
baseline() { # the first thing to know: seconds, share of the matmul speed, peak against plan
    evaluation --size 2048 --schedules full layers=16 blocks=4
    evaluation --size 4096 --schedules full layers=32 layers=32,host blocks=8
}
chunks() { evaluation --size 4096 --no-parts --schedules layers=4 layers=8 layers=16 layers=32 layers=64 --out benchmarks/results/chunks_cuda.json; }
compile() { evaluation --size 4096 --schedules layers=32 --compile both --out benchmarks/results/compile_cuda.json; }
ways() { # none of the ways of infdit_core.network.fast, all of them, then each of them off
    evaluation --size 4096 --schedules layers=32 --each-way --no-parts --out benchmarks/results/ways_cuda.json
}
attention() { evaluation --size 4096 --schedules layers=32 --backends flash efficient cudnn --no-parts --out benchmarks/results/attention_cuda.json; }
large() { evaluation --size 8192 --schedules layers=64 layers=64,host blocks=8; }
choices() { # bf16 is the baseline: an exact sampling in fp32 alone would take the ten minutes
    run benchmarks.choices --config released --device cuda --dtype bf16 --size 1024 --rounds 1
    run benchmarks.choices --photos "$photos" --device cuda --size 1024 --rounds 1
}
hidiffusion() { run benchmarks.hidiffusion --full-width --device cuda --dtype fp16 --sizes 1024 1536 2048 4096 --rounds 1; }
bundled() { run benchmarks.bundled --device cuda; }
comfyui() { run benchmarks.in_comfyui --device cuda --size 4096 --files "${TMPDIR:-/tmp}/infdit-random"; }
release() { # beside the authors' own network, where INFDIT_RELEASE names a checkout of it
    if [ -z "${INFDIT_RELEASE:-}" ]; then
        echo "== release is left out: INFDIT_RELEASE names no checkout of the authors' repository"
        return
    fi
    # their attention knows no fp32, and only there does an error say that both compute the same
    run benchmarks.release --config released --device cuda --sizes 512 --rounds 1 --out benchmarks/results/release_cuda_fp32.json
    run benchmarks.release --config released --device cuda --dtype bf16 --sizes 1024 2048 4096 --rounds 3
}
strips() { # where there are several
    local gpus; gpus=$(nvidia-smi --list-gpus | wc -l)
    [ "$gpus" -gt 1 ] || { echo "== strips is left out: one GPU"; return; }
    run benchmarks.strips --config released --device cuda --dtype bf16 --size 4096 --gpus "$gpus"
}
quality() { run benchmarks.quality --photos "$photos" --device cuda --crop 2048 --out benchmarks/results/quality_2048.json; }

for step in "${@:-tests baseline chunks compile ways attention large choices bundled hidiffusion comfyui release strips quality}"; do
    for name in $step; do $name; done
done
exit $failed
