#!/usr/bin/env bash
# deploy/ray/run.sh COMMAND...   runs a command of Ray (`ray start`, `serve run`) with the packages and the code of this folder.
# On every machine of the cluster: what `ray start` is given here, its replicas and proxies inherit.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
# shellcheck source=../environment.sh
source deploy/environment.sh
choose_python requirements-ray.txt || exit 2

export RAY_USAGE_STATS_ENABLED=0                   # Ray reports to its makers otherwise
export RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1   # one that is beyond help has no answers to wait for
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" "$(dirname "$PYTHON")/$1" "${@:2}"
