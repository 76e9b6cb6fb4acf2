#!/usr/bin/env bash
# Several hosts on this machine, with real TCP between them (network namespaces), for tests and benchmarks:
#   hosts.sh up N [RATE]      hosts node0 ... node(N-1), each with its own name, addresses and /dev/shm; RATE as tc writes
#                             it (1gbit, 100mbit) makes an Ethernet of that speed of every host's link
#   hosts.sh sh HOST COMMAND  runs there; as "hosts.sh sh" it is an rsh to launch MPI with
#   hosts.sh bytes            of every host: bytes received and sent so far
#   hosts.sh down
# Needs root, iproute2 and util-linux.
set -euo pipefail

PREFIX=mpilsgd # of the namespaces, so that no others are touched
NET=10.78.0

hosts() { ip netns list | awk '{print $1}' | grep -E "^$PREFIX-node[0-9]+$" | sort -V || true; }

up() {
  local n=$1 rate=${2:-} i j
  down
  ip netns add $PREFIX-switch
  ip -n $PREFIX-switch link add br0 type bridge
  ip -n $PREFIX-switch link set br0 up
  for ((i = 0; i < n; ++i)); do
    local host=$PREFIX-node$i
    ip netns add $host
    ip -n $host link add eth0 type veth peer name port$i netns $PREFIX-switch
    ip -n $PREFIX-switch link set port$i master br0 up
    ip -n $host addr add $NET.$((10 + i))/24 dev eth0
    ip -n $host link set eth0 up
    ip -n $host link set lo up
    mkdir -p /etc/netns/$host
    {
      echo 127.0.0.1 localhost
      for ((j = 0; j < n; ++j)); do echo $NET.$((10 + j)) node$j; done
    } >/etc/netns/$host/hosts
    if [[ -n $rate ]]; then
      ip netns exec $host tc qdisc add dev eth0 root tbf rate "$rate" burst 256kb latency 50ms
    fi
  done
}

# nsenter, not "ip netns exec": that one mounts /sys anew
sh_() {
  while [[ ${1:-} == -* ]]; do shift; done
  local host=$1
  shift
  exec nsenter --net=/run/netns/$PREFIX-"$host" unshare -u -i -m sh -c \
    'hostname "$0"; mount --bind "/etc/netns/$1/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm; exec sh -c "$2"' \
    "$host" "$PREFIX-$host" "$*"
}

bytes() {
  local host
  for host in $(hosts); do
    echo "${host#"$PREFIX"-} $(ip netns exec "$host" awk '$1 == "eth0:" {print $2, $10}' /proc/net/dev)"
  done
}

down() {
  local host
  for host in $(hosts) $PREFIX-switch; do
    if [[ -e /run/netns/$host ]]; then ip netns del "$host"; fi
    rm -rf "/etc/netns/$host"
  done
}

case ${1:-} in
  up | bytes | down) "$@" ;;
  sh)
    shift
    sh_ "$@"
    ;;
  *)
    sed -n '2,/^set/p' "$0" | sed -n 's/^# \{0,1\}//p' >&2
    exit 2
    ;;
esac
