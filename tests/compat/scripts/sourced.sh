#!/usr/bin/env bash
# Sizes in a file beside the script; the command in a function that takes what is added.
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$(dirname "$0")/models/medium.sh"
train() {
    local extra=("$@")
    nsys profile -s none -o out.nsys-rep --force-overwrite true torchrun --standalone --nproc-per-node=4 \
        pretrain_gpt.py "${MODEL_ARGS[@]}" "${extra[@]}"
}
train --micro-batch-size 4 --lr 1e-4 --train-iters 1000 --seq-length 1024 --attention-dropout 0
