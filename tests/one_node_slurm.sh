#!/bin/bash
# A SLURM cluster of one node for the tests: munged, slurmctld and slurmd as the current user, in a folder of their own.
#
#     apt-get install slurm-wlm munge
#     tests/one_node_slurm.sh start DIR [PORT]     # then: export SLURM_CONF=DIR/slurm.conf
#     tests/one_node_slurm.sh stop DIR
#
# Ports PORT and PORT+1, 16817 unless given. Two tasks at a time. No accounting, no cgroups, nothing outside DIR.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
action=$1 dir=$(readlink -f "$2") port=${3:-16817}

start() {
    mkdir -p "$dir"/{state,spool}
    chmod 755 "$dir"
    head -c 1024 /dev/urandom > "$dir/munge.key"
    chmod 600 "$dir/munge.key"
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    configure
    export SLURM_CONF=$dir/slurm.conf
    slurmctld -c > "$dir/slurmctld.out" 2>&1
    slurmd -N node0 > "$dir/slurmd.out" 2>&1
    for _ in $(seq 100); do
        [[ $(sinfo --noheader --format=%t 2> "$dir/sinfo.err") == idle ]] && return
        sleep 0.2
    done
    tail -n 5 "$dir"/*.log "$dir"/*.out "$dir/sinfo.err" >&2
    exit 1
}

configure() {
    cat > "$dir/slurm.conf" << EOF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=60
MinJobAge=300
SchedulerParameters=sched_interval=1,bf_interval=1
JobRequeue=1
NodeName=node0 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=node0 Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
EOF
}

stop() {
    export SLURM_CONF=$dir/slurm.conf
    scancel --user="$(id -un)" || true
    for _ in $(seq 100); do
        [[ -z $(squeue --noheader) ]] && break
        sleep 0.2
    done
    for name in slurmd slurmctld munged; do
        [[ -f $dir/$name.pid ]] && kill "$(cat "$dir/$name.pid")" || true
    done
}

"$action"
