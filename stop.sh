#!/usr/bin/env bash
# ./stop.sh [all|api|web|engine]   stops exactly what start.sh started here: SIGTERM, then SIGKILL.
#
# It needs neither settings, environment, pid files nor a writable disk: a process without a pid file is found again.
#
# Exit codes: 0 nothing is running and the ports are free (also if nothing was running), 1 a process could not be ended, or
# belongs to another user, 2 usage or no Python, 3 a port is held by a process that start.sh did not start here.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

case ${1:-all} in
    all) parts=(web api engine) ;;
    api | web | engine) parts=("$1") ;;
    *) echo "usage: ./stop.sh [all|api|web|engine]" >&2; exit 2 ;;
esac
export PYTHONDONTWRITEBYTECODE=1

for candidate in .venv/bin/python "${CONDA_PREFIX:-/nonexistent}/bin/python" python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        exec "$candidate" -m deploy.service halt "${parts[@]}"
    fi
done
echo "No Python 3.8 or newer found; the recorded processes are in logs/*.pid.json" >&2
exit 2
