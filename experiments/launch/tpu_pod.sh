#!/bin/bash
# ResIST on all hosts of a TPU pod slice; JAX finds the hosts by itself.
#
#   experiments/launch/tpu_pod.sh NAME ZONE --config=experiments/configs/cifar100.py:s4 \
#     --workdir=/mnt/shared/cifar100 --config.num_workers=8
#
# The project lies in ~/resist_jax on every host, with `pip install -e '.[tpu]'`,
# and the workdir is a mounted folder that all hosts see. Where a host is lost,
# the others end with exit code 75, and every host starts the same command again.
set -euo pipefail
name=$1 zone=$2
shift 2
run="python -m resist_jax $(printf '%q ' "$@")"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd resist_jax; until $run; do [ \$? = 75 ] || exit; sleep 10; done"
