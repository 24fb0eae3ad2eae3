#!/usr/bin/env bash
#SBATCH --job-name=dgkd_jax
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Train under SLURM: one process per task, which find each other through SLURM's own variables.
#
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-task=1 --cpus-per-task=16 --time=24:00:00 launch/slurm.sh \
#     .venv/bin/python -m dgkd_jax.main --config=configs/imagenet_r50_r18.py --workdir=/shared/runs/r50
#
# sbatch takes its options before the script and hands the rest to it. The work directory must be one that all nodes
# see. 300 s before the time limit the processes are sent SIGTERM; they save and exit with 143, and the job goes back
# into the queue with the same log and work directory, from which it continues. So it does after a preemption, and
# after a failure as long as the job was restarted fewer than MAX_RESTARTS (3) times. Bad input (2), numeric failure
# (3) and scancel end it for good.
#
#   bash launch/slurm.sh --dry-run COMMAND …   print the commands, run none
#   bash launch/slurm.sh --help
#   MAX_RESTARTS=10 sbatch …                   more restarts after failures
#
# Exit code: COMMAND's; 2 for bad arguments.
set -euo pipefail

usage() { sed -n '/^# Train/,/^set /s/^# \{0,1\}//p' "$0"; }
bad() {
  echo "slurm.sh: $1 (see --help)" >&2
  exit 2
}

# Prints its arguments as a line for a shell.
quote() {
  local word separator='' apostrophe="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//"'"/$apostrophe}'"
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
  echo
}

dry_run=false
while (($#)); do
  case $1 in
  --)
    shift
    break
    ;;
  --help)
    usage
    exit
    ;;
  --dry-run) dry_run=true ;;
  -*) bad "unknown argument '$1'; options of sbatch come before the script" ;;
  *) break ;;
  esac
  shift
done
max_restarts=${MAX_RESTARTS:-3}
[[ $max_restarts =~ ^[0-9]+$ ]] || bad "MAX_RESTARTS=$max_restarts is no number"
(($#)) || bad 'no command'

# A task that ends must not take along those that still save: they have 300 s more.
step=(srun --kill-on-bad-exit=0 --wait=300 "$@")
if $dry_run; then
  sed -n 's/^#SBATCH \(.*\)/# sbatch: \1/p' "$0"
  quote "${step[@]}"
  echo "# after exit code 143; after another but 0, 2 and 3 while the job was restarted fewer than $max_restarts times:"
  # shellcheck disable=SC2016  # the job's own number
  echo 'scontrol requeue "$SLURM_JOB_ID"'
  exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || bad 'this is a batch script: start it with sbatch'

code=0
"${step[@]}" || code=$?
restarts=${SLURM_RESTART_COUNT:-0}
case $code in
0 | 2 | 3) ;;
143)
  echo "slurm.sh: preempted: back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  ;;
*)
  if ((restarts < max_restarts)); then
    echo "slurm.sh: failed with code $code: back into the queue, restart $((restarts + 1)) of $max_restarts" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
  ;;
esac
exit "$code"
