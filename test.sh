#!/usr/bin/env bash
# ./test.sh [pytest arguments]   sets up what the tests need and checks everything: ruff, shellcheck, mypy, pytest.
# The clients that tests/clients tries go into .venv-clients, once for each change of their lists.
#
# Without arguments all tests run, in parallel, and the coverage of each package is printed and must not fall.
# Where CI=true a skipped test counts as a failure. Exit code 0 only if every check passed.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
# shellcheck source=deploy/environment.sh
source deploy/environment.sh
export PYTHONDONTWRITEBYTECODE=1
WORKERS=3    # many tests wait for servers and browsers, so two cores take more than two
# The models in the tests are small: more threads gain nothing, and lose much when other processes use the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The tests choose their own ports, keys and folders; the settings of whoever runs them must not leak in.
for name in "${!GLM_@}"; do unset "$name"; done

choose_python requirements-test.txt || exit 2

install_debian_packages() {
    local lacking=()
    command -v chromium >/dev/null || lacking+=(chromium)
    command -v shellcheck >/dev/null || lacking+=(shellcheck)
    command -v g++ >/dev/null || lacking+=(g++)
    command -v flock >/dev/null || lacking+=(util-linux)
    command -v cron >/dev/null || lacking+=(cron)
    command -v systemd-analyze >/dev/null || lacking+=(systemd)
    [[ -x /usr/sbin/logrotate ]] || command -v logrotate >/dev/null || lacking+=(logrotate)
    command -v promtool >/dev/null || lacking+=(prometheus)
    command -v prometheus-alertmanager >/dev/null || lacking+=(prometheus-alertmanager)
    command -v prometheus-node-exporter >/dev/null || lacking+=(prometheus-node-exporter)
    command -v prometheus-pushgateway >/dev/null || lacking+=(prometheus-pushgateway)
    command -v buildah >/dev/null || lacking+=(buildah)
    [[ -x /usr/sbin/debootstrap ]] || lacking+=(debootstrap)
    [[ -x /usr/sbin/nginx ]] || command -v nginx >/dev/null || lacking+=(nginx-light)
    # No pipe into grep -q: it ends early, and under pipefail the ended fc-list would count as a missing font.
    [[ $(fc-list 2>/dev/null) == *CJK* ]] || lacking+=(fontconfig fonts-noto-cjk)
    ((${#lacking[@]})) || return 0
    if ! command -v apt-get >/dev/null || ((EUID != 0)); then
        complain "The tests need these Debian packages; install them and run ./test.sh again: ${lacking[*]}"
        return 1
    fi
    say "Installing Debian packages: ${lacking[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${lacking[@]}" >/dev/null
}
install_debian_packages || exit 2

# While style and types are checked.
clients_log=$(mktemp)
clients=
if (($# == 0)) || [[ " $*" == *" tests/clients"* ]]; then
    tests/clients/install.sh "$PYTHON" &>"$clients_log" &
    clients=$!
fi

failed=()
check() { # NAME COMMAND...
    local name=$1
    shift
    say "== $name"
    "$@" || failed+=("$name")
}
check ruff "$PYTHON" -m ruff check .
mapfile -t scripts < <(find . -path './.venv*' -prune -o -name '*.sh' -print | sort)
check shellcheck shellcheck -x "${scripts[@]}" .ci/run
check mypy "$PYTHON" -m mypy

if [[ $clients ]] && ! wait "$clients"; then
    cat "$clients_log"
    failed+=("installing the clients")
fi
rm -f "$clients_log"

# pytest comes last, so that its closing line ends the output.
say "== pytest"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
report=$scratch/report.xml
status=0
((${#failed[@]})) && say "(failed before the tests: ${failed[*]})"
whole=()
if (($# == 0)); then
    # A worker that dies ends the run: its tests would be counted as neither passed nor failed.
    whole=(-n "$WORKERS" --dist loadfile --no-loadscope-reorder --max-worker-restart=0)
    whole+=(--cov=api --cov=web --cov=monitor --cov-report=)
    export COVERAGE_FILE=$scratch/coverage
fi
"$PYTHON" -m pytest -p no:cacheprovider --junit-xml="$report" -rs "${whole[@]}" "$@" || status=$?
if [[ ${CI:-} == true ]] && ! grep -q 'skipped="0"' "$report"; then
    complain "Skipped tests count as failures here (CI=true): the list is above"
    status=1
fi
((${#failed[@]})) && { complain "Failed: ${failed[*]}"; status=1; }
exit "$status"
