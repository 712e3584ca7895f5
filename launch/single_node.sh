#!/usr/bin/env bash
# Runs any script on all GPUs of this machine, and starts it again from its last checkpoint when a process of it fails.
#   launch/single_node.sh [--dry-run] train_ae.py --config configs/cmd/ucf101-64-paper.yaml --data-path SHARDS --results-dir RUNS
# --dry-run before the script's name prints what would be run. (After it, it is the script's own: sizes and memory.)
# Paths are relative to the repository's folder. SIGTERM, SIGUSR1 and Ctrl-C save and stop; the same line goes on from there.
# Variables: PYTHON PROCESSES RESTARTS BACKOFF GRACE, explained in launch/restarts.sh.
# Exit status: 0 done; 75 stopped by a signal; 130 by Ctrl-C; 2 wrong settings; 1 stopped before all was saved; given up: that of
# the last failure (1; 137 of a killed torchrun).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source launch/restarts.sh
run="run_again leash"
if [ "${1:-}" = --dry-run ]; then run=show; shift; fi
[ -f "${1:-}" ] || fail "usage: launch/single_node.sh [--dry-run] train_ae.py --config ..."

PROCESSES=${PROCESSES:-$(gpus)}
$run "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$PROCESSES" --max-restarts=0 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -- "$@"; exit # bash would read on in a file that may have been edited
