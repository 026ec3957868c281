#!/usr/bin/env bash
# Everything that is worth knowing from nine minutes on a CUDA machine, without a network.
#
#   benchmarks/gpu.sh [--data FOLDER_OR_FILE] [--tokenizer NAME_OR_PATH] [--output FILE]
#   benchmarks/gpu.sh --tiny        # the same parts with tiny numbers, also without a GPU, into
#                                   # runs/quick
#
# --data is WikiText-2 (a folder with its three splits, or a text file); without it the pair trains
# on the embedded text. Writes JSON after every measurement (benchmarks/results/gpu.json), so that a
# stopped run still counts. Uses the python3 that has torch and transformers; nothing is installed.
# With several GPUs, the benchmark of scaling comes first (NCCL, five minutes, runs/gpus/scaling.json).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 2)'; then timeout 300 "$PYTHON" benchmarks/scaling.py --output runs/gpus/scaling.json || true; fi
exec timeout --signal=INT 540 "$PYTHON" benchmarks/gpu.py "$@"
