# shellcheck shell=bash
# Functions that the templates share. They find this file in their own folder, or in the folder that SDG_SLURM names.
#
#   SDG           how to run sdg, if not by the checkout's sdg.py or an installed `sdg`: "/env/bin/python /code/sdg.py"
#   SDG_REQUEUES  maximum number of requeues of a job, whatever their reason [after interruptions no limit, otherwise
#                 until 3 attempts in a row have made no progress]
#   SDG_EARLY     seconds within which an error is taken for one that another attempt would meet, too [600]
#   SDG_ENV       script that sets up the environment (submit.sh --env)
#   SDG_CONTAINER image for the ranks: a .sif file with apptainer, otherwise pyxis (submit.sh --container)
#   SDG_MOUNTS    folders that the container sees, separated by commas (submit.sh --mounts)
#   SDG_WAIT      seconds that processes on other nodes have to end when one of them has [60]
#   SDG_SCRATCH   folder on each node's local disk [$SLURM_TMPDIR, $TMPDIR or /tmp]

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# Source the script that sets up the environment; those of virtual environments and modules use unset variables.
set_environment() {
    set +u
    # shellcheck source=/dev/null
    source "$SDG_ENV"
    set -u
}
[[ -z ${SDG_ENV:-} ]] || set_environment
if [[ -n ${SDG:-} ]]; then
    read -ra sdg <<<"$SDG"
elif [[ -f ${here%/*}/sdg.py ]]; then
    sdg=(python3 "${here%/*}/sdg.py")
else
    sdg=(sdg)
fi
container=() # options of srun; see generate.sbatch
status=0     # exit status of the command that `run` has run
signaled=0   # Slurm has sent a signal to this script
job=${SLURM_JOB_ID:-} # submit.sh has none
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then # the SLURM_JOB_ID of one task is that of the whole array
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# Models (HF_HOME) and compiled graphs (~/.cache) are in shared caches: one process fills them, the others wait for its
# lock. Caches without locks are on the node's local disk, in a folder for each job.
set_caches() {
    scratch=${SDG_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}/sdg-$SLURM_JOB_ID
    export HF_XET_CACHE=${HF_XET_CACHE:-$scratch/xet} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$scratch/cuda}
    trap clear_caches EXIT
}

set_container() {
    if [[ ${SDG_CONTAINER:-} == *.sif ]]; then
        sdg=(apptainer exec --nv --bind "$SDG_MOUNTS" "$SDG_CONTAINER" "${sdg[@]}")
    elif [[ -n ${SDG_CONTAINER:-} ]]; then
        container=(--container-image="$SDG_CONTAINER" --container-mounts="$SDG_MOUNTS")
    fi
}

clear_caches() {
    if ((SLURM_NNODES > 1)); then
        timeout 20 srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_NNODES" rm -rf "$scratch" || true
    else
        rm -rf "$scratch"
    fi
}

# Run a command until it ends, and set `status`. SIGUSR1 and SIGTERM are passed on as SIGUSR1, which srun sends to all
# tasks: the engine saves completed responses and exits with 143. SIGTERM is not passed on to srun: Slurm itself sends it
# to the tasks, and at a second signal the engine does not wait for requests in flight.
run() {
    local interrupted=1 to_process=:
    "$@" &
    local process=$!
    [[ $1 == srun ]] || to_process="kill -USR1 $process"
    trap 'interrupted=1 signaled=1; $to_process' TERM
    trap 'interrupted=1 signaled=1; kill -USR1 $process' USR1
    while ((interrupted)); do # a signal ends `wait` as well
        interrupted=0
        status=0
        wait "$process" || status=$?
    done
    trap - USR1 TERM
}

# Run one rank on the job's nodes, with a process on each, and exit with the engine's status. The job is requeued if
# another attempt may succeed, according to what the engine has recorded of its end.
run_rank() {
    local word began=$SECONDS sliced=0
    for word; do
        [[ $word != --world-size* && $word != --config* ]] || sliced=1
        if [[ $word == --fresh ]]; then
            echo "sdg: --fresh would start over at every requeue: delete the output and its state by hand instead" >&2
            exit 2
        fi
    done
    if ((!sliced && (${SLURM_ARRAY_TASK_ID:-0} > 0 || ${SLURM_ARRAY_TASK_COUNT:-1} > 1))); then
        echo "sdg: --world-size N is missing: the number of all ranks, even if this array has only some of them" >&2
        exit 2
    fi
    set_caches
    set_container
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then # srun does not inherit it from sbatch
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
    local step=(srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
    step+=(--kill-on-bad-exit=1 --cpu-bind=none)
    ((SLURM_NNODES == 1)) || step+=(--label --wait="${SDG_WAIT:-60}")
    run "${step[@]}" ${container[@]+"${container[@]}"} "${sdg[@]}" "$@"
    ((status == 0)) || judge "$((SECONDS - began))" "$@"
    exit "$status"
}

# After an attempt: set `status` to that of the engine, and requeue the job if another attempt may succeed. The status of
# srun says too little: it is the highest of all tasks, and 1 if any process was killed for memory.
judge() { # SECONDS OPTIONS-OF-sdg.py
    local seconds=$1 verdict='' code='' avoid='' once=(timeout 120)
    shift
    is_running || return 0
    if ((${#container[@]})); then
        once+=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "${container[@]}")
    fi
    local words=(ended --status "$status" --seconds "$seconds")
    ((!signaled)) || words+=(--signaled)
    read -r verdict code avoid < <("${once[@]}" "${sdg[@]}" "${words[@]}" "$@") || true
    case $verdict in
    stop) status=$code ;;
    requeue) status=$code && requeue "$avoid" ;;
    *) # sdg does not run here
        if ((${SLURM_RESTART_COUNT:-0} < ${SDG_REQUEUES:-2})); then
            echo "sdg: exit status $status, and \`sdg ended\` fails on $SLURMD_NODENAME: trying another node" >&2
            requeue "$SLURMD_NODENAME"
        else
            echo "sdg: not requeued: exit status $status, and \`sdg ended\` fails on $SLURMD_NODENAME, too" >&2
        fi
        ;;
    esac
}

# False if Slurm is ending this job (scancel, or a preemption that requeues it anyway).
is_running() {
    local state
    state=$(patiently squeue --noheader --jobs="$job" --format=%T) || state=RUNNING # the likely state
    [[ $state == RUNNING ]] || {
        echo "sdg: not requeued: Slurm reports the job as ${state:-gone}" >&2
        return 1
    }
}

# Requeue this job, on other nodes than one if the partition has enough of them.
requeue() { # [NODE-TO-AVOID]
    local excluded=''
    [[ -z ${1:-} ]] || excluded=$(exclusion "$1") || excluded=''
    trap '' TERM # the requeue ends this script, but the list of excluded nodes can be changed only after it
    patiently scontrol requeue "$job"
    [[ -z $excluded ]] || patiently scontrol update JobId="$job" ExcNodeList="$excluded"
}

# Print the job's excluded nodes with one more; nothing if too few nodes would be left.
exclusion() { # NODE
    local listed nodes others
    listed=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    nodes=$( ([[ $listed == '(null)' ]] || scontrol show hostnames "$listed") && echo "$1")
    others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,alloc,mixed,completing --format=%N |
        sort -u | grep -vxFc "$nodes")
    ((others >= SLURM_NNODES)) || return 1
    paste -sd, <<<"$nodes"
}

patiently() { # retries, because Slurm's controller may be unavailable for a moment
    local attempt
    for attempt in 1 2 3; do
        timeout 60 "$@" && return
        ((attempt == 3)) || sleep 10
    done
    return 1
}
