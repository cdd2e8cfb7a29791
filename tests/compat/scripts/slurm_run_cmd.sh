#!/bin/bash
#SBATCH -N 2 --ntasks-per-node=8 --exclusive
export NCCL_IB_SL=1
DIR=`pwd`
DATETIME=`date +'date_%y-%m-%d_time_%H-%M-%S'`
mkdir -p $DIR/logs

options=" \
    --sequence-parallel \
    --tensor-model-parallel-size 8 \
    --num-layers 48 \
    --hidden-size 5120 \
    --num-attention-heads 40 \
    --seq-length 4096 \
    --max-position-embeddings 4096 \
    --micro-batch-size 2 \
    --global-batch-size 256 \
    --train-samples 1000000 \
    --attention-dropout 0.0 \
    --lr 1.5e-4 \
    --squared-relu \
    --split 99,1,0 \
    --bf16 "

run_cmd="python -u ${DIR}/pretrain_gpt.py ${options}"
srun -l --container-image "nvcr.io/nvidia/pytorch:24.04-py3" --output=$DIR/logs/%x_%j_$DATETIME.log sh -c "${run_cmd}"
set +x
