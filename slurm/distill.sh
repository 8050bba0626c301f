#!/usr/bin/env bash
#SBATCH --job-name=exit-heads
#SBATCH --time=00:15:00
#SBATCH --output=exit-heads-%j.log
#
# The whole pipeline as Slurm jobs, each behind the one before: generate (an array), cache (an array, for
# distill.teacher=cached), distill (over nodes), evaluate, publish. docs/cluster.md says more.
#
#   sbatch slurm/distill.sh --config configs/pocket.yaml key=value ...   a small job submits the others
#   bash   slurm/distill.sh --config configs/pocket.yaml key=value ...   submits them from here; without Slurm, runs all
#                                                                        stages here, one after the other
#     --dry-run   print what would be done     --local   run here even where there is Slurm
#
# The same command again goes on with what is missing. A knob that is set in the environment wins over its default here:
#   EH_NODES=4 EH_GPUS=8 EH_DISTILL_MEM=0 sbatch slurm/distill.sh --config ...
# What is marked "stage" can be set for one stage alone, as EH_<STAGE>_<KNOB>. Partition, account, QOS, reservation and
# the number of nodes may also be given to sbatch itself: sbatch -p gpu -A me -N 4 slurm/distill.sh --config ...

# ---- a node made ready
: "${EH_SETUP="[ ! -f .venv/bin/activate ] || source .venv/bin/activate"}" # or "module load cuda; source ~/env/bin/activate"
: "${EH_RUN=}"           # in front of exit-heads, such as "apptainer exec --nv --bind /data exit-heads.sif"
: "${EH_SRUN=}"          # flags of every srun, such as "--container-image=exit-heads.sqsh --container-mounts=/data"
# ---- how much of what
: "${EH_ARRAY=1}"        # tasks that share generate, and cache; 16%4: of 16 no more than 4 at once
: "${EH_NODES=}"         # of distill; default: machine.nodes of the config
: "${EH_GPUS=}"          # of each node of distill, such as 8 or h100:8; each gets a process. Default: no GPUs
one_gpu=${EH_GPUS:+${EH_GPUS%"${EH_GPUS##*:}"}1}
: "${EH_GENERATE_GPUS=$one_gpu}" # of each task; more with machine.device_map=auto: exit-heads plan says how many
: "${EH_EVALUATE_GPUS=$one_gpu}" # likewise
: "${EH_CACHE_GPUS=$EH_EVALUATE_GPUS}" # of each task
: "${EH_PUBLISH_GPUS=$EH_EVALUATE_GPUS}" # it tries the folder on the backbone
: "${EH_PROCESSES=}"     # of each node of distill; default: one a GPU, without GPUs machine.processes_per_node
: "${EH_CPUS=4}"         # stage; of each process
: "${EH_MEM=}"           # stage; of each node, such as 200G, or 0 for all of it. Default: what the cluster gives
: "${EH_TIME=04:00:00}"  # stage; generate, cache and distill go on in a new start when it is over
: "${EH_SAVE=120}"       # seconds before that when they are told to save: more than a step and a checkpoint take
# ---- where, and as whom
: "${EH_PARTITION=${SLURM_JOB_PARTITION:-}}"     # stage
: "${EH_ACCOUNT=${SLURM_JOB_ACCOUNT:-}}"         # stage
: "${EH_QOS=${SLURM_JOB_QOS:-}}"                 # stage
: "${EH_RESERVATION=${SLURM_JOB_RESERVATION:-}}" # stage
: "${EH_SBATCH=}"        # stage; more flags of sbatch, such as "--exclude=n3 --mail-type=FAIL"
# ---- NCCL, for distill; docs/cluster.md names what else may be worth setting
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # its version, and what goes wrong
# ---- end of the knobs

set -euo pipefail

say() { printf 'slurm/distill.sh: %s\n' "$*" >&2; }

# Fills `words` with the words of a knob, read as a shell reads them.
split() { eval "words=($1)"; }

# knob STAGE NAME: EH_<STAGE>_<NAME> if that is set, else EH_<NAME>.
knob() {
    local own="EH_${1^^}_$2" all="EH_$2"
    printf '%s' "${!own-${!all-}}"
}

make_ready() {
    set +u # what others wrote may use variables that are not set
    eval "$EH_SETUP" || { say "EH_SETUP failed: $EH_SETUP"; exit 1; }
    set -u
}

exit_heads() {
    local words
    split "$EH_RUN"
    "${words[@]}" exit-heads "$@"
}

# ---- in the job of a stage

# What a later start goes on from: it differs iff the stage got any further.
progress() {
    find "$1" \( -name logs -o -name wandb -o -name claims \) -prune -o \
        -type f ! -name '.*' ! -name metrics.jsonl -printf '%p %s\n' | sort | cksum
}

# stuck FOLDER FILE: this job was stopped; whether it was so twice before at the very same place. FILE keeps the places.
# Starts that were cut short by a more urgent job are not counted: they say nothing of this one.
stuck() {
    local place
    place=$(progress "$1")
    echo "$place" >>"$2"
    [ "$(tail -n 3 "$2" | grep -cxF "$place")" = 3 ]
}

# Whether this job has to make room for another one. Slurm puts such a job back into the queue when its grace is over,
# but one whose processes have saved and ended before that would count as failed.
preempted() { scontrol show job -o "$1" | grep -q ' PreemptTime=[0-9]'; }

# stage NAME FOLDER WORDS...: with the resources of this job. It ends with 138 when USR1 before the time limit has stopped
# it, with 143 when TERM has, with 75 when another process vanished; then this very job starts again and goes on.
stage() {
    local name=$1 folder=$2 code=0 starts=$((${SLURM_RESTART_COUNT:-0} + 1)) flags job=$SLURM_JOB_ID words
    shift 2
    # Not the task's own id: that of the last task is the array's, and would start all of them again.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    say "$(date '+%F %T') $name: job $job, start $starts, on $SLURM_JOB_NODELIST"
    split "$EH_SRUN"
    # Rank 0 has so many seconds to write when the others have ended; and they wait no longer for one that never began.
    # Not --kill-on-bad-exit: of a stage that saved and ended, it would make one that was killed.
    flags=(--wait=600 --kill-on-bad-exit=0 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" "${words[@]}")
    [ "${SLURM_NTASKS:-1}" = 1 ] || flags+=(--label)
    split "$EH_RUN"
    export PYTHONUNBUFFERED=1 TQDM_MININTERVAL="${TQDM_MININTERVAL:-60}" # seconds: a log is no terminal
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} \
        srun "${flags[@]}" "${words[@]}" exit-heads "$name" "$@" || code=$?
    if { [ "$code" = 138 ] || [ "$code" = 75 ]; } && stuck "$folder" "$folder/logs/.$name-$job.places"; then
        say "$name was stopped at the same place three times, last with $code: is its time limit too short (138)," \
            "do its nodes die (75)?"
    elif [ "$code" = 138 ] || [ "$code" = 75 ] || { [ "$code" = 143 ] && preempted "$job"; }; then
        say "$(date '+%F %T') $name ended with $code; job $job starts again and goes on"
        scontrol requeue "$job" || say "job $job could not be put back into the queue"
    fi
    exit "$code"
}

# ---- where the jobs are submitted

# Fills `flags` with those of sbatch for a stage that has to wait for $2.
flags_of() {
    local name=$1 after=$2 log=${logs//%/%%} pair value words
    flags=("--job-name=$run_name-$name" --open-mode=append --requeue --kill-on-invalid-dep=yes)
    case $name in
    generate | cache)
        flags+=("--array=0-$((${EH_ARRAY%%%*} - 1))${EH_ARRAY#"${EH_ARRAY%%%*}"}" "--output=$log/$name-%A_%a.log")
        flags+=(--nodes=1 --ntasks-per-node=1 "--signal=USR1@$EH_SAVE")
        ;;
    distill)
        flags+=("--output=$log/$name-%j.log" "--nodes=$nodes" "--ntasks-per-node=$processes" "--signal=USR1@$EH_SAVE")
        ;;
    *) # begins anew when it is started again: being told before the end of its time would not help it
        flags+=("--output=$log/$name-%j.log" --nodes=1 --ntasks-per-node=1)
        ;;
    esac
    [ -z "$after" ] || flags+=("--dependency=$after")
    for pair in time=TIME cpus-per-task=CPUS mem=MEM gpus-per-node=GPUS partition=PARTITION account=ACCOUNT qos=QOS \
        reservation=RESERVATION; do
        value=$(knob "$name" "${pair#*=}")
        [ -z "$value" ] || flags+=("--${pair%=*}=$value")
    done
    split "$(knob "$name" SBATCH)"
    flags+=("${words[@]}")
}

submit() {
    local name after='' id flags ids=() lines=()
    for name in "${stages[@]}"; do
        # singleton: not beside a job of the same run and stage that is still in the queue
        case $name in distill | evaluate | publish) after+=,singleton ;; esac
        flags_of "$name" "$after"
        if [ -n "$dry" ]; then
            printf '%q ' sbatch "${flags[@]}" "$0" --stage "$name" "$folder" "${words[@]}"
            printf '\n'
            id="<job of $name>"
        elif ! id=$(sbatch --parsable "${flags[@]}" "$0" --stage "$name" "$folder" "${words[@]}"); then
            say "stage $name was refused: see the line of sbatch above; its flags were ${flags[*]}"
            [ ${#ids[@]} = 0 ] || { say "cancelling what waits before it: ${ids[*]}"; scancel "${ids[@]}"; }
            exit 1
        fi
        id=${id%%;*} # of several clusters: the id stands before the name of one
        ids+=("$id")
        lines+=("$(printf '%-8s %-9s %s' "$id" "$name" "$logs/$name-$id*.log")")
        after=afterok:$id
    done
    [ -z "$dry" ] || return 0
    printf '%s\n' "${lines[@]}" "watch   squeue --jobs=$(IFS=,; echo "${ids[*]}")     tail -F $logs/*.log" \
        "cancel  scancel ${ids[*]}"
}

run_here() {
    local name
    for name in "${stages[@]}"; do
        if [ -n "$dry" ]; then
            printf '%q ' exit-heads "$name" "${words[@]}"
            printf '\n'
        else
            exit_heads "$name" "${words[@]}" || { local code=$?; say "stage $name ended with $code"; exit $code; }
        fi
    done
}

main() {
    local dry='' here='' word words=() values run_name folder logs nodes gpus processes stages
    while [ $# -gt 0 ]; do
        case $1 in
        --dry-run) dry=1 ;;
        --local) here=1 ;;
        --config) words+=("$1" "${2:?--config needs a file}") && shift ;;
        -h | --help) sed -n '/^# The whole/,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
        --redo*) say "--redo: a job that starts again would do it again. Give another run.name, or --redo where no job" \
            "runs: exit-heads STAGE --redo STAGE" && exit 2 ;;
        -*) say "$1: no option of this script; flags of sbatch go before it, or into EH_SBATCH" && exit 2 ;;
        *) words+=("$1") ;;
        esac
        shift
    done
    # A mistake in the config is found here, not by a job that has waited for its turn.
    values=$(exit_heads run "${words[@]}" --show-config run.dir run.name machine.nodes machine.processes_per_node \
        machine.device distill.teacher) || exit $?
    mapfile -t values <<<"$values"
    run_name=${values[1]} folder=${values[0]}/${values[1]} logs=${values[0]}/${values[1]}/logs
    stages=(generate cache distill evaluate publish)
    [ "${values[5]}" = cached ] || stages=(generate distill evaluate publish)
    if [ -n "$here" ] || { [ -z "$dry" ] && ! command -v sbatch >/dev/null; }; then
        run_here
        return
    fi
    nodes=${EH_NODES:-${values[2]}}
    [ -n "$EH_NODES" ] || [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] || nodes=$SLURM_JOB_NUM_NODES
    gpus=$(knob distill GPUS)
    processes=${EH_PROCESSES:-${gpus##*:}}
    if [ -z "$processes" ] && [ "${values[3]}" -gt 1 ] && [ "${values[4]}" != cpu ]; then
        say "machine.processes_per_node=${values[3]}: a process for each GPU, and no GPUs are asked for. Set" \
            "EH_GPUS=${values[3]}, or give machine.device=cpu, or EH_PROCESSES where other flags ask for GPUs" && exit 2
    fi
    processes=${processes:-${values[3]}}
    words+=("machine.nodes=$nodes" "machine.processes_per_node=$processes")
    [ -n "$dry" ] || mkdir -p "$logs" # Slurm makes no folder for what a job prints
    # What describes the job that submits would be taken for a wish of those that are submitted.
    for word in $(compgen -e SLURM_); do [ "$word" = SLURM_CONF ] || unset "$word"; done
    submit
}

make_ready
if [ "${1:-}" = --stage ]; then
    shift
    stage "$@"
else
    main "$@"
fi
