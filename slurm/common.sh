# shellcheck shell=bash
# What the templates share; they look for it beside them, or in the folder that SDG_SLURM names.
#
#   SDG           the program, if it is neither the checkout's sdg.py nor an installed `sdg`: "/env/bin/python /code/sdg.py"
#   SDG_REQUEUES  how often a job may be requeued [20]
#   SDG_EARLY     s within which an error counts as one of the options, which comes again and again [600]
#   SDG_SCRATCH   a folder on each node's own disk [$SLURM_TMPDIR, $TMPDIR or /tmp]

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ -n ${SDG:-} ]]; then
    read -ra sdg <<<"$SDG"
elif [[ -f ${here%/*}/sdg.py ]]; then
    sdg=(python3 "${here%/*}/sdg.py")
else
    sdg=(sdg)
fi
container=() # options of srun; see generate.sbatch
status=0     # of what `run` has run

# Models (HF_HOME) and what servers compile (~/.cache) are shared: there one works, and the others wait for its lock.
# What is written without locks lies on the node's own disk, apart for each job.
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

# Run a command to its end, and set `status`. A signal to this script is passed on as SIGUSR1, which srun hands to all
# tasks: the engine stores what is answered, and ends with 143. SIGTERM Slurm sends to the tasks of srun by itself, and
# the engine would take a second signal for impatience.
run() {
    local interrupted=1 to_process=:
    "$@" &
    local process=$!
    [[ $1 == srun ]] || to_process="kill -USR1 $process"
    trap 'interrupted=1; $to_process' TERM
    trap 'interrupted=1; kill -USR1 $process' USR1
    while ((interrupted)); do # `wait` ends at a signal, too
        interrupted=0
        status=0
        wait "$process" || status=$?
    done
    trap - USR1 TERM
}

# Run one rank on the job's nodes, a process on each, and end the script as the rank did. It is requeued where another
# attempt may end better: after an interruption, a kill, the loss of a node, or an error after long work.
run_rank() {
    local word began=$SECONDS
    for word; do
        if [[ $word == --fresh ]]; then
            echo "sdg: --fresh would start over with every requeue: delete the output and its state by hand" >&2
            exit 2
        fi
    done
    set_caches
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then # srun does not take it over from sbatch
        export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    fi
    local step=(srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
    step+=(--kill-on-bad-exit=1 --cpu-bind=none)
    ((SLURM_NNODES == 1)) || step+=(--label)
    run "${step[@]}" ${container[@]+"${container[@]}"} "${sdg[@]}" "$@"
    case $status in
    0 | 2 | 3 | 130) ;; # done; options; too many failures; Ctrl-C
    1) if ((SECONDS - began >= ${SDG_EARLY:-600})) || ! nodes_answer; then requeue; fi ;;
    *) requeue ;;
    esac
    exit "$status"
}

nodes_answer() {
    ((SLURM_NNODES == 1)) ||
        timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 true
}

# Have Slurm run this job again, unless it ends the job itself (scancel, a preemption that requeues).
requeue() {
    local times=${SLURM_RESTART_COUNT:-0} job=$SLURM_JOB_ID state
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then # one task's own number is that of the whole array
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    state=$(patiently squeue --noheader --jobs="$job" --format=%T) || state=RUNNING # as far as we know
    if [[ $state != RUNNING ]]; then
        echo "sdg: not requeued from here: Slurm says that the job is ${state:-gone}" >&2
    elif ((times >= ${SDG_REQUEUES:-20})); then
        echo "sdg: not requeued: that was done $times times (SDG_REQUEUES); submit it again to go on" >&2
    else
        echo "sdg: ended with status $status, requeued for the $((times + 1)). time" >&2
        patiently scontrol requeue "$job"
    fi
}

patiently() { # Slurm's controller may be away for a moment
    local attempt
    for attempt in 1 2 3; do
        timeout 60 "$@" && return
        ((attempt == 3)) || sleep 10
    done
    return 1
}
