#!/bin/bash
# sbatch --array=1-10 launch/cohort_slurm.sh PAIRS.CSV OUT [flags of cohort.py]
# A task of the array registers every 10th pair. PAIRS.CSV, the images and OUT lie on storage that every node sees.
#SBATCH --job-name=cohort
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=cohort-%A-%a.log
set -euo pipefail
pairs=${1:?which table of pairs?} out=${2:?which folder for the results?}
shift 2
.venv/bin/python cohort.py --pairs "$pairs" --out "$out" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
