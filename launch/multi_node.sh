#!/usr/bin/env bash
# Runs any script on several machines. The same line on each of them, in any order; which is which they find out:
#   HOST=node0 NODES=4 launch/multi_node.sh [--dry-run] train_ae.py --config configs/cmd/ucf101-64-paper.yaml --data-path SHARDS --results-dir RUNS
# SHARDS and RUNS are folders that all machines see. When a process fails or a machine is lost, all start again from the last checkpoint.
# --dry-run before the script's name prints what would be run. (After it, it is the script's own: sizes and memory.)
# SIGTERM, SIGUSR1 or Ctrl-C on any machine saves and stops all; the same lines go on from there. With NODES=1:4 the others start again
# without that machine.
# Variables:
#   HOST          name or address of one of the machines, known to all
#   PORT          a free port on it, open to the others (default: 29400)
#   NODES         how many machines; or lowest:highest (1:4), then the run goes on with those that are there
#   RUN_ID        must be the same on all machines, and another one for another run on the same HOST and PORT (default: kinoform)
#   JOIN_TIMEOUT  seconds to wait for the other machines (default: 600); with NODES=1:4, LAST_CALL seconds for further ones (default: 30)
#   INTERFACE     the network interface that connects the machines, such as eth0 (default: where this machine's own name leads to no
#                 address of the network, the interface towards HOST; else gloo and NCCL choose)
# and PYTHON PROCESSES RESTARTS BACKOFF GRACE, explained in launch/restarts.sh.
# Exit status: 0 done; 75 stopped by a signal; 130 by Ctrl-C; 2 wrong settings; 1 given up, or stopped before all was saved.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source launch/restarts.sh
run="run_again join"
if [ "${1:-}" = --dry-run ]; then run=show; shift; fi
if [ ! -f "${1:-}" ] || [ -z "${HOST:-}" ] || [ -z "${NODES:-}" ]; then
  fail "usage: HOST=node0 NODES=4 launch/multi_node.sh [--dry-run] train_ae.py --config ..."
fi
PROCESSES=${PROCESSES:-$(gpus)}
PORT=${PORT:-29400}
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}
if [[ $HOST == *:* ]]; then endpoint="[$HOST]:$PORT"; else endpoint=$HOST:$PORT; fi # an address of IPv6
rendezvous=(--rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${RUN_ID:-kinoform}")
settings=join_timeout=$JOIN_TIMEOUT,last_call_timeout=${LAST_CALL:-30}

address_of() { { getent ahostsv4 "$1" || getent ahosts "$1"; } | awk 'NR == 1 { print $1 }'; }
is_loopback() { [[ $1 == 127.* || $1 == ::1 ]]; }
here() { is_loopback "$host" || hostname -I | tr ' ' '\n' | grep -qxF "$host"; } # whether HOST is this machine
host=$(address_of "$HOST")
[ -n "$host" ] || fail "$(hostname) knows no address of HOST=$HOST: give a name or an IP address that every machine knows"

own=$(address_of "$(hostname)")
if [ -z "${INTERFACE:-}" ] && is_loopback "${own:-::1}"; then
  if here; then INTERFACE=$(ip -o addr show to "$host" | awk 'NR == 1 { print $2 }')
  else INTERFACE=$(ip -o route get "$host" | sed -n 's/.* dev \([^ ]*\) .*/\1/p'); fi
fi
if [ -n "${INTERFACE:-}" ]; then
  address=$({ ip -o -4 addr show dev "$INTERFACE"; ip -o -6 addr show dev "$INTERFACE" scope global; } 2>/dev/null |
    awk 'NR == 1 { sub("/.*", "", $4); print $4 }')
  [ -n "$address" ] || fail "$(hostname) has no INTERFACE=$INTERFACE with an address"
  export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
  rendezvous+=(--local-addr="$address")
  if ! is_loopback "$host"; then settings+=,is_host=$(here && echo 1 || echo 0); fi # torchrun would ask what this machine is called
fi

join() { # the agent, once HOST listens: it would give up after a minute
  local end=$((SECONDS + JOIN_TIMEOUT))
  until here || timeout 5 bash -c "exec 3<>/dev/tcp/$host/$PORT" 2>/dev/null; do
    if [ $SECONDS -ge $end ]; then say "nobody listens at $HOST:$PORT: start the same line on $HOST, and see that the port is open"; exit 1; fi
    sleep 1
  done
  leash "$@"
}

export KINOFORM_NODES=${NODES##*:} # where machines are missing, the others take more micro-batches of the same size
$run "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$PROCESSES" --max-restarts=0 \
  "${rendezvous[@]}" --rdzv-conf="$settings" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -- "$@"
