#!/usr/bin/env bash
# All that wants a GPU, in three parts of at most ten minutes each: for a card that is lent for half an hour.
#
#   bash benchmarks/on_gpu.sh 1 OUT     does it run at all; packs of the 1B and the 8B shape
#   bash benchmarks/on_gpu.sh 2 OUT     the sweep, four of its arms; then a whole study
#   bash benchmarks/on_gpu.sh 3 OUT     the tests that want a GPU; predicted against measured memory; the last arm
#
# OUT keeps the results; parts 2 and 3 share its sweep-cuda.json. TOKENIZER names a folder with the
# tokenizer of any chat model, for the study of part 2; ROWS a file of chat rows (`make quickstart` writes one).
# A step that fails or outlasts its limit does not end the part.
set -u
cd "$(dirname "$0")/.."
part=${1:?usage: on_gpu.sh PART OUT}
out=$(realpath -m "${2:?usage: on_gpu.sh PART OUT}")
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
rm -f "$out/failed"

step() { # LIMIT_S COMMAND...
    local limit=$1
    shift
    echo "--- $*"
    local began=$SECONDS
    timeout --signal=TERM --kill-after=20 "$limit" "$@" || { echo "--- FAILED: exit code $?" && touch "$out/failed"; }
    echo "--- $((SECONDS - began)) s"
}

# As `lora-tune run` sets it. Not for vram_truth.py, which sets what it measures.
packed() {
    local limit=$1
    shift
    step "$limit" env PYTORCH_ALLOC_CONF=expandable_segments:True "$@"
}

study() {
    local folder=$out/study
    mkdir -p "$folder"
    cp benchmarks/data/gpu_study.toml "$folder/study.toml"
    cp "${ROWS:-studies/data/pydoc.jsonl}" "$folder/rows.jsonl"
    PYTHONPATH=benchmarks:$PYTHONPATH $python -c '
import sys
from pathlib import Path
from random_models import save_random_model, shape_config
save_random_model(shape_config("llama-3.2-1b"), Path(sys.argv[1]))' "$folder/gpu-study-base"
    cp "${TOKENIZER:?a folder with tokenizer files}"/* "$folder/gpu-study-base/"
    step 200 bash -c 'cd "$1" && exec "$2" -m lora_tune.cli run study.toml --json >"$3/study.jsonl" 2>"$3/study.log"' \
        - "$folder" "$python" "$out" &
    local run=$!
    sleep 60
    nvidia-smi --query-compute-apps=pid,used_memory --format=csv
    wait "$run"
    tail -n 3 "$out/study.log"
    rm -rf "$folder/gpu-study-base"
    tar czf "$out/study.tar.gz" --exclude='*.safetensors' -C "$folder" . && rm -rf "$folder"
}

case $part in
1)
    step 60 $python -c '
import bitsandbytes, torch
import lora_tune.tuner
layer = bitsandbytes.nn.Linear4bit(2048, 2048, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
print(layer(torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)).std())'
    step 90 $python benchmarks/vram_truth.py --no-trace --points 4 --output "$out/vram-first.json"
    packed 175 $python benchmarks/packs.py --shape llama-3.2-1b --lengths 512 --batches 4 \
        --quantization nf4 none --minutes 2.6 --output "$out/packs-1b.json"
    packed 210 $python benchmarks/packs.py --shape llama-3.1-8b --lengths 512 --batches 4 --quantization nf4 \
        --lanes 1 2 4 8 16 --minutes 3.1 --output "$out/packs-8b.json"
    ;;
2)
    packed 360 $python benchmarks/sweep.py --arms a b c e --lanes 8 --compute-dtype bfloat16 --minutes 5 \
        --output "$out/sweep-cuda.json"
    study
    ;;
3)
    step 60 $python -m pytest -q -m gpu tests/engine
    step 320 $python benchmarks/vram_truth.py --no-trace --minutes 5 --output "$out/vram-truth-cuda.json"
    packed 200 $python benchmarks/sweep.py --arms d --lanes 8 --compute-dtype bfloat16 \
        --output "$out/sweep-cuda.json"
    ;;
*)
    echo "no part $part: 1, 2 or 3" >&2
    exit 2
    ;;
esac
[ ! -e "$out/failed" ]
