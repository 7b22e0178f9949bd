#!/usr/bin/env bash
# Trains on several nodes of a Slurm cluster:
#
#   sbatch --nodes=4 examples/launch_slurm.sh retrieval --gin-config-file F --run-dir DIR
#
# from the root of the repository, its environment active, DIR on a file system that all nodes share. Slurm sends
# SIGTERM three minutes before the time is up (or up to one sooner), and torchrun gives its ranks GRACE seconds (120) to
# end their step, save and leave; the same command goes on. Raise both if a step, an evaluation and a save take longer:
# a run that is killed goes on from the checkpoint before.
#SBATCH --job-name=hstu
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NODES=$SLURM_JOB_NUM_NODES HEAD=${nodes%%$'\n'*} JOB=$SLURM_JOB_ID
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))
# Since Slurm 22.05 srun does not take the CPUs of a task from sbatch.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash examples/launch_torchrun.sh "$@"
