MODEL_ARGS=(
  --num-layers 24   # a model of medium size
  --hidden-size 1024
  --num-attention-heads 16
)
