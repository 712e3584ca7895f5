#!/usr/bin/env bash
# Submits one job to Slurm and prints its number.
#   NODES=4 GPUS=8 TIME=24:00:00 slurm/submit.sh [--dry-run] train_ae.py --config ... --data-path SHARDS --results-dir RUNS
#   ARRAY=0-63 CPUS=8 slurm/submit.sh [--dry-run] shards VIDEOS --out SHARDS --image-size 256 256 --parts 64
# The first runs any script by slurm/train.sbatch, the second makes shards by the array slurm/preprocess.sbatch; the heads of those two
# say what happens then. --dry-run, before the rest, prints what would be submitted. Paths are relative to the repository's folder.
# Variables, besides those of the two; where one is not given, Slurm's own default holds:
#   NODES      (default: 1)               GPUS       on each node (default: none)
#   CPUS       cores on each node         MEMORY     of each node, such as 200G
#   TIME       limit: the job goes on after it, once it has queued again       ACCOUNT  PARTITION  QOS
#   NAME       of the job and its log     LOGS       folder of the log (default: the repository's)
#   AFTER      numbers of jobs, with : between them; this one starts when all have ended well, and is dropped when one has not
#   WARNING    seconds before the limit at which the run is told to save (default: 300)
#   ARRAY      indices of the array (default: 0-15)
#   SBATCH_ARGS  further arguments of sbatch
set -euo pipefail
cd "$(dirname "$0")/.."
run=
if [ "${1:-}" = --dry-run ]; then
  source launch/restarts.sh
  run=show
  shift
fi
[ $# -gt 0 ] || { echo "error: usage: NODES=N GPUS=G slurm/submit.sh [--dry-run] train_ae.py --config ..." >&2; exit 2; }

flags=(--parsable --export=ALL)
flag() { if [ -n "$2" ]; then flags+=("$1=$2"); fi; }
flag --job-name "${NAME:-}"
flag --cpus-per-task "${CPUS:-}"
flag --mem "${MEMORY:-}"
flag --time "${TIME:-}"
flag --account "${ACCOUNT:-}"
flag --partition "${PARTITION:-}"
flag --qos "${QOS:-}"
if [ -n "${AFTER:-}" ]; then flags+=(--dependency="afterok:$AFTER" --kill-on-invalid-dep=yes); fi
if [ -n "${WARNING:-}" ]; then
  flags+=(--signal="B:USR1@$WARNING")
  export GRACE=${GRACE:-$((WARNING * 4 / 5))}
fi
if [ "$1" = shards ]; then
  shift
  flag --array "${ARRAY:-}"
  flag --output "${LOGS:+$LOGS/%x-%A_%a.log}"
  script=slurm/preprocess.sbatch
else
  [ -f "$1" ] || { echo "error: $1: no such script; give shards, or one of $(compgen -G '*.py' | paste -sd' ')" >&2; exit 2; }
  flags+=(--nodes="${NODES:-1}")
  flag --gres "${GPUS:+gpu:$GPUS}"
  flag --output "${LOGS:+$LOGS/%x-%j.log}"
  if [ -n "${GPUS:-}" ] && [ -z "${CPUS:-}" ]; then
    echo "warning: CPUS is not given: on most clusters all processes of a node then share one core" >&2
  fi
  script=slurm/train.sbatch
fi
read -ra more <<<"${SBATCH_ARGS:-}"
if [ -n "${LOGS:-}" ] && [ -z "$run" ]; then mkdir -p "$LOGS"; fi
$run sbatch "${flags[@]}" "${more[@]}" "$script" "$@"
