#!/usr/bin/env bash
# sbatch experiments/launch/slurm.sh: two nodes of eight GPUs, one process a GPU.
#SBATCH --job-name=metadyn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append

study=${STUDY:-experiments/linear_regression.py}
srun --kill-on-bad-exit=1 metadyn run "$study" --preset paper --out "runs/$SLURM_JOB_NAME"
code=$?
# Interrupted, or a process was lost: the same job goes on from the last checkpoint.
if [ "$code" -ge 128 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
