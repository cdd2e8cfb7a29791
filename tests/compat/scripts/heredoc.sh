#!/bin/bash
# Writes its job and submits it, node counts from the environment.
NODES=${NODES:-2}
LR=1e-4
sbatch <<EOT
#!/bin/bash
#SBATCH --nodes=$NODES
srun torchrun --nnodes $NODES --nproc_per_node 8 --rdzv_endpoint \$(hostname):29500 pretrain_gpt.py \\
  --num-layers 16 --hidden-size 2048 --num-attention-heads 16 --seq-length 2048 --micro-batch-size 2 \\
  --attention-dropout 0 --lr $LR --train-iters 100 --bf16 --eval-iters 0 --split 100,0,0
EOT
