#!/bin/bash
# launch/tpu_pod.sh NAME ZONE CONFIG WORKDIR [--config.KEY=VALUE ...]
# On every host of the TPU slice NAME: fetch this commit, install, and start training. WORKDIR may be gs://... no: it is
# a folder that every host sees (Filestore, or a bucket mounted with gcsfuse).
