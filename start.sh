#!/usr/bin/env bash
# ./start.sh [--restart] [all|api|web|engine]   starts the API and the page in the background and returns as soon as they
# answer, and before them the engine of GLM_ENGINE_COMMAND, if there is one.
#
# --gpus 0,1,2,3 and --replicas 4 run several APIs, each with a port of its own, behind an nginx on GLM_API_PORT (docs/scaling.md).
# They are kept in .env. The parts api/0, api/1, ... and front are then a single one of them.
#
# What already runs stays as it is, also if its code or settings have changed since; that is reported. --restart stops it
# first, once it is certain that the code here can be imported.
#
# Exit codes: 0 both are up (or were already, or the API is still loading its model), 1 one of them did not start or did not
# stop, 2 nothing was started: usage, settings, Python, disk or files, 3 nothing was started: a port is in use.
set -euo pipefail
trap 'exit 1' INT    # replaced below; without one the shell goes on if the command that it waits for ends in its own way
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
# shellcheck source=deploy/environment.sh
source deploy/environment.sh

restart=() parts=() chosen=() everything=''
while (($#)); do
    case $1 in
        --restart) restart=(--restart) ;;
        --gpus=* | --replicas=*) chosen+=("${1#--}") ;;
        --gpus | --replicas)
            if (($# > 1)); then chosen+=("${1#--}=$2"); shift; else parts+=(wrong wrong wrong); fi ;;
        all) parts+=(api web) everything=yes ;;
        api | web | engine | front | api/[0-9] | api/[0-9][0-9]) parts+=("$1") ;;
        *) parts+=(wrong wrong wrong) ;;
    esac
    shift
done
((${#parts[@]})) || { parts=(api web) everything=yes; }
if ((${#parts[@]} > 2)); then
    complain "usage: ./start.sh [--restart] [--gpus 0,1,... | --replicas N] [all|api|web|engine]"
    exit 2
fi
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
trap '' PIPE    # the reader of `./start.sh | head` must not end a start in the middle

# The lock is held by descriptor 9 of this shell. A server that inherited it would hold the lock for its lifetime, so every
# process launched below closes it.
if mkdir -p logs 2>/dev/null && : 2>/dev/null >>logs/start.lock; then
    exec 9>>logs/start.lock
else
    exec 9<start.sh    # the folder is not writable
fi
# The starts of single replicas need not wait for one another: two that are dead load side by side.
lock=(-x)
if ((${#parts[@]} == 1)) && [[ ${parts[0]} == api/* ]]; then lock=(-s); fi
if ! flock "${lock[@]}" -n 9; then
    say "Another start.sh is running; waiting for it"
    flock "${lock[@]}" 9
fi

waiter='' touched=() to_stop=()    # touched: the parts that were stopped or launched so far
interrupted() {
    trap '' INT TERM HUP
    if [[ -n $waiter ]]; then kill "$waiter" 2>/dev/null || true; fi
    if ((${#touched[@]})); then
        complain "Interrupted"
        roll_back
        ((${#to_stop[@]} == 0)) || complain "Not running now: ${touched[*]}"
    else
        complain "Interrupted; nothing was started"
    fi
    exit 1
}
# SIGTERM and SIGHUP still end it at once: the shell would handle them only after an installation.
trap interrupted INT

if [[ -e ${GLM_ENV_FILE:-.env}.restoring ]]; then
    complain "Nothing was started: a restore of a backup was cut off. To finish it: python health_check.py restore"
    exit 2
fi

choose_python requirements.txt || exit 2

# For `( quiet ... )` and `$(quiet ...)`: a short command that a signal does not tear in the middle. This shell handles the
# signal after it.
quiet() {
    trap '' INT TERM HUP
    exec "$PYTHON" "$@" 9>&-
}
trap interrupted TERM
trap 'exec >/dev/null 2>&1; interrupted' HUP    # the terminal is gone

if ((${#chosen[@]})); then
    (quiet -m deploy.replicas keep "${chosen[@]}") || {
        complain "Nothing was started"
        exit 2
    }
fi
names=(api_host api_port web_host web_port api_url start_timeout_s stop_s log_dir engine_url engine_command engine_host engine_port gpus replica_count)
values_text=$(quiet settings.py "${names[@]}" 2>/dev/null) || {
    # Of a failure that settings.py did not foresee, the last line is the one that says what it is.
    complain "$( (quiet settings.py) 2>&1 | awk '{ all = all $0 "\n" } /^Traceback/ { odd = 1 } END { printf "%s", odd ? $0 : all }')"
    complain "Nothing was started: correct the settings above (in ${GLM_ENV_FILE:-.env} or GLM_ variables; see .env.example)"
    exit 2
}
mapfile -t values < <(printf '%s\n' "$values_text")    # not <<<, which needs room in /tmp
declare -A host=([api]=${values[0]} [web]=${values[2]} [engine]=${values[10]}) port=([api]=${values[1]} [web]=${values[3]} [engine]=${values[11]})
engine_url=${values[8]} engine_command=${values[9]}
if [[ -n $everything && -n $engine_command ]]; then parts=(engine "${parts[@]}"); fi
if [[ ${parts[*]} == *engine* && -z $engine_command ]]; then
    complain "Nothing was started: GLM_ENGINE_COMMAND is not set"
    exit 2
fi
api_url=${values[4]} limit_s=${values[5]} stop_s=${values[6]} log_dir=$(realpath -m "${values[7]}")
replicas=${values[13]}
if [[ -n ${values[12]} ]]; then export START_SH_GPUS=${values[12]}; fi
if ((replicas > 1)) || [[ -d $log_dir/replicas ]]; then
    (quiet -m deploy.replicas check) || {
        complain "Nothing was started"
        exit 2
    }
fi
front=api    # the part that listens on GLM_API_PORT
if ((replicas > 1)); then
    front=front
    host[front]=${host[api]} port[front]=${port[api]}
    all=()
    for ((number = 0; number < replicas; number++)); do
        host[api/$number]=127.0.0.1 port[api/$number]=$((port[api] + 10 + number))
        all+=("api/$number")
    done
    wanted=()
    for part in "${parts[@]}"; do
        if [[ $part == api ]]; then wanted+=("${all[@]}" front); else wanted+=("$part"); fi
    done
    parts=("${wanted[@]}")
fi
for part in "${parts[@]}"; do
    if [[ -z ${port[$part]:-} ]]; then
        complain "There is no $part: the settings (GLM_GPUS, GLM_REPLICAS) say $replicas replica(s). Nothing was started"
        exit 2
    fi
done

if [[ ${parts[*]} == *api* && -z $engine_url ]] && (quiet -m deploy.quantization); then
    # Without it the API says which settings need no quantised weights, or takes another format.
    (trap 'exit 1' INT; install_missing requirements-quantized.txt) || complain "4-bit weights cannot be used"
fi
unset START_SH_NO_INSTALL    # the servers have no use for it

if [[ ${port[api]} == "${port[web]}" ]]; then
    complain "GLM_API_PORT and GLM_WEB_PORT are both ${port[api]}; they must differ"
    exit 2
fi
if ! mkdir -p "$log_dir" 2>/dev/null || [[ ! -w $log_dir ]]; then
    complain "Nothing was started: $(id -un) cannot write to $log_dir"
    exit 2
fi
if (($(free_mib "$log_dir") < 256)); then
    complain "Nothing was started: less than 256 MiB of disk free in $log_dir"
    exit 2
fi

START_SH_IDENTITY=$(quiet -m deploy.identity) || exit 2
export START_SH_IDENTITY
to_start=()
for part in "${parts[@]}"; do
    status=0
    (quiet -m deploy.service check "$log_dir" "$part" "${host[$part]}" "${port[$part]}" "${restart[@]}") || status=$?
    case $status in
        0) to_start+=("$part") ;;
        10) if ((${#restart[@]})); then to_start+=("$part") to_stop+=("$part"); fi ;;
        3) complain "Nothing was started"; exit 3 ;;
        *) complain "Nothing was started"; exit 2 ;;
    esac
done
# What the API would say of its model only after the one before it was stopped.
if [[ ${to_start[*]} == *api* && -z $engine_url ]] && ! (quiet -m deploy.model_name); then
    complain "Nothing was started: correct the settings above (in ${GLM_ENV_FILE:-.env} or GLM_ variables; see .env.example)"
    exit 2
fi
for part in "${to_stop[@]}"; do
    module=${part%%/*}.server
    [[ $part != front && $part != engine ]] || continue
    (quiet -c "import $module") >/dev/null 2>&1 || {
        complain "The code of $part cannot be imported: $( (quiet -c "import $module") 2>&1 | tail -n 1)"
        complain "Nothing was stopped: what ran before still runs"
        exit 2
    }
done

changed=''
if ((${#to_stop[@]})); then
    pairs=()
    for part in "${to_stop[@]}"; do pairs+=("$part=${port[$part]}"); done
    changed=$(quiet -m deploy.service changed "$log_dir" "${pairs[@]}") || changed='.'
fi

secrets=()
# The page uses the same key. No key is created for an API on another machine.
[[ ${parts[*]} == *api* || -z $api_url ]] && secrets+=(API_KEY)
[[ ${parts[*]} == *web* ]] && secrets+=(WEB_TOKEN)
[[ ${parts[*]} == *api* ]] && secrets+=(PROBE_TOKEN)
(quiet -m deploy.keys "${secrets[@]}") || exit 2
if ((${#to_start[@]})); then START_SH_IDENTITY=$(quiet -m deploy.identity); fi    # with the new secrets

stop_parts() { # SECONDS PART... [--keep] [--restarting=PID]
    local limit=$1 argument arguments=()
    shift
    for argument in "$@"; do
        [[ $argument == --* ]] || argument+="=${port[$argument]}"
        arguments+=("$argument")
    done
    (quiet -m deploy.service stop "$log_dir" "$limit" "${arguments[@]}")
}

roll_back() { # [--keep]
    trap '' INT TERM HUP    # a second signal must not leave half of it
    ((${#touched[@]})) || return 0
    say "Stopping what was started"
    stop_parts 10 "${touched[@]}" "${@:---failed-start}" || true
}
failed() {
    if ((${#to_stop[@]})); then
        # With its pid file left in place the checker reports what is down, and tries to start it.
        roll_back --keep
        complain "The restart failed. Not running now: ${to_start[*]}. What ran before was stopped$changed"
        if [[ $changed == ,* ]]; then
            complain "Correct the cause above, or go back to the earlier code and settings; then run ./start.sh"
        else
            complain "Correct the cause above; then run ./start.sh"
        fi
    else
        roll_back
    fi
    exit 1
}

touched=("${to_start[@]}")
if ((${#to_stop[@]})); then
    stop_parts "$(awk -v stop="$stop_s" 'BEGIN { print stop + 5 }')" "${to_stop[@]}" --keep "--restarting=$$" || {
        complain "Nothing was started, because not everything was stopped"
        exit 1
    }
fi
for part in "${to_start[@]}"; do
    say "Starting $part on port ${port[$part]}"
    # Without a signal between a server and its pid file.
    (quiet -m deploy.service launch "$log_dir" "$part" "${port[$part]}") || failed
done
pairs=()
for part in "${parts[@]}"; do pairs+=("$part=${host[$part]}"); done
# In the background, because the shell handles a signal only after a command in the foreground has ended.
"$PYTHON" -m deploy.service wait "$log_dir" "$limit_s" "${pairs[@]}" 9>&- &
waiter=$!
wait "$waiter" || failed
trap '' INT TERM HUP    # they run: what follows only prints

address() {
    local first=${host[$1]}
    case $first in 0.0.0.0 | :: | '') first=127.0.0.1 ;; *:*) first="[$first]" ;; esac
    say "http://$first:${port[$1]}"
}
for part in "${parts[@]}"; do
    case $part in
        "$front") say "API:   $(address "$front")/v1   (every route but /health needs the key GLM_API_KEY)" ;;
        api/*) say "       replica ${part#*/}: $(address "$part")" ;;
        engine) say "Engine: $engine_url" ;;
        web) say "Page:  $(address web)/?token=$(quiet settings.py web_token)" ;;
    esac
done
first=${parts[0]}
if [[ $first == api/* && ${#parts[@]} -gt 1 ]]; then first=front; fi
if [[ $first == engine ]]; then first=${parts[-1]}; fi
if [[ ${host[$first]} == 0.0.0.0 ]]; then
    say "       (from another machine, use this machine's address: $(hostname -I 2>/dev/null || true))"
fi
say "Logs:  $log_dir"
say "Stop:  ./stop.sh    Check: $PYTHON health_check.py"
if [[ -t 1 && ${parts[*]} == *api* ]] && ((replicas == 1)); then
    exec 9>&-    # a first download may take an hour; another start.sh need not wait for it
    trap 'exit 0' INT TERM HUP
    "$PYTHON" -m deploy.service follow "$log_dir" "${host[api]}" || exit 1
fi
