#!/usr/bin/env bash
# The larger set, for one node of 8 GPUs with Transformer Engine: a 0.2-billion-parameter MoE, 20,000 steps of 512 sequences.
#
#   TEXT="code=/data/code.txt maths=/data/maths.txt english=/data/english.txt" examples/reproduce/gpu.sh [EXPERIMENT ...]
#
# TEXT: a file of plain text per domain; about 10 billion bytes in all are read. EXPERIMENT: default all, see
# `run.py list --size gpu`. OUT: where everything is written. SEEDS: of every setting, as "0-1". Started again it goes on.
# No GPU has run it yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-reproduce-gpu}
PYTHON=${PYTHON:-python3}
if [ ! -e "$OUT/data/data.json" ]; then
    read -ra texts <<< "${TEXT:?a file per domain: TEXT=\"code=/data/code.txt maths=/data/maths.txt\"}"
    "$PYTHON" examples/reproduce/run.py data --data "$OUT/data" --text "${texts[@]}"
fi
"$PYTHON" examples/reproduce/run.py "${@:-all}" --size gpu --seeds "${SEEDS:-0-1}" --jobs 8 --out "$OUT"
"$PYTHON" examples/reproduce/run.py figure --size gpu --results "$OUT/results"
