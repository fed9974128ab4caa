#!/bin/bash
# Submit a run with its monitor and its card: check the options, submit three jobs, and print how to follow them.
#
#   slurm/submit.sh [OPTIONS] [FLAGS OF SBATCH] -- OPTIONS OF sdg.py
#   slurm/submit.sh --ranks 16 --at-once 4 --gpus-per-node=8 --time=12:00:00 --partition=gpu --beside '--partition=cpu' -- \
#       --input /shared/docs --output /shared/out --server vllm --model Qwen/Qwen3-32B --tp 8
#   slurm/submit.sh --cluster cluster.toml --ranks 16 -- …           # account, partition, GPUs, environment from a file
#   slurm/submit.sh --ranks 16 --array 3,7 … -- …      # rerun two ranks with the same options
#   slurm/submit.sh --nodes 2 --gpus-per-node=8 … -- … --tp 8 --pp 2        # a model on two nodes
#   sbatch --dependency=afterok:$(slurm/submit.sh --parsable … -- …) train.sbatch       # train when all rows are there
#
#   --ranks N          number of ranks that share the input, the --world-size [1]
#   --at-once M        maximum number of ranks that run at a time [all]
#   --workers M        M jobs that take the ranks one after the other, instead of one job a rank; submit more at any time
#   --array LIST       submit only these ranks [all that have not finished]
#   --nodes N          nodes per rank [1]; uses multinode.sbatch if N is more than 1, otherwise generate.sbatch
#   --name NAME        name of the jobs: NAME, NAME-monitor, NAME-card [sdg]
#   --env FILE         script that sets up the environment: sourced here and on the nodes
#   --container IMAGE  run the ranks in a container: a .sif file with apptainer, any other image with pyxis
#   --mounts A,B       folders that the container sees [the working folder, code, output and state]
#   --cluster FILE     TOML file with these and sbatch's flags, for a cluster; the command line wins
#   --beside FLAGS     flags of sbatch for the monitor and card jobs, as one word; SBATCH_ACCOUNT etc. apply to all jobs,
#                      and so do --account, --mail-type, --mail-user, --comment and --wckey
#   --monitor OPTS     options of `sdg.py monitor`, as one word, such as '--interval 60'
#   --parsable         print only the id of the card's job, which succeeds if every document is accounted for
#   --dry-run          check the options and print the commands, but submit nothing
set -euo pipefail

fail() {
    echo "submit.sh: $*" >&2
    exit 2
}

# Parse the options.
words=("$@") # as they were given, for `status`
ranks=1 at_once='' array='' workers='' nodes=1 beside=() monitor=() dry_run=0 parsable=0 flags=() common=()
name='' environment='' image='' mounts='' cluster=''
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --parsable) parsable=1 && shift && continue ;;
    --*=*) option=${1%%=*} value=${1#*=} width=1 ;;
    *) option=$1 value=${2:-} width=2 ;;
    esac
    case $option in
    --ranks) ranks=$value ;;
    --at-once) at_once=$value ;;
    --array) array=$value ;;
    --workers) workers=$value ;;
    --nodes | -N) nodes=$value ;;
    --name | --job-name | -J) name=$value ;;
    --env) environment=$value ;;
    --container) image=$value ;;
    --mounts) mounts=$value ;;
    --cluster) cluster=$value ;;
    --account | --mail-type | --mail-user | --comment | --wckey) common+=("$option=$value") ;;
    -A) common+=("--account=$value") ;;
    --beside) read -ra beside <<<"$value" ;;
    --monitor) read -ra monitor <<<"$value" ;;
    -a | -a?* | -N?*) fail "$1: use --array LIST or --nodes N" ;;
    *) flags+=("$1") width=1 ;; # its value may be the next word, which is added in the next round
    esac
    shift "$width" || fail "$option requires a value"
done
[[ ${1:-} == -- ]] || fail "-- is missing before the options of sdg.py; see --help"
shift
for number in "$ranks" "$nodes" "${at_once:-1}" "${workers:-1}"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] ||
        fail "$number: --ranks, --nodes, --at-once and --workers must be whole numbers of at least 1"
done
[[ -z $workers || -z $array$at_once ]] || fail "--workers takes whichever rank is free: leave out --array and --at-once"
[[ -z $workers || $nodes == 1 ]] || fail "--workers takes ranks of one node: leave out --nodes"
for word; do
    case $word in
    --rank | --world-size | --rank=* | --world-size=*) fail "${word%%=*} is set by --ranks: put --ranks N before the --" ;;
    --nodes | --nodes=*) fail "--nodes must be before the --" ;;
    --preview | --preview=*) fail "--preview shows documents on the terminal: run it here, with sdg.py itself" ;;
    esac
done
if [[ -n $array ]]; then
    [[ $array =~ ^[0-9]+(-[0-9]+)?(:[0-9]+)?(,[0-9]+(-[0-9]+)?(:[0-9]+)?)*$ ]] ||
        fail "--array $array: expected ranks such as 0-3,7; limit how many run at a time with --at-once M"
    for range in ${array//,/ }; do
        range=${range%:*}
        ((10#${range%-*} <= 10#${range#*-} && 10#${range#*-} < ranks)) ||
            fail "--array $array: ranks are numbered 0 to $((ranks - 1))"
    done
fi

export SDG_SLURM SDG_ENV=${SDG_ENV:-} SDG_CONTAINER=${SDG_CONTAINER:-} SDG_MOUNTS=${SDG_MOUNTS:-} # for the jobs
SDG_SLURM=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
absolute() { # FILE OPTION: the path of a file that must exist
    [[ -f $1 ]] || fail "$2 $1: no such file"
    printf '%s/%s' "$(cd -- "$(dirname -- "$1")" && pwd)" "$(basename -- "$1")"
}
[[ -z $environment ]] || SDG_ENV=$(absolute "$environment" --env)
# shellcheck source=slurm/common.sh
source "$SDG_SLURM/common.sh"

# The file of the cluster comes first, so that sbatch takes the flags of the command line.
if [[ -n $cluster ]]; then
    settings=$(mktemp) && trap 'rm -f "$settings"' EXIT
    "${sdg[@]}" slurm --cluster "$cluster" >"$settings"
    cluster_flags=() cluster_beside=() cluster_mounts=''
    while IFS= read -rd '' kind && IFS= read -rd '' value; do
        case $kind in
        env) [[ -n $environment ]] || { SDG_ENV=$(absolute "$value" "env in $cluster:") && set_environment; } ;;
        container) image=${image:-$value} ;;
        mounts) cluster_mounts+=${cluster_mounts:+,}$value ;;
        ranks) cluster_flags+=("$value") ;;
        beside) cluster_beside+=("$value") ;;
        esac
    done <"$settings"
    mounts=${mounts:-$cluster_mounts}
    flags=(${cluster_flags[@]+"${cluster_flags[@]}"} ${flags[@]+"${flags[@]}"})
    beside=(${cluster_beside[@]+"${cluster_beside[@]}"} ${beside[@]+"${beside[@]}"})
fi
flags=(--job-name="${name:-sdg}" ${flags[@]+"${flags[@]}"} ${common[@]+"${common[@]}"})
beside=(${common[@]+"${common[@]}"} ${beside[@]+"${beside[@]}"})

# Configuration errors are reported at submission, not when the job starts.
options=("$@" --world-size "$ranks")
template=generate
((nodes == 1)) || template=multinode
across=()
((nodes == 1)) || across=(--nodes "$nodes")
checked=$("${sdg[@]}" check "${options[@]}" --rank 0 ${across[@]+"${across[@]}"})
field() { sed -n "s/^$1 //p" <<<"$checked"; }
if [[ $(field output-config | wc -l) -gt 1 ]]; then
    fail "each config and each step needs its own monitor and card: submit one at a time, with --output-config NAME"
fi
output=$(field output) state=$(field state-dir) unfinished=$(field open-ranks)
where=(--output "$output" --output-config "$(field output-config)" --state-dir "$state")
[[ $output != hf://* ]] || options+=(--no-publish) # the monitor publishes
if [[ -z $array && $unfinished == none ]]; then
    echo "submit.sh: all ranks have finished: nothing to submit" >&2
    exit
fi
[[ -n $array$workers || $unfinished == "0-$((ranks - 1))" || $ranks == 1 ]] ||
    echo "submit.sh: the other ranks have finished: submitting $unfinished" >&2
array=${array:-$unfinished}
tasks=$ranks of="tasks $array of $ranks"
if [[ -n $workers ]]; then
    array=0-$((workers - 1)) tasks=$workers of="$workers workers for $ranks ranks"
    export SDG_RANK=any # for the jobs
fi

# What Slurm would refuse, or what would go wrong only on the nodes
inherited() { # VALUE NAME: jobs have the variables above
    [[ ,$1, == *,ALL,* ]] || fail "$2=$1: jobs take their settings from the environment of submit.sh: add ALL to it"
}
[[ -z ${SBATCH_EXPORT:-} ]] || inherited "$SBATCH_EXPORT" SBATCH_EXPORT
given='' flag='' # GPUs of a node, as far as a flag gives them; unknown if they are of several types
number='([^:,]+:)?([1-9][0-9]*)' # perhaps with a type
for word in ${flags[@]+"${flags[@]}"}; do
    [[ $word != --*=* ]] || { flag=${word%%=*} && word=${word#*=}; }
    case $flag in
    --export) inherited "$word" "$flag" ;;
    --gpus-per-node | --gpus | -G)
        given=''
        [[ ! $word =~ ^$number$ ]] || given=${BASH_REMATCH[2]}
        [[ $flag == --gpus-per-node || -z $given ]] || given=$((given / nodes))
        ;;
    --gres)
        if [[ $word == *gpu*gpu* ]]; then
            given=''
        elif [[ $word =~ (^|,)gpu(:$number)?(,|$) ]]; then
            given=${BASH_REMATCH[4]:-1}
        fi
        ;;
    esac
    flag=$word
done
needed=$(field gpus)
if [[ $given =~ ^[0-9]+$ && -n $needed ]]; then
    ((needed <= given)) || fail "the servers need $needed GPUs on each node (--tp × --pp × --dp × --replicas), but $given" \
        "are asked for: ask for more, or lower one of them"
    ((needed == given)) || echo "submit.sh: the servers take $needed of $given GPUs on each node: raise --replicas" >&2
fi
largest=$(timeout 20 scontrol show config 2>/dev/null | sed -n 's/^MaxArraySize *= *//p') || largest=''
if [[ $largest =~ ^[0-9]+$ ]] && ((tasks > largest)); then
    fail "--ranks $ranks: arrays of this cluster have at most $largest tasks (MaxArraySize): use --workers M, or fewer ranks"
fi
for folder in "$state" ${output:+"$output"}; do
    [[ $folder == /* ]] || continue
    existing=$folder
    while [[ ! -e $existing ]]; do existing=$(dirname -- "$existing"); done
    case $existing in
    /tmp | /tmp/* | /var/tmp | /var/tmp/* | /dev/shm | /dev/shm/*)
        echo "submit.sh: $folder is probably on this machine's own disk: the nodes must share it; otherwise choose" \
            "another --output, or --state-dir for the state" >&2
        ;;
    esac
done
if ((!dry_run)); then
    mkdir -p "$state/logs"
    locked=0
    ! command -v flock >/dev/null || flock --nonblock --conflict-exit-code 75 "$state/.submit.lock" true || locked=$?
    rm -f "$state/.submit.lock"
    if ((locked && locked != 75)); then
        fail "$state is on a file system without locks, which keep two processes from one rank: choose another --state-dir"
    fi
fi
if [[ -n $image ]]; then
    SDG_CONTAINER=$image SDG_MOUNTS=${mounts:-$PWD,$(dirname -- "$SDG_SLURM"),$state}
    [[ -n $mounts || $output != /* ]] || SDG_MOUNTS+=,$output
    [[ $image != *.sif ]] || SDG_CONTAINER=$(absolute "$image" --container)
fi

exec 3>&1
submit() { # NAME ARGUMENTS-OF-SBATCH: prints the job's id
    local placeholder=$1 number
    shift
    if ((dry_run)); then
        { printf 'sbatch --parsable' && printf ' %q' "$@" && echo; } >&3
        echo "$placeholder"
        return
    fi
    number=$(sbatch --parsable "$@") || return
    echo "${number%%;*}"
}

cancel() { # jobs that are already submitted: without the others the run would be incomplete
    scancel "$@"
    echo "submit.sh: canceled job $*, because the rest of the run could not be submitted" >&2
    exit 1
}

logs=$state/logs
escaped=${logs//%/%%} # in sbatch's --output, % begins a placeholder
first=${array%%[-,:%]*}
job=$(submit RANKS --output="$escaped/rank-%a-%A.log" --array="$array${at_once:+%$at_once}" --nodes="$nodes" \
    "${flags[@]}" "$SDG_SLURM/$template.sbatch" "${options[@]}") || exit 1
watching=$(submit MONITOR --output="$escaped/monitor-%j.log" --job-name="${name:-sdg}-monitor" \
    --dependency="after:${job}_$first" ${beside[@]+"${beside[@]}"} \
    "$SDG_SLURM/monitor.sbatch" "${where[@]}" --job "$job" ${monitor[@]+"${monitor[@]}"}) || cancel "$job"
last=$(submit CARD --output="$escaped/card-%j.log" --job-name="${name:-sdg}-card" \
    --dependency="afterany:$job:$watching" ${beside[@]+"${beside[@]}"} \
    "$SDG_SLURM/card.sbatch" "${where[@]}") || cancel "$job" "$watching"
if ((dry_run)); then
    for variable in SDG_ENV SDG_CONTAINER SDG_MOUNTS; do
        [[ -z ${!variable} ]] || echo "submit.sh: the jobs have $variable=${!variable} in their environment" >&2
    done
    echo "submit.sh: nothing was submitted; RANKS and MONITOR stand for job ids, RANKS_$first for that of the first rank" >&2
    exit
fi
# For `status`, which prints the command that submits some ranks again
printf '%s\0' "$job" "$PWD" "$SDG_SLURM/submit.sh" "${words[@]}" >"$state/submission"

shell() { printf '%q ' "$@"; }
((!parsable)) || { echo "$last" && exec 1>&2; }
cat <<END
ranks    job $job, $of
monitor  job $watching
card     job $last, after both have ended
watch    $(shell "${sdg[@]}" status "${where[@]}")
logs     $logs
then     sbatch --dependency=afterok:$last …    # when every document is accounted for
stop     scancel $job    # completed responses are kept; submit the same command again to resume
END
