#!/bin/bash
# A study as a Slurm job that outlives its time limit: sbatch docs/slurm.sh study.toml
#
# Two minutes before the limit Slurm sends SIGTERM to this script alone, which passes it on. The study saves
# its lanes and ends with exit code 75, and only then is the job put back into the queue; what ends of
# itself, well or with an error, stays ended. Change the resources to what your cluster has.
#SBATCH --job-name=lora-tune
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u

study=${1:?usage: sbatch slurm.sh STUDY}
most_restarts=${MOST_RESTARTS:-100} # a limit shorter than the start would else go round for ever

signals=0
child=
early=
stop() {
    signals=$((signals + 1))
    if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null; else early=yes; fi
}
trap stop TERM

lora-tune run "$study" &
child=$!
[ -z "$early" ] || kill -TERM "$child" 2>/dev/null

# A trapped signal ends `wait`, not the study: wait again until none has come in between.
seen=-1
code=0
while [ "$seen" -ne "$signals" ]; do
    seen=$signals
    code=0
    wait "$child" || code=$?
done

echo "lora-tune ended with exit code $code"
case $code in
75 | 143) # stopped by SIGTERM, in order or at once: it goes on when it is started again
    # A job that was cancelled, or that Slurm itself puts back after a preemption, is not RUNNING any more.
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
    if [ "$state" != RUNNING ]; then
        echo "the job is ${state:-gone}: not put back into the queue"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$most_restarts" ]; then
        echo "restarted $most_restarts times: not put back into the queue"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
