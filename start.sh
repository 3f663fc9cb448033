#!/usr/bin/env bash
# ./start.sh [all|api|web]   starts the API and the page in the background and returns as soon as they answer.
#
# Exit codes: 0 both are up (or were already, or the API is still loading its model), 1 one of them did not start,
# 2 nothing was started: usage, settings, Python or disk, 3 nothing was started: a port is in use.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
# shellcheck source=deploy/environment.sh
source deploy/environment.sh

case ${1:-all} in
    all) parts=(api web) ;;
    api | web) parts=("$1") ;;
    *) complain "usage: ./start.sh [all|api|web]"; exit 2 ;;
esac
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# The lock is held by descriptor 9 of this shell. A server that inherited it would hold the lock for its lifetime, so every
# process launched below closes it.
mkdir -p logs
exec 9>>logs/start.lock
if ! flock -n 9; then
    say "Another start.sh is running; waiting for it"
    flock 9
fi

choose_python requirements.txt || exit 2
values_text=$("$PYTHON" settings.py api_host api_port web_host web_port api_url start_timeout_s log_dir) || {
    complain "Nothing was started: correct the settings above (in .env or GLM_ variables; see .env.example)"
    exit 2
}
mapfile -t values <<<"$values_text"
declare -A host=([api]=${values[0]} [web]=${values[2]}) port=([api]=${values[1]} [web]=${values[3]})
api_url=${values[4]} limit_s=${values[5]} log_dir=$(realpath -m "${values[6]}")

if [[ ${port[api]} == "${port[web]}" ]]; then
    complain "GLM_API_PORT and GLM_WEB_PORT are both ${port[api]}; they must differ"
    exit 2
fi
if ! mkdir -p "$log_dir" || [[ ! -w $log_dir ]]; then
    complain "Nothing was started: cannot write to $log_dir"
    exit 2
fi
if (($(free_mib "$log_dir") < 256)); then
    complain "Nothing was started: less than 256 MiB of disk free in $log_dir"
    exit 2
fi

to_start=()
for part in "${parts[@]}"; do
    status=0
    "$PYTHON" -m deploy.service check "$log_dir" "$part" "${host[$part]}" "${port[$part]}" || status=$?
    case $status in
        0) to_start+=("$part") ;;
        10) say "Already running: $part (port ${port[$part]})" ;;
        *) complain "Nothing was started"; exit 3 ;;
    esac
done

secrets=()
# The page uses the same key. No key is created for an API on another machine.
[[ ${parts[*]} == *api* || -z $api_url ]] && secrets+=(API_KEY)
[[ ${parts[*]} == *web* ]] && secrets+=(WEB_TOKEN)
[[ ${parts[*]} == *api* ]] && secrets+=(PROBE_TOKEN)
"$PYTHON" deploy/keys.py "${secrets[@]}" || exit 2

launch() {
    local part=$1 log=$log_dir/$1.log offset
    offset=$(stat -c %s "$log" 2>/dev/null || echo 0)
    nohup setsid "$PYTHON" -m "$part.server" >>"$log" 2>&1 </dev/null 9>&- &
    "$PYTHON" -m deploy.service record "$log_dir" "$part" "$!" "${port[$part]}" "$offset"
}

roll_back() {
    trap - INT TERM
    ((${#to_start[@]})) || return 0
    say "Stopping what was started"
    local part pairs=()
    for part in "${to_start[@]}"; do pairs+=("$part=${port[$part]}"); done
    "$PYTHON" -m deploy.service stop "$log_dir" 10 "${pairs[@]}" || true
}
waiter=
interrupted() {
    complain "Interrupted"
    if [[ -n $waiter ]]; then kill "$waiter" 2>/dev/null || true; fi
    roll_back
    exit 1
}
trap interrupted INT TERM

for part in "${to_start[@]}"; do
    say "Starting $part on port ${port[$part]}"
    launch "$part"
done
pairs=()
for part in "${parts[@]}"; do pairs+=("$part=${host[$part]}"); done
# In the background, because the shell handles a signal only after a command in the foreground has ended.
"$PYTHON" -m deploy.service wait "$log_dir" "$limit_s" "${pairs[@]}" 9>&- &
waiter=$!
wait "$waiter" || { roll_back; exit 1; }
trap - INT TERM

address() {
    local first=${host[$1]}
    case $first in 0.0.0.0 | :: | '') first=127.0.0.1 ;; *:*) first="[$first]" ;; esac
    say "http://$first:${port[$1]}"
}
for part in "${parts[@]}"; do
    if [[ $part == api ]]; then
        say "API:   $(address api)/v1   (every route but /health needs the key GLM_API_KEY)"
    else
        say "Page:  $(address web)/?token=$("$PYTHON" settings.py web_token)"
    fi
done
if [[ ${host[${parts[0]}]} == 0.0.0.0 ]]; then
    say "       (from another machine, use this machine's address: $(hostname -I 2>/dev/null || true))"
fi
say "Logs:  $log_dir"
say "Stop:  ./stop.sh    Check: $PYTHON health_check.py"
