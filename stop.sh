#!/usr/bin/env bash
# ./stop.sh [all|api|web]   stops exactly what start.sh started here: SIGTERM, then SIGKILL.
#
# Exit codes: 0 nothing is running and the ports are free (also if nothing was running), 1 a process could not be killed,
# 2 usage or no Python, 3 a port is held by a process that start.sh did not start here.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

case ${1:-all} in
    all) parts=(web api) ;;
    api | web) parts=("$1") ;;
    *) echo "usage: ./stop.sh [all|api|web]" >&2; exit 2 ;;
esac
export PYTHONDONTWRITEBYTECODE=1

# Stopping must work with a broken environment or broken settings: any Python will do, and the defaults below replace
# settings that cannot be read.
python=
for candidate in .venv/bin/python "${CONDA_PREFIX:-/nonexistent}/bin/python" python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[[ -n $python ]] || { echo "No Python 3.8 or newer found; the recorded processes are in logs/*.pid.json" >&2; exit 2; }

unchecked() { # NAME DEFAULT
    local line
    line=$(printenv "GLM_${1^^}" || sed -n "s/^ *GLM_${1^^} *= *//p" .env 2>/dev/null | tail -n 1)
    echo "${line:-$2}"
}
mapfile -t values < <("$python" settings.py log_dir drain_s api_port web_port 2>/dev/null)
if ((${#values[@]} != 4)); then
    values=("$(unchecked log_dir logs)" "$(unchecked drain_s 10)" "$(unchecked api_port 8080)" "$(unchecked web_port 8081)")
fi
log_dir=$(realpath -m "${values[0]}")
grace_s=$(awk -v drain="${values[1]}" 'BEGIN { print drain + 5 }')
declare -A port=([api]=${values[2]} [web]=${values[3]})
pairs=()
for part in "${parts[@]}"; do pairs+=("$part=${port[$part]}"); done
exec "$python" -m deploy.service stop "$log_dir" "$grace_s" "${pairs[@]}"
