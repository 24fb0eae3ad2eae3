#!/usr/bin/env bash
# Train on a Cloud TPU slice: get it, bring this repository there, run COMMAND on each of its hosts.
#
#   launch/tpu_vm.sh --name=r50 --zone=us-east5-b --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot \
#     -- python -m dgkd_jax.main --config=configs/imagenet_r50_r18.py --workdir=gs://BUCKET/runs/r50
#
# The slice is a queued resource called NAME, with one node of the same name. It is created if there is none, waited
# for, and created anew where it was suspended or has failed (a spot TPU that was taken away cannot be restarted).
# Then COMMAND runs; after a preemption it is started again, after another failure at most --max-restarts times.
# Give the same command again at any time: what is there is used, and a COMMAND that still runs there is ended first
# (SIGTERM, so that it saves). The slice stays when this script ends; it costs until it is deleted:
#   gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
#
#   --name=NAME               of the queued resource and the node
#   --zone=ZONE               for example us-east5-b
#   --accelerator-type=TYPE   for example v6e-16
#   --runtime-version=IMAGE   for example v2-alpha-tpuv6e
#   --project=PROJECT         default: gcloud's own
#   --spot                    cheaper, and may be taken away
#   --max-restarts=N          after failures that are no preemption; default 3
#   --dry-run                 print the commands for a slice that does not exist yet, run none; and with the extra `plan`
#                             first what COMMAND would cost there: minutes. Refused where it does not fit
#   --force                   with --dry-run: print them nevertheless
#
# Exit code: COMMAND's; 2 for bad arguments or bad input, which is never tried again, as is 3 (numeric failure).
set -euo pipefail

readonly POLL_S=30

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
bad() {
  echo "tpu_vm.sh: $1 (see --help)" >&2
  exit 2
}
say() { echo "tpu_vm.sh: $1" >&2; }

name='' zone='' accelerator='' runtime='' max_restarts=3 dry_run=false force=false
project=() spot=()
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
  --force) force=true ;;
  --spot) spot=(--spot) ;;
  --name=?*) name=${1#*=} ;;
  --zone=?*) zone=${1#*=} ;;
  --accelerator-type=?*) accelerator=${1#*=} ;;
  --runtime-version=?*) runtime=${1#*=} ;;
  --project=?*) project=("$1") ;;
  --max-restarts=?*) max_restarts=${1#*=} ;;
  *) bad "unknown argument '$1'; flags are --flag=value, and the command comes after --" ;;
  esac
  shift
done
[[ -n $name && -n $zone && -n $accelerator && -n $runtime ]] ||
  bad 'needs --name, --zone, --accelerator-type and --runtime-version'
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || bad "--name=$name is not lower-case letters, digits and hyphens"
[[ $max_restarts =~ ^[0-9]+$ ]] || bad "--max-restarts=$max_restarts is no number"
(($#)) || bad 'no command: give one after --'
$dry_run || command -v gcloud >/dev/null || bad 'gcloud is not installed'

cd "$(dirname "$0")/.."
readonly ARCHIVE=${TMPDIR:-/tmp}/dgkd_jax-$name.tar.gz
where=(--zone="$zone" ${project[@]+"${project[@]}"})
# shellcheck source=/dev/null
source launch/plan.sh

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

# Python 3.12 by uv: the images' own is older than this project needs.
# shellcheck disable=SC2016  # expanded on the TPU's hosts
readonly INSTALL='set -e; mkdir -p dgkd_jax; tar -xzf dgkd_jax.tar.gz -C dgkd_jax; cd dgkd_jax
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
test -x .venv/bin/python || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --editable ".[tpu,tfds]"'
# The lock lives as long as the process that inherits it, so the number in run.pid is never that of a stranger.
# shellcheck disable=SC2016
readonly START='set -e; cd dgkd_jax; exec 9>>run.pid
flock --nonblock 9 || { kill -TERM "$(cat run.pid)"; flock 9; }
echo $$ >run.pid; export PATH="$PWD/.venv/bin:$PATH"'

command=$(quote "$@")

run() {
  if $dry_run; then
    quote "$@"
  else
    "$@"
  fi
}

# Prints the state; nothing where there is no such queued resource.
list=(gcloud compute tpus queued-resources list "${where[@]}")
list+=(--filter="name ~ /queuedResources/$name\$" --format='value(state.state)')

create() {
  run gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"}
}

ensure_active() {
  if $dry_run; then
    create
    echo "# then, every $POLL_S s until it prints ACTIVE (SUSPENDED and FAILED ones are deleted and created anew):"
    quote "${list[@]}"
    return
  fi
  local now before=none
  while true; do
    now=$("${list[@]}")
    [[ $now == "$before" ]] || say "$name: ${now:-absent}"
    before=$now
    case $now in
    ACTIVE) return ;;
    '') create ;;
    SUSPENDED | FAILED)
      gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
      ;;
    *) sleep "$POLL_S" ;;
    esac
  done
}

pack() {
  if $dry_run; then
    echo "git ls-files -z | tar --null --files-from=- -czf $(quote "$ARCHIVE")"
  else
    git ls-files -z | tar --null --files-from=- -czf "$ARCHIVE"
  fi
}

bring_repository() {
  pack &&
    run gcloud compute tpus tpu-vm scp "$ARCHIVE" "$name:dgkd_jax.tar.gz" "${where[@]}" --worker=all &&
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$INSTALL"
}

start() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$START; exec $command"
}

if $dry_run; then
  plan "$accelerator" "$@" || $force || bad 'refused; --force prints the commands nevertheless'
fi
failures=0
while true; do
  ensure_active
  code=0
  { bring_repository && start; } || code=$?
  $dry_run && exit
  case $code in
  0 | 2 | 3) exit "$code" ;;
  143) say 'preempted: starting again' ;;
  *)
    ((++failures <= max_restarts)) || exit "$code"
    say "failed with code $code: restart $failures of $max_restarts"
    ;;
  esac
done
