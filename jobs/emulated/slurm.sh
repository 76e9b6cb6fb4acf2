#!/usr/bin/env bash
# A real Slurm on this machine alone, for tests: a controller and N nodes of 4 CPUs, nothing outside of one folder.
#   slurm.sh up FOLDER N     then: export SLURM_CONF=FOLDER/slurm.conf
#   slurm.sh down FOLDER
# Needs root and Debian's slurm-wlm and munge.
set -euo pipefail

up() {
  local folder=$1 nodes=$2 host port i
  # Jobs of an earlier Slurm are not these: what MPICH leaves of a killed one bears the job's number.
  host=$(hostname -s) port=$((20000 + RANDOM % 20000))
  mkdir -p "$folder/state" "$folder/log" "$folder/munge"
  folder=$(readlink -f "$folder")
  chmod 755 "$folder"
  dd if=/dev/urandom of="$folder/munge/key" bs=1 count=1024 status=none
  chmod 400 "$folder/munge/key"
  chown -R munge: "$folder/munge"
  runuser -u munge -- /usr/sbin/munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" \
    </dev/null >"$folder/log/munged" 2>&1
  cat >"$folder/slurm.conf" <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=$port
FirstJobId=$((RANDOM + 1000))
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd.%n
TmpFS=$folder
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=pmi2
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
KillWait=15
JobRequeue=1
END
  echo "CgroupPlugin=autodetect" >"$folder/cgroup.conf"
  for ((i = 1; i <= nodes; ++i)); do
    mkdir -p "$folder/spool.node$i"
    echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=4 RealMemory=4000 State=UNKNOWN"
  done >>"$folder/slurm.conf"
  echo "PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES" >>"$folder/slurm.conf"
  export SLURM_CONF=$folder/slurm.conf
  /usr/sbin/slurmctld -f "$SLURM_CONF" </dev/null >"$folder/log/started" 2>&1
  for ((i = 1; i <= nodes; ++i)); do /usr/sbin/slurmd -f "$SLURM_CONF" -N "node$i" </dev/null >>"$folder/log/started" 2>&1; done
  for ((i = 0; i < 60; ++i)); do
    [[ $(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l) == "$nodes" ]] && return
    sleep 0.5
  done
  sinfo -N -l >&2
  tail -n 5 "$folder"/log/* >&2
  return 1
}

down() {
  local file
  for file in "$1"/slurmd.*.pid "$1"/slurmctld.pid "$1"/munge/pid; do
    [[ ! -f $file ]] || kill "$(cat "$file")" 2>/dev/null || true
  done
}

"$@"
