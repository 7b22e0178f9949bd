#!/usr/bin/env bash
# Trains on several nodes. Run this on each of them; the first one is HEAD.
#
#   NODES=2 HEAD=node0 examples/launch_torchrun.sh retrieval --gin-config-file F --run-dir DIR
#
# DIR has to be one directory for all nodes. PER_NODE is the processes of a node (default: one per GPU), RESTARTS how
# often the job starts again after a rank died; it goes on from the last checkpoint. GRACE is the seconds that ranks get
# to end after SIGTERM, or after one of them died, before they are killed (torchrun's own default is 30).
set -euo pipefail
task=${1:?ranking or retrieval}
exec torchrun \
  --nnodes "${NODES:-1}" --nproc_per_node "${PER_NODE:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --shutdown-timeout "${GRACE:-120}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "${JOB:-hstu}" \
  "$(dirname "$0")/pretrain_gr_$task.py" "${@:2}"
