#!/bin/bash
# Arguments with defaults, files beside the script, options by an if on data, quoted pairs in an array.
set -x
CHECKPOINT_PATH=${1:-"checkpoints/llama"}
TOKENIZER_ARG=${2:-"MOCK"}
DATA_ARG=${3:-"MOCK"}
mkdir -p "$(dirname "$CHECKPOINT_PATH")"

PRETRAIN_SCRIPT_PATH="pretrain_gpt.py"
DISTRIBUTED_ARGS=(--nproc_per_node 8 --nnodes ${NUM_NODES:-1} --node_rank ${NODE_RANK:-0})
TP_SIZE=1; CP_SIZE=1; PP_SIZE=1
MICRO_BATCH_SIZE=1
DTYPE="fp8"
MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --seq-length 8192
    --position-embedding-type rope
    --rotary-base 1000000 # of long contexts
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --swiglu
    --normalization RMSNorm
    --untie-embeddings-and-output-weights
    --disable-bias-linear
)
TRAINING_ARGS=(--micro-batch-size $MICRO_BATCH_SIZE --global-batch-size 128 --train-samples 1953125 --lr 0.00015 --bf16)
DTYPE_ARGS=()
if [[ "$DTYPE" == "fp8" ]]; then
    DTYPE_ARGS+=(
        "--fp8-format hybrid"
        "--fp8-recipe tensorwise"
    )
fi
MODEL_PARALLEL_ARGS=(--tensor-model-parallel-size $TP_SIZE --context-parallel-size $CP_SIZE --sequence-parallel)
DATA_ARGS_LIST=()
if [[ "$TOKENIZER_ARG" == "MOCK" ]] || [[ "$DATA_ARG" == "MOCK" ]] || [[ -z "$TOKENIZER_ARG" ]]; then
    DATA_ARGS_LIST+=("--mock-data" "--tokenizer-type NullTokenizer" "--vocab-size 128256" "--split '99,1,0'")
else
    DATA_ARGS_LIST+=("--data-path $DATA_ARG" "--tokenizer-type HuggingFaceTokenizer" "--tokenizer-model $TOKENIZER_ARG")
fi
if [ ! -f "$PRETRAIN_SCRIPT_PATH" ]; then
    echo "Error: pretrain_gpt.py not found at $PRETRAIN_SCRIPT_PATH"
    exit 1
fi
torchrun "${DISTRIBUTED_ARGS[@]}" "$PRETRAIN_SCRIPT_PATH" \
    "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" ${DTYPE_ARGS[@]} "${MODEL_PARALLEL_ARGS[@]}" ${DATA_ARGS_LIST[@]}
set +x
