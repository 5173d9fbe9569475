#!/bin/sh
# Tests, measurements and a short training on a machine with CUDA: gpu.sh [PART ...], by default all that are not done.
#
# PYTHON is the interpreter that holds torch. If there is a folder `wheels` (see `make wheels`), what it lacks is installed
# from there into an environment on top of it, without a network. A part may take LIMIT seconds; after one that fails the
# others go on. What is done is remembered in .gpu until a source changes; a part that is named runs again.
set -u
python=${PYTHON:-python3} limit=${LIMIT:-600} home=.gpu

if [ -d wheels ]; then
    "$python" -m venv --without-pip "$home/env" || exit 1
    # PYTHON may itself be of a virtual environment, and --system-site-packages would pass over that one.
    "$python" -c 'import sys
for path in sys.path:
    if path.endswith("-packages"): print(f"import site; site.addsitedir({path!r})")' > "$home/below.pth" || exit 1
    mv "$home/below.pth" "$("$home/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || exit 1
    "$python" -m pip --disable-pip-version-check --python "$home/env/bin/python" install --quiet --no-index \
        --find-links wheels --no-deps --no-cache-dir -r deploy/gpu.txt || exit 1
    python=$home/env/bin/python
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "$python has no torch that finds a CUDA device; set PYTHON to one that does" >&2
    exit 1
}

sources=$(find kernels model workers tests -name '*.py' -o -name '*.yaml' | LC_ALL=C sort | xargs cat | sha256sum)
kept=$home/$(echo "$sources" | cut -c1-12)
mkdir -p "$kept"
failed='' named=$#
[ $# -gt 0 ] || set -- tests ops step precision training train
for part; do
    if [ "$named" = 0 ] && [ -e "$kept/$part" ]; then
        echo "== $part: done"
        continue
    fi
    case $part in
        tests) arguments='pytest -m gpu tests' ;;
        ops) arguments='tests.benchmarks ops --device cuda --write-table' ;;
        train) arguments="workers.training sticker-adapter --out $kept/run --resume" ;;
        *) arguments="tests.benchmarks $part --device cuda" ;;
    esac
    echo "== $part: python -m $arguments"
    # shellcheck disable=SC2086  # arguments are words
    if timeout -k 30 "$limit" "$python" -m $arguments; then touch "$kept/$part"; else failed="$failed $part"; fi
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
