#!/usr/bin/env bash
# experiments/launch/tpu_vm.sh NAME ZONE runs on all hosts of a TPU slice, one process per host.
# Needs gcloud, a clone of this repository at ~/metadyn on every host with `pip install -e '.[tpu]'`
# in ~/metadyn/.venv, and a file system that all hosts mount, here at /mnt/runs.
# After a pre-emption, the same command continues the run, on a slice of any size.
set -euo pipefail
name=$1 zone=$2
study=${STUDY:-experiments/linear_regression.py}
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all \
  --command="cd ~/metadyn && .venv/bin/metadyn run $study --preset paper --out /mnt/runs/paper"
