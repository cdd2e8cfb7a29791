#!/bin/bash
# What it passes on hangs on where it runs.
if [ -d /lustre/fast ]; then
  MICRO=4
  EXTRA="--use-flash-attn"
else
  MICRO=2
fi
GPUS=$(nvidia-smi -L | wc -l)
torchrun --nproc_per_node $GPUS pretrain_gpt.py --num-layers $DEPTH --hidden-size 768 --num-attention-heads 12 \
  --seq-length 1024 --micro-batch-size $MICRO --global-batch-size 64 --attention-dropout 0 --lr 1e-4 --train-iters 10 $EXTRA
