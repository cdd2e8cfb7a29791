#!/bin/bash
# Sizes in associative arrays, flags from a loop, a dry run by environment.
declare -A LAYERS=([125M]=12 [1.3B]=24 [6.7B]=32)
declare -A HIDDEN=([125M]=768 [1.3B]=2048 [6.7B]=4096)
SIZE="${SIZE:-1.3B}"
FLAGS="--num-layers ${LAYERS[$SIZE]} --hidden-size ${HIDDEN[$SIZE]} --num-attention-heads $(( HIDDEN[$SIZE] / 128 ))"
for switch in bf16 swiglu disable-bias-linear untie-embeddings-and-output-weights; do
  FLAGS+=" --${switch}"
done
if [[ -n "${DRY_RUN:-}" ]]; then FLAGS+=" --train-iters 1"; else FLAGS+=" --train-iters $(expr 1000 \* 5)"; fi
mpirun -np 16 --bind-to none -x PATH python pretrain_gpt.py $FLAGS --seq-length 2048 --micro-batch-size 2 \
  --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --lr 2e-4 > train.log 2>&1 &
wait
