#!/bin/bash
if [ $# -lt 2 ]; then
  echo "usage: $0 DATA OUT"
  exit 1
fi
DATA=$1
torchrun --nproc_per_node 2 pretrain_gpt.py --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 \
  --micro-batch-size 4 --attention-dropout 0 --lr 1e-4 --train-iters 100 --data-path "$DATA" --save "$2"
