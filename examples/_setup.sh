# shellcheck shell=bash
# Source this file. Makes the virtual environment, or keeps it if it is up to date.
#
#   VENV         its folder (default: .venv); paths are relative to the repository
#   PYTHON       the interpreter that makes it (default: python3)
#   CONSTRAINTS  the versions in it (default: requirements/constraints.txt, for Python 3.11;
#                requirements/constraints-newest.txt is for Python 3.13)
#
# Sets ROOT (the repository), VENV and PY (the environment's python), and changes to ROOT.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$ROOT/$VENV
PY=$VENV/bin/python
CONSTRAINTS=${CONSTRAINTS:-requirements/constraints.txt}

fail() {
    echo "error: $*" >&2
    exit 1
}

make_environment() {
    local python=${PYTHON:-python3} stamp=$VENV/.requirements log=$VENV/setup.log key version
    command -v "$python" >/dev/null || fail "$python: not found; set PYTHON to a Python 3.11 to 3.13"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
        fail "$python is $("$python" -V 2>&1), needs 3.11 to 3.13; set PYTHON"
    [[ -r $CONSTRAINTS ]] || fail "$CONSTRAINTS: no such file of constraints; set CONSTRAINTS"
    version=$("$python" -V)
    key=$(cat requirements/cpu.txt "$CONSTRAINTS" setup.py <(echo "$version $ROOT") | sha256sum | cut -d' ' -f1)
    [[ -x $PY && $(cat "$stamp" 2>/dev/null) == "$key" ]] && return
    echo "making the environment $VENV (some minutes, once)"
    if [[ $("$PY" -V 2>&1) != "$version" ]] || ! "$PY" -m pip --version >/dev/null 2>&1; then
        timeout --foreground 120 "$python" -m venv --clear "$VENV" ||
            fail "$python -m venv failed; on Debian or Ubuntu: apt-get install python3-venv"
    fi
    rm -f "$stamp"
    # pip settings of the user that are meaningless or harmful in a virtual environment.
    unset PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_HASHES PIP_CONSTRAINT
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
    {
        timeout --foreground 1800 "$PY" -m pip install --progress-bar off -r requirements/cpu.txt -c "$CONSTRAINTS" &&
            # setuptools is installed by now, so building this package downloads nothing.
            timeout --foreground 300 "$PY" -m pip install --no-deps --no-build-isolation -e .
    } >"$log" 2>&1 || fail "$(grep -m1 -iE '^ *error' "$log" || tail -n 1 "$log") (see $log)"
    echo "$key" >"$stamp"
}

make_environment
export PATH=$VENV/bin:$PATH
