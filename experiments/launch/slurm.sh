#!/usr/bin/env bash
# sbatch experiments/launch/slurm.sh linear_regression --preset paper --out runs/paper
# runs `metadyn run` with these arguments on two nodes with eight GPUs each, one process per GPU.
#SBATCH --job-name=metadyn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append

# Since Slurm 22.05, srun does not inherit --cpus-per-task from sbatch.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 metadyn run "$@"
code=$?
# If it was interrupted, or lost a process, the same job continues from the last checkpoint.
if [ "$code" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
