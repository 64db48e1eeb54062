#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice; see README.md beside this file.
#
#   export TPU_NAME=NAME ZONE=ZONE
#   tpu_vm.sh install
#   WORKDIR=DIR tpu_vm.sh train --config=RECIPE [FLAGS]
#   tpu_vm.sh status | log | stop
#
# install  copies this checkout to every host and installs it there
# train    starts the same command on every host, in the background: it lives
#          on when this machine goes
# status   whether it runs, per host, and the last line that it said
# log      what process 0 says, as it goes; the other hosts' logs hold errors
# stop     SIGTERM to every host: the run saves, and the same train goes on
#
# Variables:
#   TPU_NAME   name of the TPU VM (must be set)
#   ZONE       its zone, such as us-west4-a (must be set)
#   PROJECT    Google Cloud project; default: gcloud's own
#   WORKDIR    of train: a folder that every host sees, on a mounted file system
#              such as Filestore; no gs:// address
#   REMOTE     where the checkout lies on the hosts; default: dpc_jax
#   PYTHON     of install: 3.11 or newer on the hosts; default: python3
#   DRY_RUN=1  prints the commands of gcloud instead
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

tpu() {
  local command=(gcloud compute tpus tpu-vm "$@" "--zone=$ZONE")
  [[ -z "${PROJECT:-}" ]] || command+=("--project=$PROJECT")
  if [[ "${DRY_RUN:-}" == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

on() {
  tpu ssh "$TPU_NAME" "--worker=$1" "--command=$2"
}

action=${1:-}
[[ -n "$action" ]] || fail "name what to do: install, train, status, log, stop"
shift
[[ -n "${TPU_NAME:-}" ]] || fail "TPU_NAME is not set"
[[ -n "${ZONE:-}" ]] || fail "ZONE is not set"
remote=${REMOTE:-dpc_jax}
# Of a run that was started here and has not ended. After the host was started
# again another program may have its number.
runs="grep -aqsF experiments.train /proc/\$(cat train.pid 2> /dev/null)/cmdline"

case "$action" in
  install)
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    tar -C "$root" --exclude=__pycache__ -czf "$folder/dpc_jax.tar.gz" \
      dpc_jax experiments configs pyproject.toml requirements.txt README.md
    tpu scp "$folder/dpc_jax.tar.gz" "$TPU_NAME:" --worker=all
    on all "set -e; mkdir -p $remote; tar -C $remote -xzf dpc_jax.tar.gz; \
cd $remote; ${PYTHON:-python3} -m venv .venv; \
.venv/bin/python -m pip install --quiet '.[train,tpu]'"
    ;;
  train)
    workdir=${WORKDIR:-}
    [[ -n "$workdir" ]] || fail "WORKDIR is not set"
    [[ "$workdir" != *://* ]] ||
      fail "WORKDIR=$workdir: must be a folder that every host sees"
    flags=$(printf ' %q' --distributed=on "$@" "--workdir=$workdir")
    on all "cd $remote || exit; \
if $runs; then echo 'a run is under way here' >&2; exit 1; fi; \
(setsid nohup .venv/bin/python -m experiments.train$flags \
> train.log 2>&1 < /dev/null & echo \$! > train.pid)"
    ;;
  status)
    on all "cd $remote || exit; if $runs; then echo 'it runs'; \
else echo 'no run'; fi; tail -n 1 train.log"
    ;;
  log)
    on 0 "tail -n 50 -F $remote/train.log"
    ;;
  stop)
    on all "cd $remote || exit; if $runs; then kill -TERM \$(cat train.pid); fi"
    ;;
  *)
    fail "$action: use install, train, status, log or stop"
    ;;
esac
