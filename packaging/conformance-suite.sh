#!/bin/sh
# conformance-suite.sh DIR: TUF's conformance suite as DIR/suite, and DIR/bin/pytest to run it with.
#
# https://github.com/theupdateframework/tuf-conformance, or the checkout that CONFORMANCE_SUITE names. It pins its own
# tuf and pytest, hence an environment of its own. Some of its tests move the clock with faketime.
set -eu
commit=eec841c186f81f2d9d8d30460c7e7deefa615f9e # 2026-08-17: 113 tests
origin=${CONFORMANCE_SUITE:-https://github.com/theupdateframework/tuf-conformance}
[ $# = 1 ] || {
    echo "expected: conformance-suite.sh DIR; got $# arguments" >&2
    exit 2
}
here=$(cd "$(dirname "$0")" && pwd)
if ! command -v faketime >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y faketime >/dev/null || true
fi
command -v faketime >/dev/null || {
    echo "expected: the program faketime, which tests of expiry need; got none" >&2
    echo "hint: sudo apt-get install faketime" >&2
    exit 1
}
rm -rf "$1"
sh "$here/make-venv.sh" "$1"
cd "$1"
git clone --quiet --no-checkout "$origin" suite && git -C suite checkout --quiet "$commit" || {
    rm -rf suite
    echo "expected: commit $commit from $origin; got none" >&2
    echo "hint: CONFORMANCE_SUITE=DIR make conformance, where DIR is a clone of tuf-conformance" >&2
    exit 1
}
bin/python -m pip install --quiet --disable-pip-version-check ./suite
touch .made # the last thing to appear: whoever looks for it finds all, or nothing
