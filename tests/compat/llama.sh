# A launch script in the style of those published for Llama 3 8B: arrays, variables, quoted pairs, comments.
TP_SIZE=8
CKPT=${1:-"checkpoints/llama3_8b"}
DISTRIBUTED_ARGS=(
    --nproc_per_node 8
    --nnodes 4
)
MODEL_ARGS=(
    --use-mcore-models
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length 8192
    --max-position-embeddings 8192
    --position-embedding-type rope
    --rotary-base 500000
    --rotary-percent 1.0
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --swiglu
    --normalization RMSNorm
    --init-method-std 0.0134   # said in the paper
    --attention-backend fused
    --untie-embeddings-and-output-weights
    --disable-bias-linear
)
TRAINING_ARGS=(
    --micro-batch-size 1 --global-batch-size 128 \
    --train-samples 1953125
    --lr-decay-samples 1949218
    --lr-warmup-samples 3906
    --lr 0.00015
    --min-lr 0.00001
    --lr-decay-style cosine
    --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --bf16
    --overlap-grad-reduce
)
P=(
    --tensor-model-parallel-size $TP_SIZE
    --pipeline-model-parallel-size 4
    --sequence-parallel
    "--split '99,1,0'"
    --vocab-size 128256
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model ${TOKENIZER:-tokenizers/llama3}
    --save "$CKPT" --load "$CKPT"
)
torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py ${MODEL_ARGS[@]} ${TRAINING_ARGS[@]} ${P[@]}
