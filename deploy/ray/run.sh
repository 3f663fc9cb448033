#!/usr/bin/env bash
# deploy/ray/run.sh COMMAND...   runs a command of Ray (`ray start`, `serve run`) with the packages and the code of this folder.
# On every machine of the cluster: what `ray start` is given here, its proxies and replicas inherit.
#
# Ray is installed into .venv-ray, over the packages of the service, which it finds behind its own: some that it brings, such
# as uvloop, would change the service itself.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
# shellcheck source=deploy/environment.sh
source deploy/environment.sh
choose_python requirements.txt || exit 2

folder=${RAY_ENVIRONMENT:-.venv-ray}
wanted=$(cat requirements-ray.txt requirements.txt <("$PYTHON" -c 'import sys; print(sys.version, sys.prefix)') | sha256sum)
if [[ $(cat "$folder/installed" 2>/dev/null) != "$wanted" ]]; then
    complain "Installing Ray into $folder"
    rm -rf "$folder"
    "$PYTHON" -m venv --without-pip "$folder"
    packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    packages "$PYTHON" >"$(packages "$folder/bin/python")/service.pth"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-ray.txt
    printf '%s\n' "$wanted" >"$folder/installed"
fi

export RAY_USAGE_STATS_ENABLED=0                   # Ray reports to its makers otherwise
export RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1   # one that is beyond help has no answers to wait for
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PATH=$(realpath "$folder")/bin:$PATH
exec "$@"
