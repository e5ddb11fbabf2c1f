#!/bin/bash
# sbatch launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
# A process a node, with all of its GPUs. WORKDIR and the data lie on storage that every node sees.
#SBATCH --job-name=drivenmorph
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=drivenmorph-%j.log
set -euo pipefail
config=${1:?which configuration?} workdir=${2:?which workdir?}
shift 2
srun .venv/bin/python train.py --config "$config" --workdir "$workdir" --distributed "$@"
