#!/bin/sh
# The entries of a lock, with their hashes, for the distributions that lists name: lock-part.sh LOCK LIST ...
set -eu
lock=$1
shift
awk -v lock="$lock" '
    FILENAME != lock { if (/^[a-z]/) { split($1, n, /[=<>]/); wanted[n[1]] }; next }
    /^[a-z]/ { split($1, n, "=="); if (on = n[1] in wanted) found[n[1]] }
    on
    END { for (name in wanted) if (!(name in found)) { print lock " has no " name > "/dev/stderr"; exit 1 } }
' "$@" "$lock"
