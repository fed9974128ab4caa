# shellcheck shell=bash
# Functions that the templates share. They find this file in their own folder, or in the folder that SDG_SLURM names.
#
#   SDG           how to run sdg, if not by the checkout's sdg.py or an installed `sdg`: "/env/bin/python /code/sdg.py"
#   SDG_REQUEUES  maximum number of requeues of a job [20]
#   SDG_EARLY     seconds within which an error is taken for an error in the options, and the job is not requeued [600]
#   SDG_SCRATCH   folder on each node's local disk [$SLURM_TMPDIR, $TMPDIR or /tmp]

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -n ${SDG:-} ]]; then
    read -ra sdg <<<"$SDG"
elif [[ -f ${here%/*}/sdg.py ]]; then
    sdg=(python3 "${here%/*}/sdg.py")
else
    sdg=(sdg)
fi
container=() # options of srun; see generate.sbatch
status=0     # exit status of the command that `run` has run

# Models (HF_HOME) and compiled graphs (~/.cache) are in shared caches: one process fills them, the others wait for its
# lock. Caches without locks are on the node's local disk, in a folder for each job.
set_caches() {
    scratch=${SDG_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}/sdg-$SLURM_JOB_ID
    export HF_XET_CACHE=${HF_XET_CACHE:-$scratch/xet} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$scratch/cuda}
    trap clear_caches EXIT
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
    trap 'interrupted=1; $to_process' TERM
    trap 'interrupted=1; kill -USR1 $process' USR1
    while ((interrupted)); do # a signal ends `wait` as well
        interrupted=0
        status=0
        wait "$process" || status=$?
    done
    trap - USR1 TERM
}

# Run one rank on the job's nodes, with a process on each, and exit with its status. The job is requeued if another
# attempt may succeed: after an interruption, a kill, the loss of a node, or an error after SDG_EARLY seconds.
run_rank() {
    local word began=$SECONDS
    for word; do
        if [[ $word == --fresh ]]; then
            echo "sdg: --fresh would start over at every requeue: delete the output and its state by hand instead" >&2
            exit 2
        fi
    done
    set_caches
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then # srun does not inherit it from sbatch
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
    local step=(srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
    step+=(--kill-on-bad-exit=1 --cpu-bind=none)
    ((SLURM_NNODES == 1)) || step+=(--label)
    run "${step[@]}" ${container[@]+"${container[@]}"} "${sdg[@]}" "$@"
    case $status in
    0 | 2 | 3 | 4 | 130) ;; # success, invalid options, too many failures, a budget is used up, Ctrl-C
    1) if ((SECONDS - began >= ${SDG_EARLY:-600})) || ! nodes_answer; then requeue; fi ;;
    *) requeue ;;
    esac
    exit "$status"
}

nodes_answer() {
    ((SLURM_NNODES == 1)) ||
        timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true
}

# Requeue this job, unless Slurm is ending it (scancel, or a preemption that requeues it anyway).
requeue() {
    local times=${SLURM_RESTART_COUNT:-0} job=$SLURM_JOB_ID state
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then # the SLURM_JOB_ID of one task is that of the whole array
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    state=$(patiently squeue --noheader --jobs="$job" --format=%T) || state=RUNNING # the likely state
    if [[ $state != RUNNING ]]; then
        echo "sdg: not requeued: Slurm reports the job as ${state:-gone}" >&2
    elif ((times >= ${SDG_REQUEUES:-20})); then
        echo "sdg: not requeued: the limit of ${SDG_REQUEUES:-20} requeues is reached (SDG_REQUEUES); submit it again to resume" >&2
    else
        echo "sdg: exited with status $status: requeueing the job ($((times + 1)) of at most ${SDG_REQUEUES:-20})" >&2
        patiently scontrol requeue "$job"
    fi
}

patiently() { # retries, because Slurm's controller may be unavailable for a moment
    local attempt
    for attempt in 1 2 3; do
        timeout 60 "$@" && return
        ((attempt == 3)) || sleep 10
    done
    return 1
}
