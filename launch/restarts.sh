# shellcheck shell=bash
# What the launch scripts share; they source it from the repository's folder. Their variables:
#   PYTHON     the interpreter (default: .venv/bin/python)
#   PROCESSES  processes on each machine (default: one per GPU; one where there is none)
#   RESTARTS   failures in a row without a new checkpoint before they give up (default: 5; 0: never start again)
#   BACKOFF    seconds before the first new start, twice as many before each further one, a minute at most (default: 5)
#   GRACE      seconds that a run which is asked to stop has to save, then it is killed (default: 600; torchrun of older versions kills
#              its processes after 30, whatever it says)
#   KINOFORM_STATUS_DIR  where the run's processes leave their statuses, in a folder of their own (default: TMPDIR)
PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-5}
BACKOFF=${BACKOFF:-5}
GRACE=${GRACE:-600}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GRACE
# Else the agents of several nodes share one store over all their attempts, and new workers meet the addresses of dead ones there.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

say() { echo "$(date '+%F %T') kinoform: $*" >&2; }
fail() { echo "error: $*" >&2; exit 2; }

show() { # a command, as it can be typed
  local word line=
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

gpus() { # how many this machine lets its processes use, at least 1
  local found
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then found=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
  else found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU '); fi
  echo $((found > 0 ? found : 1))
}

leash() { # a command that ends when this script is killed
  if setpriv --pdeathsig TERM true 2>/dev/null; then exec setpriv --pdeathsig TERM -- "$@"; fi
  exec "$@"
}

# run_again COMMAND...: runs it, and again when it fails, until it ends well or another start is of no use.
# Status: 0 done; 2 wrong settings; 75 stopped by a signal; 130 by Ctrl-C; else the last failure's, or 1 when a stop was not saved.
# As torchrun makes every status 1, each process of the run leaves its own in the folder KINOFORM_STATUS_DIR, and there says from which
# checkpoint it goes on. STATUSES: how many processes see that folder (default: PROCESSES). With NODES=lowest:highest
# the run goes on without a machine that is told to stop. By KINOFORM_LAUNCH, a random word, the run knows its later starts.
run_again() {
  local failures=0 status seconds why
  begun='' # the checkpoint from which the last start went on; nothing where it has not got so far
  asked=${asked:-} asked_at=$SECONDS child='' killed=''
  trap 'forward INT' INT
  trap 'forward TERM' TERM HUP
  trap 'forward USR1' USR1
  KINOFORM_STATUS_DIR=$(mktemp -d "${KINOFORM_STATUS_DIR:-${TMPDIR:-/tmp}}/.kinoform-${SLURM_JOB_ID:-run}.XXXXXX") || return 1
  KINOFORM_LAUNCH=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
  export KINOFORM_STATUS_DIR KINOFORM_LAUNCH
  set -m # the command gets a process group of its own, so that a terminal's Ctrl-C does not reach it twice
  while :; do
    rm -f "$KINOFORM_STATUS_DIR"/*-*
    attempt "$@"
    status=$?
    touch "$KINOFORM_STATUS_DIR/looked" # a folder of NFS that has been changed here is read anew
    if [ $status -eq 0 ]; then break; fi
    if [ "$(ended_with 2)" -gt 0 ]; then status=2; fi
    if [ $status -eq 2 ] || [ -n "$asked" ]; then break; fi
    why="failed with status $status"
    if [ "$(now_begun)" != "$begun" ]; then failures=0; fi
    begun=$(now_begun)
    if [ "$(ended_with 75)" -ge "${STATUSES:-$PROCESSES}" ]; then # the signal went to another machine
      if [[ ${NODES:-} != *:* ]]; then asked=TERM; break; fi
      why="stopped with another machine" failures=0
    fi
    failures=$((failures + 1))
    if [ $failures -gt "$RESTARTS" ]; then break; fi
    seconds=$((BACKOFF << (failures < 7 ? failures - 1 : 6)))
    seconds=$((seconds < 60 ? seconds : 60))
    say "$why: starting again in $seconds s ($failures of $RESTARTS without a new checkpoint)"
    attempt sleep $seconds
  done
  if [ $status -ne 0 ]; then explain; status=$?; fi
  begun=$(now_begun)
  rm -rf "$KINOFORM_STATUS_DIR"
  return "$status"
}

explain() { # the status of a run that did not end well, with a line for what is not as it should be
  if [ "$status" -eq 2 ] || [ -z "$asked" ]; then
    say "giving up with status $status"
    return "$status"
  fi
  if [ -n "$killed" ] || [ "$(ended_with '1|training')" -gt 0 ]; then
    say "stopped${killed:+ after $GRACE s}, but it was not saved: the same command goes on from the last checkpoint"
    return 1
  fi
  if [ "$asked" = INT ]; then return 130; fi
  return 75
}

attempt() { # runs a command, unless a signal has come, and passes on the one that comes meanwhile; its status
  local status ticks=0
  if [ -n "$asked" ]; then return 143; fi
  "$@" </dev/null &
  child=$!
  if [ -n "$asked" ]; then kill -s "$asked" "$child" 2>/dev/null; fi # it came before the command had a number
  while kill -0 "$child" 2>/dev/null; do
    sleep 0.5 &
    wait $!
    ticks=$((ticks + 1))
    if [ -z "$asked" ]; then continue; fi
    # srun does not pass USR1 on to processes that it is still starting, nor do those hear it: where RESEND is set, it is repeated.
    if [ -n "${RESEND:-}" ] && [ "$asked" = USR1 ] && [ $((ticks % 20)) -eq 0 ]; then kill -s USR1 "$child" 2>/dev/null; fi
    if [ $SECONDS -gt $((asked_at + GRACE)) ]; then killed=yes; kill -s KILL "$child" 2>/dev/null; fi
  done
  wait "$child"
  status=$?
  child=
  return $status
}

forward() { # notes the first signal, and passes it on; a second one would end torchrun while its processes save. Ctrl-C may insist
  if [ -n "$asked" ] && [ "$1" != INT ]; then return; fi
  if [ -z "$asked" ]; then asked_at=$SECONDS; fi
  asked=$1
  if [ -n "$child" ]; then kill -s "$1" "$child" 2>/dev/null; fi
}

now_begun() { cat "$KINOFORM_STATUS_DIR/begun" 2>/dev/null; }
ended_with() { cat "$KINOFORM_STATUS_DIR"/*-* 2>/dev/null | grep -cxE "$1"; } # how many processes have left this status
