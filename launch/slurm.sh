#!/bin/bash
# sbatch launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
# One process a node, all GPUs of it; the workdir on storage that every node sees. Change the lines below to your site.
#SBATCH --job-name=drivenmorph
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=drivenmorph-%j.log

set -euo pipefail
CONFIG=$1 WORKDIR=$2
shift 2
# A requeued job runs this script again, and training goes on from the last checkpoint.
srun .venv/bin/python train.py --config "$CONFIG" --workdir "$WORKDIR" --distributed "$@"
