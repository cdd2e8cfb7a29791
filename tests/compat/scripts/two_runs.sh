#!/bin/bash
COMMON="--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --attention-dropout 0 --lr 1e-4"
for MBS in 1 2; do
  torchrun --nproc_per_node 2 pretrain_gpt.py $COMMON --micro-batch-size $MBS --train-iters 10
done
