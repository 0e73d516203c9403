# shellcheck shell=bash
# Source this file. Makes the virtual environment, or keeps it if it is up to date.
#
#   VENV    its folder (default: .venv in the repository)
#   PYTHON  the interpreter that makes it (default: python3); the pins are tested with 3.11
#
# Sets ROOT (the repository), VENV and PY (the environment's python), and changes to ROOT.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1
VENV=${VENV:-$ROOT/.venv}
PY=$VENV/bin/python

fail() {
    echo "error: $*" >&2
    exit 1
}

make_environment() {
    local python=${PYTHON:-python3} stamp=$VENV/.requirements log=$VENV/setup.log key version
    command -v "$python" >/dev/null || fail "$python: not found; set PYTHON to a Python 3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" -V 2>&1), needs 3.11 or later; set PYTHON"
    version=$("$python" -V)
    key=$(cat requirements/*.txt setup.py <(echo "$version $ROOT") | sha256sum | cut -d' ' -f1)
    [[ -x $PY && $(cat "$stamp" 2>/dev/null) == "$key" ]] && return
    echo "making the environment $VENV (some minutes, once)"
    if [[ $("$PY" -V 2>&1) != "$version" ]] || ! "$PY" -m pip --version >/dev/null 2>&1; then
        timeout 120 "$python" -m venv --clear "$VENV" ||
            fail "$python -m venv failed; on Debian or Ubuntu: apt-get install python3-venv"
    fi
    rm -f "$stamp"
    # pip settings of the user that are meaningless or harmful in a virtual environment.
    unset PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_HASHES PIP_CONSTRAINT
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
    {
        timeout 1800 "$PY" -m pip install --progress-bar off -r requirements/cpu.txt &&
            # setuptools is installed by now, so building this package downloads nothing.
            timeout 300 "$PY" -m pip install --no-deps --no-build-isolation -e .
    } >"$log" 2>&1 || fail "$(grep -m1 -iE '^ *error' "$log" || tail -n 1 "$log") (see $log)"
    echo "$key" >"$stamp"
}

make_environment
export PATH=$VENV/bin:$PATH
