#!/bin/bash
# Submit a run with its monitor and its card: check the options, submit three jobs, and print how to follow them.
#
#   slurm/submit.sh [OPTIONS] [FLAGS OF SBATCH] -- OPTIONS OF sdg.py
#   slurm/submit.sh --ranks 16 --at-once 4 --gpus-per-node=8 --time=12:00:00 --partition=gpu --beside '--partition=cpu' -- \
#       --input /shared/docs --output /shared/out --server vllm --model Qwen/Qwen3-32B --tp 8
#   slurm/submit.sh --ranks 16 --array 3,7 … -- …      # rerun two ranks with the same options
#   slurm/submit.sh --nodes 2 --gpus-per-node=8 … -- … --tp 8 --pp 2        # a model on two nodes
#
#   --ranks N       number of ranks that share the input, the --world-size [1]
#   --at-once M     maximum number of ranks that run at a time [all]
#   --array LIST    submit only these ranks [all]
#   --nodes N       nodes per rank [1]; uses multinode.sbatch if N is more than 1, otherwise generate.sbatch
#   --beside FLAGS  flags of sbatch for the monitor and card jobs, as one word; SBATCH_ACCOUNT etc. apply to all jobs
#   --monitor OPTS  options of `sdg.py monitor`, as one word, such as '--interval 60'
#   --dry-run       check the options and print the commands, but submit nothing
set -euo pipefail

fail() {
    echo "submit.sh: $1" >&2
    exit 2
}

# Parse the options.
ranks=1 at_once='' array='' nodes=1 beside=() monitor=() dry_run=0 flags=()
while (($#)) && [[ $1 != -- ]]; do
    case $1 in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --*=*) name=${1%%=*} value=${1#*=} width=1 ;;
    *) name=$1 value=${2:-} width=2 ;;
    esac
    case $name in
    --ranks) ranks=$value ;;
    --at-once) at_once=$value ;;
    --array) array=$value ;;
    --nodes | -N) nodes=$value ;;
    --beside) read -ra beside <<<"$value" ;;
    --monitor) read -ra monitor <<<"$value" ;;
    -a | -a?* | -N?*) fail "$1: use --array LIST or --nodes N" ;;
    *) flags+=("$1") width=1 ;; # its value may be the next word, which is added in the next round
    esac
    shift "$width" || fail "$name requires a value"
done
[[ ${1:-} == -- ]] || fail "-- is missing before the options of sdg.py; see --help"
shift
for number in "$ranks" "$nodes" "${at_once:-1}"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number: --ranks, --nodes and --at-once must be whole numbers of at least 1"
done
for word; do
    case $word in
    --rank | --world-size | --rank=* | --world-size=*) fail "${word%%=*} is set by --ranks: put --ranks N before the --" ;;
    --nodes | --nodes=*) fail "--nodes must be before the --" ;;
    esac
done
array=${array:-0-$((ranks - 1))}
[[ $array =~ ^[0-9]+(-[0-9]+)?(:[0-9]+)?(,[0-9]+(-[0-9]+)?(:[0-9]+)?)*$ ]] ||
    fail "--array $array: expected ranks such as 0-3,7; limit how many run at a time with --at-once M"
for number in ${array//[^0-9]/ }; do
    [[ $array == *[:%]* ]] || ((10#$number < ranks)) || fail "--array $array: ranks are numbered 0 to $((ranks - 1))"
done
options=("$@" --world-size "$ranks")
template=generate
((nodes == 1)) || template=multinode

export SDG_SLURM # for the jobs
SDG_SLURM=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/common.sh
source "$SDG_SLURM/common.sh"
# Configuration errors are reported at submission, not when the job starts.
across=()
((nodes == 1)) || across=(--nodes "$nodes")
checked=$("${sdg[@]}" check "${options[@]}" --rank 0 ${across[@]+"${across[@]}"})
field() { sed -n "s/^$1 //p" <<<"$checked"; }
if [[ $(field output-config | wc -l) -gt 1 ]]; then
    echo "submit.sh: each config needs its own monitor and card: submit one at a time, with --output-config NAME" >&2
    exit 2
fi
output=$(field output) state=$(field state-dir)
where=(--output "$output" --output-config "$(field output-config)" --state-dir "$state")
[[ $output != hf://* ]] || options+=(--no-publish) # the monitor publishes

exec 3>&1
submit() { # NAME ARGUMENTS-OF-SBATCH: prints the job's id
    local name=$1 number
    shift
    if ((dry_run)); then
        { printf 'sbatch --parsable' && printf ' %q' "$@" && echo; } >&3
        echo "$name"
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

((dry_run)) || mkdir -p "$state/logs"
logs=$state/logs
first=${array%%[-,:%]*}
job=$(submit RANKS --output="$logs/rank-%a-%A.log" --array="$array${at_once:+%$at_once}" --nodes="$nodes" \
    ${flags[@]+"${flags[@]}"} "$SDG_SLURM/$template.sbatch" "${options[@]}") || exit 1
watching=$(submit MONITOR --output="$logs/monitor-%j.log" --dependency="after:${job}_$first" \
    ${beside[@]+"${beside[@]}"} "$SDG_SLURM/monitor.sbatch" "${where[@]}" --job "$job" ${monitor[@]+"${monitor[@]}"}) || cancel "$job"
last=$(submit CARD --output="$logs/card-%j.log" --dependency="afterany:$job:$watching" \
    ${beside[@]+"${beside[@]}"} "$SDG_SLURM/card.sbatch" "${where[@]}") || cancel "$job" "$watching"
if ((dry_run)); then
    echo "submit.sh: nothing was submitted; RANKS and MONITOR stand for job ids, RANKS_$first for that of the first rank" >&2
    exit
fi

shell() { printf '%q ' "$@"; }
cat <<END
ranks    job $job, tasks $array of $ranks
monitor  job $watching
card     job $last, after both have ended
watch    $(shell "${sdg[@]}" status "${where[@]}")
logs     $logs
stop     scancel $job    # completed responses are kept; submit the same command again to resume
END
