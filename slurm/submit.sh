#!/bin/bash
# Submit a run with its monitor and its card: check the options, submit three jobs, say what to watch, go home.
#
#   slurm/submit.sh [OWN OPTIONS] [FLAGS OF SBATCH] -- OPTIONS OF sdg.py
#   slurm/submit.sh --ranks 16 --at-once 4 --gpus-per-node=8 --time=12:00:00 --partition=gpu --beside '--partition=cpu' -- \
#       --input /shared/docs --output /shared/out --server vllm --model Qwen/Qwen3-32B --tp 8
#   slurm/submit.sh --ranks 16 --array 3,7 … -- …      # two ranks again, with the same options
#   slurm/submit.sh --nodes 2 --gpus-per-node=8 … -- … --tp 8 --pp 2        # a model on two nodes
#
#   --ranks N       ranks that share the input [1]: --world-size
#   --at-once M     of them at a time [all]
#   --array LIST    only these ranks [all]
#   --nodes N       nodes of each rank [1]; more than one: multinode.sbatch, else generate.sbatch
#   --beside FLAGS  of sbatch for the jobs of monitor and card, in one word; SBATCH_ACCOUNT and the like go to all jobs
#   --monitor OPTS  of `sdg.py monitor`, in one word, such as '--interval 60'
#   --dry-run       check the options, and print the commands instead
set -euo pipefail

fail() {
    echo "submit.sh: $1" >&2
    exit 2
}

# What is to be submitted.
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
    -a | -a?* | -N?*) fail "$1: write --array LIST or --nodes N" ;;
    *) flags+=("$1") width=1 ;; # a flag's value may follow as the next word: that goes there, too
    esac
    shift "$width" || fail "$name needs a value"
done
[[ ${1:-} == -- ]] || fail "the options of sdg.py come after --; see --help"
shift
for number in "$ranks" "$nodes" "${at_once:-1}"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || fail "$number: a whole number is wanted for --ranks, --nodes and --at-once"
done
for word; do
    case $word in
    --rank | --world-size | --rank=* | --world-size=*) fail "${word%%=*} follows from --ranks, before the --" ;;
    --nodes | --nodes=*) fail "--nodes comes before the --" ;;
    esac
done
array=${array:-0-$((ranks - 1))}
[[ $array =~ ^[0-9]+(-[0-9]+)?(:[0-9]+)?(,[0-9]+(-[0-9]+)?(:[0-9]+)?)*$ ]] ||
    fail "--array $array: ranks such as 0-3,7 are wanted (and --at-once M for a limit)"
for number in ${array//[^0-9]/ }; do
    [[ $array == *[:%]* ]] || ((10#$number < ranks)) || fail "--array $array: ranks are numbered 0 to $((ranks - 1))"
done
options=("$@" --world-size "$ranks")
template=generate
((nodes == 1)) || template=multinode

export SDG_SLURM # to the jobs
SDG_SLURM=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=slurm/common.sh
source "$SDG_SLURM/common.sh"
# What sdg.py refuses is said now, not when the job begins.
across=()
((nodes == 1)) || across=(--nodes "$nodes")
checked=$("${sdg[@]}" check "${options[@]}" --rank 0 ${across[@]+"${across[@]}"})
field() { sed -n "s/^$1 //p" <<<"$checked"; }
if [[ $(field output-config | wc -l) -gt 1 ]]; then
    echo "submit.sh: each config has a monitor and a card of its own: submit one at a time, by --output-config NAME" >&2
    exit 2
fi
output=$(field output) state=$(field state-dir)
where=(--output "$output" --output-config "$(field output-config)" --state-dir "$state")
[[ $output != hf://* ]] || options+=(--no-publish) # that is what the monitor is for

exec 3>&1
submit() { # NAME, then words for sbatch; prints the job's number
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

cancel() { # what was submitted already: without the rest nobody would watch it
    scancel "$@"
    echo "submit.sh: job $* is cancelled again" >&2
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
    echo "submit.sh: nothing is submitted; RANKS and MONITOR stand for the ids of their jobs, RANKS_$first for that of the first rank" >&2
    exit
fi

shell() { printf '%q ' "$@"; }
cat <<END
ranks    job $job, tasks $array of $ranks
monitor  job $watching
card     job $last, when these have ended
watch    $(shell "${sdg[@]}" status "${where[@]}")
logs     $logs
stop     scancel $job    # what is answered is kept; submit the same again to go on
END
