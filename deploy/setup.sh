#!/bin/sh
# Builds a virtual environment from a lock: setup.sh VENV LOCK
# uv is used when pip can bring it (seconds), plain pip otherwise (minutes). Torch stands outside the lock because
# its builds differ by machine: the same pin is a CPU or a CUDA build, with its own dependencies.
set -eu
venv=$1 lock=$2
torch=$(cat deploy/torch.txt)
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; set PYTHON to one (found: $("$python" --version))" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# uv does not read pip's configuration, so a local folder of wheels is passed on.
UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
[ -z "$UV_FIND_LINKS" ] || export UV_FIND_LINKS
if [ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet 'uv>=0.9' 2>/dev/null; then
    install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }
    compile=--compile-bytecode
else
    echo 'uv is not to be had, using pip (slower)' >&2
    install() { "$venv/bin/python" -m pip install --quiet "$@"; }
    compile=--compile
fi
echo "installing $lock into $venv" >&2
install --require-hashes --no-deps "$compile" -r "$lock"
install "$compile" "$torch"
install --no-deps --no-build-isolation --editable .
