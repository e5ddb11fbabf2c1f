#!/bin/bash
# launch/tpu_pod.sh TPU ZONE PROJECT_FOLDER CONFIG WORKDIR [--config.KEY=VALUE ...]
# Starts the training on every host of a Cloud TPU slice. The folder of this project, the data and WORKDIR lie on storage
# that every host mounts at the same place; `make .venv/installed-tpu JAX=tpu` was run there once.
set -euo pipefail
tpu=${1:?which TPU?} zone=${2:?which zone?} folder=${3:?where is the project?}
config=${4:?which configuration?} workdir=${5:?which workdir?}
shift 5
command=$(printf '%q ' .venv/bin/python train.py --config "$config" --workdir "$workdir" --distributed "$@")
gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="cd $(printf %q "$folder") && $command"
