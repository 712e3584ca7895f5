# shellcheck shell=bash
# What the job scripts share; they source it from the repository's folder, where they were submitted.
GRACE=${GRACE:-240}
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
source launch/restarts.sh
KINOFORM_STATUS_DIR=$SLURM_SUBMIT_DIR
STATUSES=$((SLURM_JOB_NUM_NODES * PROCESSES))
RESEND=yes
requeues=$SLURM_SUBMIT_DIR/.kinoform-$SLURM_JOB_ID.requeues # how often it has queued again without progress, and where it went on from
shell=()
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi # srun does not take it over by itself

# run_step COMMAND...: runs it by srun on all nodes, and again when it fails; ends the job, which queues again when it was stopped.
# `shell`: the words of a command that srun is to start it by.
run_step() {
  local status run_in srun_args
  read -ra run_in <<<"${RUN_IN:-}"
  read -ra srun_args <<<"${SRUN_ARGS:-}"
  run_again leash srun --kill-on-bad-exit=1 "${srun_args[@]}" "${shell[@]}" "${run_in[@]}" "$@"
  status=$?
  if [ -n "$asked" ] && [ $status -ne 0 ] && [ $status -ne 2 ]; then
    if ! gets_on; then
      say "giving up after $RESTARTS requeues without a new checkpoint: give the job more TIME, or more time to save in (WARNING)"
      status=1
    elif queue_again; then exit 0; fi
  fi
  rm -f "$requeues"
  exit $status
}

# Whether the job may queue again: not after RESTARTS times in a row in which it went on from the checkpoint of the time before. Of what
# does not train (shards, samples), or was stopped before it began to, nothing is known: it may.
gets_on() {
  local count=0 from=''
  if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then rm -f "$requeues"; fi # of an older job with this number
  if [ -z "$begun" ]; then return 0; fi
  { read -r count && read -r from; } 2>/dev/null <"$requeues"
  if [ "$begun" = "$from" ]; then count=$((count + 1)); else count=0; fi
  if [ "$count" -gt "$RESTARTS" ]; then return 1; fi
  printf '%s\n' "$count" "$begun" >"$requeues"
  return 0 # also where it cannot be written
}

queue_again() { # unless Slurm is ending the job; a busy controller is asked again for a minute or more
  local state
  for _ in {1..20}; do
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
    case $state in
      CANCELLED | COMPLETING | PENDING | PREEMPTED | TIMEOUT) return 1 ;;
      ?*) if scontrol requeue "$SLURM_JOB_ID"; then say "stopped: job $SLURM_JOB_ID queues again"; return 0; fi ;;
    esac
    sleep 3
  done
  return 1
}

newest_run() { # the newest run folder of a name
  shopt -s extglob
  compgen -G "$1/[0-9][0-9]+([0-9])-$2" | sort -V | tail -n 1
}
