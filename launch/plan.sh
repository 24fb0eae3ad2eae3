# shellcheck shell=bash
# For the dry runs of tpu_vm.sh and gke.sh, which read this file.

# Prints, as comments, what COMMAND would cost on a slice, where it is `PYTHON -m dgkd_jax.main …` and PYTHON has the extra
# `plan`. Returns 2, with the reason on stderr, where it does not fit there or has bad input.
#   plan TOPOLOGY COMMAND…
plan() {
  local topology=$1 text
  shift
  [[ ${2-} == -m && ${3-} == dgkd_jax.main ]] || return 0
  local python=$1
  shift 3
  if ! "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("libtpu"))' 2>/dev/null; then
    echo "# whether it fits this slice, and for how many hours: pip install -e '.[plan]', and this again"
    return 0
  fi
  text=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && "$python" -m dgkd_jax.plan --topology="$topology" "$@") || return
  sed 's/^/# /; s/ *$//' <<<"$text"
}
