#!/bin/bash
#SBATCH --job-name=llama
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
set -euo pipefail
nodes=( $( scontrol show hostnames $SLURM_JOB_NODELIST ) )
head_node=${nodes[0]}
head_node_ip=$(srun --nodes=1 --ntasks=1 -w "$head_node" hostname --ip-address)
echo Node IP: $head_node_ip

: "${TP:=4}" "${PP:=2}"
GPUS=8
ARGS=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
  --num-layers 32 --hidden-size 4096 --num-attention-heads 32
  --seq-length 4096 --micro-batch-size 1 --global-batch-size $((4 * GPUS * 8 / TP / PP))
  --train-iters 1000 --lr 3e-4 --bf16 --attention-dropout 0 --hidden-dropout 0
)
srun --kill-on-bad-exit=1 --container-image=/images/torch.sqsh --container-mounts=/data:/data \
  bash -c "torchrun --nnodes=4 --nproc-per-node=$GPUS --rdzv-id=\$SLURM_JOB_ID --rdzv-backend=c10d \
    --rdzv-endpoint=$head_node_ip:29500 pretrain_gpt.py ${ARGS[*]}"
