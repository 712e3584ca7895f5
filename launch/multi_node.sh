#!/usr/bin/env bash
# Runs any script on several machines. The same line on each of them, in any order; which is which they find out:
#   HOST=node0 NODES=4 launch/multi_node.sh [--dry-run] train_ae.py --config configs/cmd/ucf101-64-paper.yaml \
#       --data-path SHARDS --results-dir RUNS
# SHARDS and RUNS are folders that all machines see. When a process fails or a machine is lost, all start again from the last checkpoint.
# --dry-run before the script's name prints what would be run. (After it, it is the script's own: sizes and memory.)
# SIGTERM, SIGUSR1 or Ctrl-C on any machine saves and stops all; the same lines go on from there. With NODES=1:4 the others start again
# without that machine.
# Variables:
#   HOST          name or address of one of the machines, known to all, at which they meet; the others cannot go on while it is away.
#                 A name may be unknown at first and get another address later: it is looked up at every start
#   PORT          a free port on it, open to the others (default: 29400)
#   NODES         how many machines; or lowest:highest (1:4), then the run goes on with those that are there
#   RUN_ID        must be the same on all machines, and another one for another run on the same HOST and PORT (default: kinoform)
#   JOIN_TIMEOUT  seconds to wait for HOST, then for the others (default: 600)
#   LAST_CALL     with NODES=1:4, seconds to wait for further machines (default: 30)
#   INTERFACE     the network interface that connects the machines, such as eth0 (default: where this machine's own name leads to no
#                 address of the network, the interface towards HOST; else gloo and NCCL choose)
# and PYTHON PROCESSES RESTARTS BACKOFF GRACE, explained in launch/restarts.sh.
# Exit status: 0 done; 75 stopped by a signal; 130 by Ctrl-C; 2 wrong settings; 1 stopped before all was saved; given up: that of
# the last failure (1; 137 of a killed torchrun).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
source launch/restarts.sh
dry=
if [ "${1:-}" = --dry-run ]; then dry=yes; shift; fi
if [ ! -f "${1:-}" ] || [ -z "${HOST:-}" ] || [ -z "${NODES:-}" ]; then
  fail "usage: HOST=node0 NODES=4 launch/multi_node.sh [--dry-run] train_ae.py --config ..."
fi
PROCESSES=${PROCESSES:-$(gpus)}
PORT=${PORT:-29400}
JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}
[[ $HOST =~ ^([A-Za-z0-9._-]+|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f.]*(%[A-Za-z0-9._-]+)?)$ ]] ||
  fail "HOST=$HOST is neither a name nor an IP address"
[[ $PORT =~ ^[1-9][0-9]{0,4}$ && $PORT -le 65535 ]] || fail "PORT=$PORT is no port: give a number from 1 to 65535"
[[ $NODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NODES=$NODES: give how many machines (4), or lowest:highest (1:4)"
if [[ $HOST == *:* ]]; then endpoint="[$HOST]:$PORT"; else endpoint=$HOST:$PORT; fi # an address of IPv6

first_of() { awk 'NR == 1 { print $1 }'; }
address_of() { { getent ahostsv4 "$1" || getent ahosts "$1"; } | first_of; }
address_on() { # the address of an interface
  { ip -o -4 addr show dev "$1"; ip -o -6 addr show dev "$1" scope global; } 2>/dev/null | awk '{ sub("/.*", "", $4); print $4 }' | first_of
}
is_loopback() { [[ $1 == 127.* || $1 == ::1 ]]; }
here() { is_loopback "$host" || hostname -I | tr ' ' '\n' | grep -qxF "$host"; } # whether HOST is this machine
if [ -n "${INTERFACE:-}" ]; then
  [ -n "$(address_on "$INTERFACE")" ] || fail "$(hostname) has no INTERFACE=$INTERFACE with an address"
fi

agent() { # COMMAND WORDS...: runs torchrun by the command, with the way to `host` as it is now
  local by=$1 own network=() settings=join_timeout=$JOIN_TIMEOUT,last_call_timeout=${LAST_CALL:-30}
  own=$(address_of "$(hostname)")
  if [ -z "${INTERFACE:-}" ] && [ -n "$host" ] && is_loopback "${own:-::1}"; then
    if here; then INTERFACE=$(ip -o addr show to "$host" | awk 'NR == 1 { print $2 }')
    else INTERFACE=$(ip -o route get "$host" | sed -n 's/.* dev \([^ ]*\) .*/\1/p'); fi
  fi
  if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
    network=(--local-addr="$(address_on "$INTERFACE")")
    # torchrun would ask what this machine is called
    if [ -n "$host" ] && ! is_loopback "$host"; then settings+=,is_host=$(here && echo 1 || echo 0); fi
  fi
  "$by" "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$PROCESSES" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="${RUN_ID:-kinoform}" "${network[@]}" \
    --rdzv-conf="$settings" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -- "${@:2}"
}

join() { # the agent, once HOST is known and listens: it would give up after a minute
  local end=$((SECONDS + JOIN_TIMEOUT))
  until host=$(address_of "$HOST"); [ -n "$host" ] && { here || timeout 5 bash -c "exec 3<>/dev/tcp/$host/$PORT" 2>/dev/null; }; do
    if [ $SECONDS -ge $end ]; then
      if [ -z "$host" ]; then say "$(hostname) knows no address of HOST=$HOST: give a name or an IP address that every machine knows"
      else say "nobody listens at $HOST:$PORT: start the same line on $HOST, and see that the port is open"; fi
      exit 1
    fi
    sleep 1
  done
  agent leash "$@"
}

export KINOFORM_NODES=${NODES##*:} # where machines are missing, the others take more micro-batches of the same size
if [ -n "$dry" ]; then
  host=$(address_of "$HOST")
  agent show "$@"
else
  run_again join "$@"
  exit # here, as bash goes on reading after this block, in a file that may have been edited in all this time
fi
