#!/bin/bash
# In the style of Pai-Megatron-Patch: sizes by an argument, options as strings, a command that is put together and run.
set -e
ENV=$1
CURRENT_DIR="$( cd "$( dirname "$0" )" && pwd )"
MEGATRON_PATH=$( dirname $( dirname ${CURRENT_DIR}))
export PYTHONPATH=${MEGATRON_PATH}:${MEGATRON_PATH}/PAI-Megatron:$PYTHONPATH
if [ $ENV = dsw ]; then
    MASTER_ADDR=localhost
    MASTER_PORT=$(shuf -n 1 -i 10000-65535)
    NNODES=1
    NODE_RANK=0
    GPUS_PER_NODE=8
elif [ $ENV = dlc ]; then
    NNODES=${WORLD_SIZE}
    NODE_RANK=${RANK}
    GPUS_PER_NODE=${KUBERNETES_CONTAINER_RESOURCE_GPU}
fi
DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --node_rank $NODE_RANK --master_addr $MASTER_ADDR"

MODEL_SIZE=$2
BATCH_SIZE=$3
GLOBAL_BATCH_SIZE=$4
LR=$5
SEQ_LEN=$6
PR=$7
TP=$8
AC=$9
SP=${10}
TRAIN_TOKENS=${11}

if [ $MODEL_SIZE = 7B ]; then
  NUM_LAYERS=28
  HIDDEN_SIZE=3584
  NUM_ATTN_HEADS=28
  INTERMEDIATE_SIZE=18944
  gqa_options=" \
		    --group-query-attention \
		    --num-query-groups 4"
elif [ $MODEL_SIZE = 72B ]; then
  NUM_LAYERS=80
  HIDDEN_SIZE=8192
  NUM_ATTN_HEADS=64
  INTERMEDIATE_SIZE=29568
  gqa_options=" --group-query-attention --num-query-groups 8"
fi

if [ $AC = full ]; then
    activation_checkpoint_options="--recompute-method uniform --recompute-granularity full"
elif [ $AC = sel ]; then
    activation_checkpoint_options="--recompute-activations"
elif [ $AC = none ]; then
    activation_checkpoint_options=""
fi

if [ $PR = bf16 ]; then
    pr_options="--bf16"
elif [ $PR = fp16 ]; then
    pr_options="--fp16"
fi
if [ $SP = true ] && [ $TP -gt 1 ]; then
    sp_options="--sequence-parallel"
elif [ $SP = false ]; then
    sp_options=""
fi

TRAIN_ITERS=$(( ${TRAIN_TOKENS} / ${GLOBAL_BATCH_SIZE} / ${SEQ_LEN} ))
NAME="pretrain-qwen-${MODEL_SIZE}-lr-${LR}-bs-${BATCH_SIZE}"
mkdir -p "out/tensorboard/"
current_time=$(date "+%Y.%m.%d-%H.%M.%S")
TENSORBOARD_DIR="out/tensorboard/${NAME}"

megatron_options="  \
        --save out/${NAME} \
        --lr ${LR} \
        --attention-dropout 0.0 \
        --hidden-dropout 0.0 \
        --swiglu \
        --normalization RMSNorm \
        --use-rotary-position-embeddings \
        --position-embedding-type rope \
        --disable-bias-linear \
        --add-qkv-bias \
        --micro-batch-size ${BATCH_SIZE} \
        --global-batch-size ${GLOBAL_BATCH_SIZE} \
        --train-iters ${TRAIN_ITERS} \
        --num-layers ${NUM_LAYERS} \
        --hidden-size ${HIDDEN_SIZE} \
        --num-attention-heads ${NUM_ATTN_HEADS} \
        --ffn-hidden-size ${INTERMEDIATE_SIZE} \
        --seq-length ${SEQ_LEN} \
        --tensor-model-parallel-size ${TP} \
        --tensorboard-dir ${TENSORBOARD_DIR} \
        --eval-iters 0 \
        "

run_cmd="torchrun $DISTRIBUTED_ARGS ../qwen/pretrain_qwen.py
 ${megatron_options} ${pr_options} ${activation_checkpoint_options} ${sp_options} ${gqa_options}"

echo ${run_cmd}
eval ${run_cmd}
set +x
