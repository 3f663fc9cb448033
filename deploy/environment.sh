# shellcheck shell=bash
# Chooses the Python of start.sh and test.sh, which source this file with the project root as the working directory.
# Order: the active conda environment if it has the packages, the conda environment glm-env, .venv (created and filled
# here if needed).
#
# With START_SH_NO_INSTALL=1, which the checker sets for a cure, nothing is installed, created or removed: what is there is
# used, and if it does not do, the server says what it misses. Installing is left to start.sh run by a person.

CONDA_NAME=glm-env
MARK=.venv/.installing     # present while packages are installed; left over after an interrupted installation
NEEDED_MIB=2048            # torch without CUDA
CUDA_MIB=9216              # torch with CUDA
PYTHON=                    # set by choose_python

# Neither fails: work goes on when nobody reads, or the file that the output goes to is on a full disk.
say() { printf '%s\n' "$*" 2>/dev/null || true; }
complain() { printf '%s\n' "$*" >&2 || true; }

free_mib() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1024) }'; }

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# choose_python FILE: sets PYTHON to one that has every package of the requirements file.
choose_python() {
    local requirements=$1 missing conda_python
    if [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base && -x $CONDA_PREFIX/bin/python ]]; then
        PYTHON=$CONDA_PREFIX/bin/python
        [[ $CONDA_DEFAULT_ENV == "$CONDA_NAME" ]] && { install_into_conda "$requirements"; return; }
        if recent_enough "$PYTHON" && missing=$(trap '' INT; "$PYTHON" deploy/packages.py "$requirements"); then
            return 0
        fi
        missing=${missing:-its Python is older than 3.11}
        say "The active conda environment $CONDA_DEFAULT_ENV is not used: ${missing%%$'\n'*}"
    fi
    conda_python=$(named_conda_python)
    if [[ -n $conda_python ]]; then
        PYTHON=$conda_python
        install_into_conda "$requirements"
        return
    fi
    install_into_venv "$requirements"
}

named_conda_python() {
    local conda prefix
    conda=${CONDA_EXE:-$(command -v conda || true)}
    [[ -n $conda && -x $conda ]] || return 0
    prefix=$("$conda" env list 2>/dev/null | awk -v name="$CONDA_NAME" '$1 == name { print $NF }')
    if [[ -n $prefix && -x $prefix/bin/python ]]; then say "$prefix/bin/python"; fi
}

may_only_use() { [[ ${START_SH_NO_INSTALL:-} == 1 ]]; }

install_into_conda() {
    recent_enough "$PYTHON" || {
        complain "The conda environment $CONDA_NAME has a Python older than 3.11. Recreate it: conda env create --force -f environment.yml"
        return 1
    }
    install_missing "$1"
}

install_into_venv() {
    PYTHON=.venv/bin/python
    if may_only_use; then
        [[ -x $PYTHON ]] && return 0
        complain "There is no Python environment, and a restart by the checker installs nothing. Run ./start.sh yourself"
        return 1
    fi
    if [[ -e $MARK ]]; then
        may_install || return 1
        say "The last installation was interrupted; starting over"
        rm -rf .venv
    fi
    if ! { [[ -x $PYTHON ]] && recent_enough "$PYTHON" && "$PYTHON" -c 'import pip' 2>/dev/null; }; then
        may_install || return 1
        rm -rf .venv
        create_venv || return 1
    fi
    install_missing "$1"
}

may_install() {
    local folder
    for folder in . .venv; do
        if [[ -e $folder && ! -w $folder ]]; then
            complain "The packages cannot be installed: $(id -un) cannot write to $(realpath "$folder")"
            return 1
        fi
    done
}

create_venv() {
    local base
    base=$(base_python) || return 1
    say "Creating .venv with $("$base" --version)"
    # The mark comes first, so that a half-made venv is recognised too.
    mkdir -p .venv && : >"$MARK"
    "$base" -m venv .venv || { complain "$base -m venv .venv failed (see above)"; return 1; }
}

base_python() {
    local name without_venv='' too_old=''
    for name in python3.11 python3.12 python3.13 python3; do
        command -v "$name" >/dev/null || continue
        if ! recent_enough "$name"; then
            too_old=$name
        elif ! "$name" -c 'import venv, ensurepip' 2>/dev/null; then
            without_venv=$name
        else
            say "$name"
            return 0
        fi
    done
    if [[ -n $without_venv ]]; then
        complain "$without_venv cannot create virtual environments. On Debian and Ubuntu: apt-get install $without_venv-venv"
    else
        complain "Python 3.11 or newer is required. Found: $([[ -n $too_old ]] && "$too_old" --version 2>&1 || echo none)"
    fi
    return 1
}

install_missing() {
    local requirements=$1 missing available
    if may_only_use; then return 0; fi
    if missing=$(trap '' INT; "$PYTHON" deploy/packages.py "$requirements"); then
        if [[ -e $MARK ]]; then rm -f "$MARK"; fi
        return 0
    fi
    [[ $PYTHON != .venv/* ]] || may_install || return 1
    available=$(free_mib .)
    if ((available < NEEDED_MIB)); then
        complain "Not enough free disk to install the packages: $available MiB free in $PWD, at least $NEEDED_MIB MiB required"
        return 1
    elif ((available < CUDA_MIB)); then
        say "Note: $available MiB of disk free; torch with CUDA takes about $CUDA_MIB MiB during its installation"
    fi
    say "Installing $(wc -l <<<"$missing") packages of $requirements (a few minutes the first time; shown below)"
    [[ $PYTHON == .venv/* ]] && : >"$MARK"
    "$PYTHON" -m pip install --disable-pip-version-check -r "$requirements" || {
        complain "The installation failed (see above). Run the same command again to continue."
        return 1
    }
    rm -f "$MARK"
    missing=$("$PYTHON" deploy/packages.py "$requirements") || { complain "Still missing after the installation: $missing"; return 1; }
}
