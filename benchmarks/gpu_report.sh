#!/usr/bin/env bash
# Everything to know about speed on a GPU machine, in at most 25 minutes and in one file:
#
#     benchmarks/gpu_report.sh [--dry-run]
#
# First whether every backend is right on this device, then the operations, then student and teacher at the shape of
# Qwen2.5-VL-7B with random weights. Needs this package's core and nothing else: what is missing is reported as
# missing. Uses no network; kernels to compare with can be brought along in build/gpu-packages (`make gpu-packages`).
# PYTHON names the interpreter, MINUTES the time, OUTPUT the folder of the results.
# With --dry-run the same steps at small shapes on the CPU.
set -u
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
OUTPUT=${OUTPUT:-benchmarks/results}
MINUTES=${MINUTES:-25}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

for folder in build/gpu-packages/*/; do
    [ -d "$folder" ] || continue
    module=$(basename "$folder")
    if "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is not None)"; then
        PYTHONPATH="$PYTHONPATH:$PWD/${folder%/}"
        echo "$module: as brought along"
    fi
done

case "${1:-}" in
    "") device=cuda; dry= ;;
    --dry-run) device=cpu; dry=1; export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 ;;
    *) echo "gpu_report.sh: error: $1 is unknown: give --dry-run or nothing" >&2; exit 2 ;;
esac
if [ -z "$dry" ] && ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu_report.sh: error: $PYTHON sees no CUDA GPU; give --dry-run for a CPU" >&2
    exit 1
fi

parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
mkdir -p "$OUTPUT"
name=$("$PYTHON" -c "
import platform, re, torch
chip = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu-' + platform.machine()
print(re.sub(r'[^a-z0-9]+', '-', chip.lower()).strip('-'))")-$(date +%Y-%m-%d)${dry:+-dry-run}
deadline=$(($(date +%s) + MINUTES * 60))

# step NAME SECONDS COMMAND...: a step that fails, hangs or finds no time left does not stop the others
step() {
    local label=$1 limit=$2 left status
    shift 2
    left=$((deadline - $(date +%s)))
    if [ "$left" -lt 10 ]; then
        echo "no time left" > "$parts/$label.failed"
        return
    fi
    [ "$limit" -gt "$left" ] && limit=$left
    echo "== $label (at most $limit s)"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$parts/$label.log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || echo "exit status $status: $(tail -n 1 "$parts/$label.log")" > "$parts/$label.failed"
    # after every step, so that an interrupted run leaves what it has
    "$PYTHON" benchmarks/merge_report.py "$parts" "$OUTPUT/$name.json"
}
bench() { # bench LABEL SECONDS ARGUMENTS...
    local label=$1 limit=$2
    shift 2
    step "$label" "$limit" "$PYTHON" -m linmu_hf.commands.bench --device $device "$@" \
        --json "$parts/$label.json" --png "$OUTPUT/$name-$label.png"
}
ops() { # ops SCRIPT LABEL SECONDS ARGUMENTS...
    local script=$1 label=$2 limit=$3
    shift 3
    step "$label" "$limit" "$PYTHON" "benchmarks/$script" --device $device "$@" --json "$parts/$label.json"
}

# what matters most comes first, in case the time runs out
backends="auto triton mamba_ssm chunked"
step correctness 240 "$PYTHON" benchmarks/correctness.py --device $device --backends $backends pair \
    ${dry:+--shapes small} --json "$parts/correctness.json"
if [ -n "$dry" ]; then
    step tests 300 "$PYTHON" -m pytest -q --collect-only -m gpu tests/kernels
    ops ops.py ops-forward 300 --lengths 64 128 --backends $backends --dtype float32 --repeats 1
    ops ops.py ops-backward 300 --lengths 64 128 --backends $backends --dtype float32 --repeats 1 --backward
    ops around_scan.py around-scan 300 --lengths 256 512 --dtype bfloat16 --repeats 1 --backward
    bench decoder 300 --model tiny --lengths 64 128 256 --batch_sizes 1 2 --repeats 1 --steps 2 \
        --teacher_backends flash cudnn
    bench graphs 300 --model tiny --lengths 64 --batch_sizes 1 2 --prefill_batch_sizes 2 --graphs --repeats 1 --steps 2
    bench long 300 --model tiny --lengths 512 1024 --prefill_chunk 256 --teacher_max_tokens 512 --repeats 1 --steps 2
    bench ablation 300 --model tiny --lengths 128 --ablate --repeats 1 --steps 2
else
    step tests 300 "$PYTHON" -m pytest -q -m gpu tests/kernels
    ops ops.py ops-forward 120 --shape 7b --lengths 8192 65536 --backends $backends --dtype bfloat16
    ops ops.py ops-backward 120 --shape 7b --lengths 8192 32768 --backends $backends --dtype bfloat16 --backward
    ops around_scan.py around-scan 60 --shape 7b --lengths 8192 65536 --dtype bfloat16
    ops around_scan.py around-scan-backward 60 --shape 7b --lengths 32768 --dtype bfloat16 --backward
    bench decoder 420 --model qwen2.5-vl-7b --lengths 8192 16384 32768 65536 131072 --batch_sizes 1 8 32 \
        --largest_batch --teacher_backends flash cudnn
    # compiling takes about a minute for each model and batch
    bench graphs 300 --model qwen2.5-vl-7b --lengths 16384 --batch_sizes 1 8 --prefill_batch_sizes 4 --graphs
    bench long 300 --model qwen2.5-vl-7b --lengths 262144 524288 1048576 --prefill_chunk 65536 \
        --teacher_max_tokens 262144 --teacher_backends cudnn --batch_sizes 1 8 --repeats 1
    bench ablation 120 --model qwen2.5-vl-7b --lengths 32768 --ablate
fi
# one by one: a backend that is named and missing is an error
for backend in triton mamba_ssm chunked; do
    if [ -n "$dry" ]; then
        bench "backend-$backend" 300 --model tiny --lengths 128 --no_teacher --backends "$backend" --repeats 1 --steps 2
    else
        bench "backend-$backend" 60 --model qwen2.5-vl-7b --lengths 32768 --no_teacher --backends "$backend"
    fi
done
"$PYTHON" benchmarks/merge_report.py "$parts" "$OUTPUT/$name.json"
echo "written: $OUTPUT/$name.json and the pictures beside it"
[ -e "$parts/correctness.failed" ] && exit 1
exit 0
