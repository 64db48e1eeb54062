#!/usr/bin/env bash
# Runs a command for launchers that take exit code 0 for "all is done".
#
#   attempt.sh WORKDIR COMMAND [ARGUMENTS]
#
# Passes SIGTERM on. The exit code is the command's, but for that of a run which
# was told to stop, and goes on another time: 0 without a summary.json in
# WORKDIR, and the signal's own code, of a program that was just starting. Both
# are 75.
set -u

if [[ $# -lt 2 || $1 == -* ]]; then
  echo "usage: attempt.sh WORKDIR COMMAND [ARGUMENTS]" >&2
  exit 2
fi
workdir=$1
shift
told=0
child=
trap 'told=1; [[ -z "$child" ]] || kill -TERM "$child" 2> /dev/null' TERM
"$@" &
child=$!
[[ $told == 0 ]] || kill -TERM "$child"
# A signal ends a wait, not the command.
while kill -0 "$child" 2> /dev/null; do
  wait "$child"
done
wait "$child"
code=$?
if [[ ! -e "$workdir/summary.json" ]]; then
  [[ $code != 0 ]] || exit 75
  # 128 + SIGTERM
  [[ $told == 0 || $code != 143 ]] || exit 75
fi
exit "$code"
