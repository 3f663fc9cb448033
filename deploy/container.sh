#!/usr/bin/env bash
# The foreground process of a container: runs start.sh, then shows the logs. It exits when one of the two servers exits, so
# that the container's restart policy applies, and stops both on SIGTERM.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

starter='' log_tail=''
finish() {
    trap - TERM INT
    if [[ -n $starter ]]; then
        kill "$starter" 2>/dev/null || true
        wait "$starter" || true
    fi
    ./stop.sh all
    if [[ -n $log_tail ]]; then kill "$log_tail" 2>/dev/null || true; fi
    exit "$1"
}
trap 'finish 0' TERM INT

# A signal interrupts `wait` at once, but not a command in the foreground.
./start.sh all &
starter=$!
wait "$starter" || exit 1
starter=
log_dir=$(.venv/bin/python settings.py log_dir)
tail -n +1 -F "$log_dir/api.log" "$log_dir/web.log" &
log_tail=$!
while .venv/bin/python -m deploy.service alive "$log_dir" api web; do
    sleep 2 &
    wait $!
done
echo "One of the two servers has exited" >&2
finish 1
