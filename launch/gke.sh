#!/usr/bin/env bash
# Train on a TPU slice of a GKE cluster, as a JobSet: one pod per host, restarted together.
#
#   launch/gke.sh --name=r50 --image=REGISTRY/dgkd_jax:TAG --tpu-accelerator=tpu-v6e-slice --topology=4x4 --hosts=4 \
#     -- python -m dgkd_jax.main --config=configs/imagenet_r50_r18.py --workdir=gs://BUCKET/runs/r50
#
# The cluster is kubectl's current one and needs JobSet 0.6 or newer (https://jobset.sigs.k8s.io). The image:
#   docker build --file launch/Dockerfile --tag REGISTRY/dgkd_jax:TAG . && docker push REGISTRY/dgkd_jax:TAG
# Give the same command again at any time: a JobSet that runs is left alone, one that has ended is replaced.
#
#   --name=NAME               of the JobSet
#   --image=IMAGE             built from launch/Dockerfile
#   --tpu-accelerator=TYPE    the nodes' label cloud.google.com/gke-tpu-accelerator, for example tpu-v6e-slice
#   --topology=AxB[xC]        the nodes' label cloud.google.com/gke-tpu-topology
#   --hosts=N                 nodes of the slice
#   --chips-per-host=N        default 4
#   --namespace=NAMESPACE     default 'default'
#   --spot                    on spot nodes, which give pods some 25 s whatever --grace-s says
#   --max-restarts=N          after failures that are no preemption; default 10
#   --grace-s=N               seconds between SIGTERM and SIGKILL, above one step and one save; default 300
#   --dry-run                 print the manifest and the commands, run none; also the same by xpk; and with the extra `plan`
#                             first what COMMAND would cost there: minutes. Refused where it does not fit
#   --force                   with --dry-run: print them nevertheless
#
# Exit code: 0 when the cluster has the JobSet, not when that has ended; 2 for bad arguments; else kubectl's.
set -euo pipefail

usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
bad() {
  echo "gke.sh: $1 (see --help)" >&2
  exit 2
}

name='' image='' accelerator='' topology='' hosts='' chips=4 namespace=default
max_restarts=10 grace_s=300 spot=false dry_run=false force=false
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
  --spot) spot=true ;;
  --name=?*) name=${1#*=} ;;
  --image=?*) image=${1#*=} ;;
  --tpu-accelerator=?*) accelerator=${1#*=} ;;
  --topology=?*) topology=${1#*=} ;;
  --hosts=?*) hosts=${1#*=} ;;
  --chips-per-host=?*) chips=${1#*=} ;;
  --namespace=?*) namespace=${1#*=} ;;
  --max-restarts=?*) max_restarts=${1#*=} ;;
  --grace-s=?*) grace_s=${1#*=} ;;
  *) bad "unknown argument '$1'; flags are --flag=value, and the command comes after --" ;;
  esac
  shift
done
[[ -n $name && -n $image && -n $accelerator && -n $topology && -n $hosts ]] ||
  bad 'needs --name, --image, --tpu-accelerator, --topology and --hosts'
# What goes into the manifest cannot change its structure.
for word in "$name" "$namespace" "$accelerator"; do
  [[ $word =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] || bad "'$word' is not lower-case letters, digits and hyphens"
done
[[ $image =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || bad "--image=$image is no image's name"
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || bad "--topology=$topology is not like 4x4 or 2x2x4"
for number in "$hosts" "$chips" "$max_restarts" "$grace_s"; do
  [[ $number =~ ^[0-9]+$ ]] || bad "'$number' is no number"
done
(($#)) || bad 'no command: give one after --'
[[ "$*" != *[[:cntrl:]]* ]] || bad 'the command has a control character, such as a line break'
$dry_run || command -v kubectl >/dev/null || bad 'kubectl is not installed'
cd "$(dirname "$0")"
# shellcheck source=/dev/null
source plan.sh

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

# The arguments as a JSON list, which is YAML too.
json_list() {
  local argument separator=''
  printf '['
  for argument; do
    argument=${argument//\\/\\\\}
    printf '%s"%s"' "$separator" "${argument//\"/\\\"}"
    separator=', '
  done
  printf ']'
}

# The template, filled in. In one pass: a value that holds the name of another, as @HOSTS@, stays as it is.
manifest() {
  local rest filled='' value
  rest=$(<gke/jobset.yaml)
  $spot || rest=$(grep -v 'only with --spot' <<<"$rest")
  while [[ $rest =~ ^([^@]*)@([A-Z_]+)@(.*)$ ]]; do
    case ${BASH_REMATCH[2]} in
    NAME) value=$name ;;
    NAMESPACE) value=$namespace ;;
    IMAGE) value=$image ;;
    TPU_ACCELERATOR) value=$accelerator ;;
    TOPOLOGY) value=$topology ;;
    HOSTS) value=$hosts ;;
    CHIPS_PER_HOST) value=$chips ;;
    MAX_RESTARTS) value=$max_restarts ;;
    GRACE_S) value=$grace_s ;;
    COMMAND) value=$(json_list "$@") ;;
    *) value="@${BASH_REMATCH[2]}@" ;;
    esac
    filled+=${BASH_REMATCH[1]}$value
    rest=${BASH_REMATCH[3]}
  done
  printf '%s\n' "$filled$rest"
}

document=$(manifest "$@")
apply=(kubectl apply --filename=-)
delete=(kubectl delete jobset "$name" --namespace="$namespace")
if $dry_run; then
  plan "$accelerator:$topology" "$@" || $force || bad 'refused; --force prints the manifest nevertheless'
  printf '%s\n' "$document"
  echo "# where one of this name has ended:"
  echo "#   ${delete[*]}"
  echo "# always, with the text above:"
  echo "#   ${apply[*]}"
  echo "# or by xpk, TYPE being its name of the slice, for example v6e-16; 2 and 3 are not among the codes it retries:"
  printf '#   '
  quote xpk workload create --cluster=CLUSTER --project=PROJECT --zone=ZONE --tpu-type=TYPE --workload="$name" \
    --docker-image="$image" --max-restarts="$max_restarts" --restart-on-exit-codes=1 \
    --termination-grace-period-seconds="$grace_s" --command="$(quote "$@")"
  exit
fi
state=$(kubectl get jobset "$name" --namespace="$namespace" --ignore-not-found \
  --output=jsonpath='{.status.terminalState}')
[[ -z $state ]] || "${delete[@]}"
"${apply[@]}" <<<"$document"
