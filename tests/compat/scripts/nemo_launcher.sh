#!/bin/bash
#SBATCH --account=team
#SBATCH --time=0-04:00:00
# In the style of NeMo's launcher: one srun with commands in quotes, none of which has flags of Megatron-LM.
srun --output /results/log_%j.out --container-image nemo.sqsh --no-container-mount-home bash -c "
  cd /opt/NeMo;
  git rev-parse HEAD;
  CUDA_DEVICE_MAX_CONNECTIONS=1 python3 -u examples/nlp/language_modeling/megatron_gpt_pretraining.py \
  --config-path=/results --config-name=gpt3_5b_hydra.yaml "
