#!/bin/bash
# ResIST on all hosts of a TPU pod slice, which JAX finds by itself.
#
#   experiments/launch/tpu_pod.sh NAME ZONE --config=cifar100:s8 \
#     --workdir=/mnt/shared/cifar100 --config.data.dir=/mnt/shared/tensorflow_datasets
#
# Each host needs the project in ~/resist_jax, with `pip install -e '.[tpu]'`, and
# the workdir as a mounted folder that all hosts see. When a host is lost, the
# others exit with code 75, and each host starts the same command again, until the
# run is complete (0), or a person must mend something (1, 2, or 126 and 127: there
# is no `python`), or it is stopped.
set -euo pipefail
name=$1 zone=$2
shift 2
run="python -m resist_jax $(printf '%q ' "$@")"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd resist_jax; until $run; do code=\$?
    case \$code in 1 | 2 | 126 | 127 | 143) exit \$code ;; esac; sleep 10; done"
