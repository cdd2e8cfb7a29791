#!/bin/bash
# Options of its own, read in a loop.
set -eu
LAYERS=12
while [[ $# -gt 0 ]]; do
  case "$1" in
    --layers) LAYERS="$2"; shift 2 ;;
    --layers=*) LAYERS="${1#*=}"; shift ;;
    --debug) DEBUG=1; shift ;;
    -h|--help) echo "usage: $0 [--layers N]"; exit 0 ;;
    *) echo "what is $1?" >&2; exit 2 ;;
  esac
done
python -m torch.distributed.launch --nproc_per_node=2 pretrain_gpt.py \
  --num-layers "$LAYERS" --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --micro-batch-size 4 \
  --attention-dropout 0 --lr 1e-4 --train-iters 100 ${DEBUG:+--log-interval 1}
