#!/usr/bin/env bash
# ./stop.sh [all|api|web]   ends what start.sh started here: SIGTERM, then SIGKILL, and only that.
#
# Exit codes: 0 nothing of ours runs and the ports are free (also when nothing ran), 1 a process could not be
# ended, 2 wrong word or no Python at all, 3 a port is held by something that start.sh did not start here.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

case ${1:-all} in
    all) parts=(web api) ;;
    api | web) parts=("$1") ;;
    *) echo "usage: ./stop.sh [all|api|web]" >&2; exit 2 ;;
esac
export PYTHONDONTWRITEBYTECODE=1

# Stopping must work when the environment or the settings are broken, so any Python will do and the
# settings are only a better source than the defaults below.
python=
for candidate in .venv/bin/python "${CONDA_PREFIX:-/nonexistent}/bin/python" python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[[ -n $python ]] || { echo "No Python 3 found; the recorded processes are in logs/*.pid.json" >&2; exit 2; }

setting() { # NAME DEFAULT
    local line
    if "$python" settings.py "$1" 2>/dev/null; then return; fi
    line=$(printenv "GLM_${1^^}" || sed -n "s/^ *GLM_${1^^} *= *//p" .env 2>/dev/null | tail -n 1)
    echo "${line:-$2}"
}
log_dir=$(realpath -m "$(setting log_dir logs)")
grace_s=$(awk -v drain="$(setting drain_s 10)" 'BEGIN { print drain + 5 }')
declare -A port=([api]=$(setting api_port 8080) [web]=$(setting web_port 8081))
pairs=()
for part in "${parts[@]}"; do pairs+=("$part=${port[$part]}"); done
exec "$python" -m deploy.service stop "$log_dir" "$grace_s" "${pairs[@]}"
