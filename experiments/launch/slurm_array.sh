#!/usr/bin/env bash
# sbatch experiments/launch/slurm_array.sh linear_regression --domain.sigma 0.1 0.3 --lstm.hidden 32 64 --out runs/noise
# runs `metadyn sweep` with these arguments in four parts, each a job with one GPU. --array=1-N makes N parts.
#SBATCH --job-name=metadyn
#SBATCH --array=1-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append

part=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" metadyn sweep "$@" --part "$part"
code=$?
# If it was interrupted or killed, this part continues from its last checkpoint.
if [ "$code" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
