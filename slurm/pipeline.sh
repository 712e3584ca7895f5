#!/usr/bin/env bash
# Submits all stages of a system to Slurm, each to start when those that it needs have ended well.
#   SHARDS=/data/ucf101 RUNS=/runs/ucf101 NODES=4 GPUS=8 TIME=24:00:00 slurm/pipeline.sh [--dry-run] cmd
# The stages are in slurm/pipelines/<system>.sh, one a line; a file of your own can be given in place of a system.
# The same line again goes on after whatever happened: stages that wait or run are left alone, the others are submitted once more, and
# those that were finished end at once. --dry-run prints what would be submitted.
# Variables:
#   RUNS      results folder of all stages; their logs go to RUNS/logs
#   SHARDS    the training clips
#   HELD_OUT  clips for evaluations (default: none)
#   CONFIG    the recipe (default: the one in the pipeline's file)
#   SAMPLES   how many videos to sample at the end (default: 64)
#   VIDEOS    videos of which SHARDS is to be made first, by an array of jobs, with PREPARE, the flags of `preprocess.py shards`
# and those of slurm/submit.sh, which hold for every stage. A line of the pipeline may set them for its own stage.
set -euo pipefail
cd "$(dirname "$0")/.."
dry=()
if [ "${1:-}" = --dry-run ]; then dry=(--dry-run); shift; fi
file=slurm/pipelines/${1:-}.sh
if [ ! -f "$file" ] && [ -f "${1:-}" ]; then file=$1; fi
if [ ! -f "$file" ] || [ -z "${RUNS:-}" ]; then
  echo "error: usage: SHARDS=... RUNS=... slurm/pipeline.sh [--dry-run] $(basename -as .sh slurm/pipelines/*.sh | paste -sd'|')" >&2
  exit 2
fi
name=$(basename "$file" .sh)
export LOGS=${LOGS:-$RUNS/logs}
ledger=$RUNS/.pipeline-$name   # a line for each submitted stage: its name and the number of its job
declare -A jobs=([-]="${AFTER:-}")   # stage -> numbers of its jobs, with : between them

# stage NAME AFTER COMMAND...: submits a stage. AFTER: the stages that it needs, with commas between them; - for none.
stage() {
  local stage=$1 needed number after=''
  for needed in ${2//,/ }; do
    if [ -z "${jobs[$needed]+known}" ]; then echo "error: $file: $stage needs $needed, which is no stage before it" >&2; exit 2; fi
    after+=${jobs[$needed]:+:${jobs[$needed]}}
  done
  shift 2
  if [ ${#dry[@]} -gt 0 ]; then
    NAME=$name-$stage AFTER=${after#:} slurm/submit.sh --dry-run "$@"
    number=JOB-$stage
  else
    number=$(waiting "$stage")
    if [ -n "$number" ]; then
      echo "$stage: job $number is in the queue"
    else
      number=$(NAME=$name-$stage AFTER=${after#:} slurm/submit.sh "$@")
      number=${number%%;*}
      echo "$stage $number" >>"$ledger"
      echo "$stage: job $number${after:+, after ${after#:}}"
    fi
  fi
  jobs[$stage]=$number
}

waiting() { # the number of a stage's job that is in the queue
  local number told
  number=$(sed -n "s/^$1 //p" "$ledger" 2>/dev/null | tail -n 1)
  if [ -z "$number" ]; then return; fi
  for _ in {1..10}; do # a busy controller is no answer: a second job must not be submitted for a run that trains
    if told=$(squeue --noheader --jobs "$number" 2>&1); then
      if [ -n "$told" ]; then echo "$number"; fi
      return
    fi
    if [[ $told = *"nvalid job id"* ]]; then return; fi
    sleep "${BACKOFF:-5}"
  done
  echo "error: squeue does not say whether job $number is in the queue: $told" >&2
  return 1
}

# train NAME AFTER SCRIPT SET HELD_OUT FLAGS...: a stage that trains by the recipe.
train() {
  local held_out=()
  if [ -n "$5" ]; then held_out=(--val-path "$5"); fi
  stage "$1" "$2" "$3" --config "$CONFIG" --data-path "$4" "${held_out[@]}" --results-dir "$RUNS" "${@:6}"
}

# encode AFTER FLAGS...: the stage `latents`: the clips as LATENTS, and those held out as HELD_OUT_LATENTS.
encode() {
  LATENTS=$RUNS/latents/train HELD_OUT_LATENTS=
  stage latents "$1" preprocess.py latents "$SHARDS" --out "$LATENTS" "${@:2}"
  if [ -n "$HELD_OUT" ]; then
    HELD_OUT_LATENTS=$RUNS/latents/held-out
    stage held-out-latents "$1" preprocess.py latents "$HELD_OUT" --out "$HELD_OUT_LATENTS" "${@:2}"
    jobs[latents]+=:${jobs[held-out-latents]}
  fi
}

samples() { stage samples "$1" sample.py "$RUNS" --num-videos "${SAMPLES:-64}" --out "$RUNS/samples" "${@:2}"; }

SHARDS=${SHARDS:-} HELD_OUT=${HELD_OUT:-}
if [ ${#dry[@]} -eq 0 ]; then mkdir -p "$RUNS"; fi
if [ -n "${VIDEOS:-}" ]; then
  read -ra prepare <<<"${PREPARE:-}"
  stage shards - shards "$VIDEOS" --out "$SHARDS" "${prepare[@]}"
  jobs[-]=${jobs[shards]} # whatever needs nothing else needs them
fi
# shellcheck source=slurm/pipelines/cmd.sh
source "$file"
