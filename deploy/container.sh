#!/usr/bin/env bash
# deploy/container.sh [SECONDS | COMMAND ...]   the foreground process of a container.
#
# It starts both servers and the checker in its loop, and shows the logs. The checker alone restarts what a restart can cure,
# so a server that is gone is no reason to end: it may be on its way back.
#
# Exit codes: 0 after SIGTERM or SIGINT, or when both servers were stopped on purpose; 1 they did not start, or one of them has
# been gone for SECONDS (1800), not stopped by anyone: it is beyond cure, and the container's restart policy applies.
# Any other COMMAND is run instead, such as `.venv/bin/python -m api.server --plan`.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

limit_s=${1:-1800}
[[ $limit_s =~ ^[0-9]+$ ]] || exec "$@"
LOOK_EVERY_S=5
GONE=1 STOPPED=4    # exit codes of `deploy.service alive`

starter='' checker='' log_tail=''
finish() {
    trap - TERM INT
    if [[ -n $starter ]]; then
        kill "$starter" 2>/dev/null || true
        wait "$starter" || true
    fi
    # Before the checker ends: a restart that it is in the middle of starts nothing that was stopped on purpose.
    ./stop.sh all || true
    if [[ -n $checker ]]; then
        kill -- "-$checker" 2>/dev/null || true
        wait "$checker" || true
    fi
    if [[ -n $log_tail ]]; then kill "$log_tail" 2>/dev/null || true; fi
    exit "$1"
}
trap 'finish 0' TERM INT

# The file of the keys must exist where GLM_ENV_FILE names it; in an empty volume it does not yet.
if [[ -n ${GLM_ENV_FILE:-} && ! -e $GLM_ENV_FILE ]] && ! (umask 077 && : >"$GLM_ENV_FILE") 2>/dev/null; then
    echo "$GLM_ENV_FILE cannot be written. On the host: chown $(id -u):$(id -g) the folder that is mounted there" >&2
    exit 1
fi
log_dir=$(.venv/bin/python settings.py log_dir) || exit 1
# Of the container before this one: its verdict is not that of these processes.
rm -f "$log_dir/health.json" || true

# Only what is written from now on. Files that do not exist yet are shown from their beginning.
tail -q -n 0 -F "$log_dir/api.log" "$log_dir/web.log" 2>/dev/null &
log_tail=$!
# A signal interrupts `wait` at once, but not a command in the foreground.
./start.sh all &
starter=$!
wait "$starter" || { starter=''; finish 1; }
starter=''

# A group of its own, so that a run in progress ends with the loop.
watch() {
    setsid .venv/bin/python health_check.py loop >/dev/null &
    checker=$!
}
watch

gone_at=''
while :; do
    sleep "$LOOK_EVERY_S" &
    wait $!
    if ! kill -0 "$checker" 2>/dev/null; then
        echo "The checker has exited; starting it again" >&2
        watch
    fi
    state=0
    .venv/bin/python -m deploy.service alive "$log_dir" api web || state=$?
    case $state in
        "$STOPPED")
            echo "Both servers were stopped on purpose" >&2
            finish 0
            ;;
        "$GONE") gone_at=${gone_at:-$SECONDS} ;;
        *) gone_at='' ;;
    esac
    if [[ -n $gone_at ]] && ((SECONDS - gone_at >= limit_s)); then
        echo "A server has been gone for $((SECONDS - gone_at)) s, and the checker has not brought it back" >&2
        finish 1
    fi
done
