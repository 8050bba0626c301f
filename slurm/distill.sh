#!/usr/bin/env bash
#SBATCH --job-name=exit-heads
#SBATCH --time=00:15:00
#SBATCH --output=exit-heads-%j.log
#
# The whole pipeline as Slurm jobs: generate (an array of jobs), cache (an array, only with distill.teacher=cached), pilot
# (only with distill.exit_layers=auto), distill (over several nodes), evaluate, publish. Each job waits for the one before
# it. docs/cluster.md says more.
#
#   sbatch slurm/distill.sh --config configs/pocket.yaml key=value ...   a small job submits the others
#   bash   slurm/distill.sh --config configs/pocket.yaml key=value ...   submits them from here; without Slurm, runs all
#                                                                        stages here, one after the other
#     --dry-run   prints what would be done     --local   runs the stages here even if there is Slurm
#
# The same command, given again, continues with what is missing. The environment overrides the defaults of the knobs:
#   EH_NODES=4 EH_GPUS=8 EH_DISTILL_MEM=0 sbatch slurm/distill.sh --config ...
# A knob that is marked "stage" can be set for one stage alone, as EH_<STAGE>_<KNOB>. Partition, account, QOS,
# reservation and the number of nodes can also be given to sbatch itself:
#   sbatch -p gpu -A me -N 4 slurm/distill.sh --config ...

# ---- how a node is prepared
: "${EH_SETUP="[ ! -f .venv/bin/activate ] || source .venv/bin/activate"}" # or "module load cuda; source ~/env/bin/activate"
: "${EH_RUN=}"           # is put in front of exit-heads, such as "apptainer exec --nv --bind /data exit-heads.sif"
: "${EH_SRUN=}"          # flags of every srun, such as "--container-image=exit-heads.sqsh --container-mounts=/data"
# ---- resources
: "${EH_ARRAY=1}"        # tasks that share the work of generate and of cache; 16%4 runs 16, at most 4 at once
: "${EH_NODES=}"         # nodes of distill; default: machine.nodes of the config
: "${EH_GPUS=}"          # GPUs per node of distill, such as 8 or h100:8; one process for each. Default: no GPUs
one_gpu=${EH_GPUS:+${EH_GPUS%"${EH_GPUS##*:}"}1}
: "${EH_GENERATE_GPUS=$one_gpu}" # GPUs per task; more with machine.device_map=auto: exit-heads plan says how many
: "${EH_EVALUATE_GPUS=$one_gpu}" # GPUs; likewise
: "${EH_CACHE_GPUS=$EH_EVALUATE_GPUS}" # GPUs per task
: "${EH_PILOT_GPUS=$EH_EVALUATE_GPUS}" # GPUs; only with distill.exit_layers=auto
: "${EH_PUBLISH_GPUS=$EH_EVALUATE_GPUS}" # publish needs GPUs too: it tries the folder on the backbone
: "${EH_PROCESSES=}"     # processes per node of distill; default: one per GPU, without GPUs machine.processes_per_node
: "${EH_CPUS=4}"         # stage; CPUs per process
: "${EH_MEM=}"           # stage; memory per node, such as 200G, or 0 for all of it. Default: the cluster's
: "${EH_TIME=04:00:00}"  # stage; time limit. generate, cache and distill continue in a new start when it is reached
: "${EH_SAVE=120}"       # seconds before the limit when they are told to save: more than a step and a checkpoint take
# ---- partition and account
: "${EH_PARTITION=${SLURM_JOB_PARTITION:-}}"     # stage
: "${EH_ACCOUNT=${SLURM_JOB_ACCOUNT:-}}"         # stage
: "${EH_QOS=${SLURM_JOB_QOS:-}}"                 # stage
: "${EH_RESERVATION=${SLURM_JOB_RESERVATION:-}}" # stage
: "${EH_SBATCH=}"        # stage; other flags of sbatch, such as "--exclude=n3 --mail-type=FAIL"
# ---- NCCL, for distill; docs/cluster.md lists other variables that may help
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # prints its version and its errors
# ---- end of the knobs

set -euo pipefail

say() { printf 'slurm/distill.sh: %s\n' "$*" >&2; }

# Splits a knob's value into the array `words`, as a shell would.
split() { eval "words=($1)"; }

# knob STAGE NAME prints EH_<STAGE>_<NAME> if that is set, otherwise EH_<NAME>.
knob() {
    local own="EH_${1^^}_$2" all="EH_$2"
    printf '%s' "${!own-${!all-}}"
}

make_ready() {
    set +u # activation scripts may use variables that are not set
    eval "$EH_SETUP" || { say "EH_SETUP failed: $EH_SETUP"; exit 1; }
    set -u
}

exit_heads() {
    local words
    split "$EH_RUN"
    "${words[@]}" exit-heads "$@"
}

# ---- in the job of a stage

# A checksum of the files that a later start continues from: it changes if and only if the stage made progress.
progress() {
    find "$1" \( -name logs -o -name wandb -o -name claims \) -prune -o \
        -type f ! -name '.*' ! -name metrics.jsonl -printf '%p %s\n' | sort | cksum
}

# stuck FOLDER FILE is called when this job was stopped. It is true if the job stopped at the very same place in its two
# starts before too. FILE keeps the places. Preempted starts are not counted: they say nothing about this job.
stuck() {
    local place
    place=$(progress "$1")
    echo "$place" >>"$2"
    [ "$(tail -n 3 "$2" | grep -cxF "$place")" = 3 ]
}

# True if another job preempts this one. Slurm requeues such a job when its grace time is over, but a job whose processes
# have saved and ended before that would count as failed.
preempted() { scontrol show job -o "$1" | grep -q ' PreemptTime=[0-9]'; }

# stage NAME FOLDER WORDS... runs a stage with the resources of this job. The stage ends with 138 if USR1 stopped it before
# the time limit, with 143 if TERM did, with 75 if another process vanished; then this very job is requeued and continues.
stage() {
    local name=$1 folder=$2 code=0 starts=$((${SLURM_RESTART_COUNT:-0} + 1)) flags job=$SLURM_JOB_ID words
    shift 2
    # The id of an array's last task is that of the array, and would requeue all tasks: so name the task.
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    say "$(date '+%F %T') $name: job $job, start $starts, on $SLURM_JOB_NODELIST"
    split "$EH_SRUN"
    # --wait: rank 0 has so many seconds to write after the others have ended, and no rank waits longer for one that never
    # began. --kill-on-bad-exit=0: otherwise a stage that saved and ended would count as killed.
    flags=(--wait=600 --kill-on-bad-exit=0 "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" "${words[@]}")
    [ "${SLURM_NTASKS:-1}" = 1 ] || flags+=(--label)
    split "$EH_RUN"
    export PYTHONUNBUFFERED=1 TQDM_MININTERVAL="${TQDM_MININTERVAL:-60}" # seconds between progress lines in a log
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} \
        srun "${flags[@]}" "${words[@]}" exit-heads "$name" "$@" || code=$?
    if { [ "$code" = 138 ] || [ "$code" = 75 ]; } && stuck "$folder" "$folder/logs/.$name-$job.places"; then
        say "$name was stopped at the same place three times, last with $code, and is given up." \
            "Is its time limit too short (138), or do its nodes die (75)?"
    elif [ "$code" = 138 ] || [ "$code" = 75 ] || { [ "$code" = 143 ] && preempted "$job"; }; then
        say "$(date '+%F %T') $name ended with $code; job $job is requeued and continues"
        scontrol requeue "$job" || say "job $job could not be requeued"
    fi
    exit "$code"
}

# ---- where the jobs are submitted

# Fills the array `flags` with the flags of sbatch for stage $1, which waits for $2.
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
    *) # it starts over when it is requeued, so a signal before the time limit would not help
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
        # singleton: never beside a job of the same run and stage that is still in the queue
        case $name in pilot | distill | evaluate | publish) after+=,singleton ;; esac
        flags_of "$name" "$after"
        if [ -n "$dry" ]; then
            printf '%q ' sbatch "${flags[@]}" "$0" --stage "$name" "$folder" "${words[@]}"
            printf '\n'
            id="<job of $name>"
        elif ! id=$(sbatch --parsable "${flags[@]}" "$0" --stage "$name" "$folder" "${words[@]}"); then
            say "stage $name was refused: see sbatch's message above; its flags were ${flags[*]}"
            [ ${#ids[@]} = 0 ] || { say "cancelling what waits before it: ${ids[*]}"; scancel "${ids[@]}"; }
            exit 1
        fi
        id=${id%%;*} # with several clusters, the name of one follows the id
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
        --redo*) say "--redo: a requeued job would redo the stage again. Give another run.name, or redo the stage" \
            "outside of a job: exit-heads STAGE --redo STAGE" && exit 2 ;;
        -*) say "$1: this script has no such option; flags of sbatch go before it, or into EH_SBATCH" && exit 2 ;;
        *) words+=("$1") ;;
        esac
        shift
    done
    # A mistake in the config is found here, and not by a job after it has waited in the queue.
    values=$(exit_heads run "${words[@]}" --show-config run.dir run.name machine.nodes machine.processes_per_node \
        machine.device distill.teacher distill.exit_layers) || exit $?
    mapfile -t values <<<"$values"
    run_name=${values[1]} folder=${values[0]}/${values[1]} logs=${values[0]}/${values[1]}/logs
    stages=(generate)
    [ "${values[5]}" != cached ] || stages+=(cache)
    [ "${values[6]}" != "[]" ] || stages+=(pilot) # distill.exit_layers=auto
    stages+=(distill evaluate publish)
    if [ -n "$here" ] || { [ -z "$dry" ] && ! command -v sbatch >/dev/null; }; then
        run_here
        return
    fi
    nodes=${EH_NODES:-${values[2]}}
    [ -n "$EH_NODES" ] || [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] || nodes=$SLURM_JOB_NUM_NODES
    gpus=$(knob distill GPUS)
    processes=${EH_PROCESSES:-${gpus##*:}}
    if [ -z "$processes" ] && [ "${values[3]}" -gt 1 ] && [ "${values[4]}" != cpu ]; then
        say "machine.processes_per_node=${values[3]}: this means one process per GPU, but no GPUs are requested. Set" \
            "EH_GPUS=${values[3]}, or give machine.device=cpu, or EH_PROCESSES if other flags request the GPUs" && exit 2
    fi
    processes=${processes:-${values[3]}}
    words+=("machine.nodes=$nodes" "machine.processes_per_node=$processes")
    [ -n "$dry" ] || mkdir -p "$logs" # Slurm makes no folder for the logs
    # sbatch would take the variables of the submitting job as wishes for the submitted ones.
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
