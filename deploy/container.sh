#!/usr/bin/env bash
# The foreground process of a container: start.sh, then the logs on standard output. It ends when one of the
# two servers ends, so that the container's restart policy applies, and passes a stop on to both.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

starter='' shower=''
finish() {
    trap - TERM INT
    if [[ -n $starter ]]; then
        kill "$starter" 2>/dev/null || true
        wait "$starter" || true
    fi
    ./stop.sh all
    if [[ -n $shower ]]; then kill "$shower" 2>/dev/null || true; fi
    exit "$1"
}
trap 'finish 0' TERM INT

# Everything runs in the background of a `wait`, which a signal interrupts at once.
./start.sh all &
starter=$!
wait "$starter" || exit 1
starter=
log_dir=$(.venv/bin/python settings.py log_dir)
tail -n +1 -F "$log_dir/api.log" "$log_dir/web.log" &
shower=$!
while .venv/bin/python -m deploy.service alive "$log_dir" api web; do
    sleep 2 &
    wait $!
done
echo "One of the two servers ended" >&2
finish 1
