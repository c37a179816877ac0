#!/bin/sh
# make-venv.sh DIR: a virtual environment, also on a Debian whose python3 came without venv.
set -eu
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Skerry needs Python 3.11 or newer, got: $("$python" --version 2>&1)" >&2
    echo "hint: make PYTHON=/path/to/python3.11 ..." >&2
    exit 1
}
"$python" -m venv "$1" 2>/dev/null && exit 0
rm -rf "$1"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null
    exec "$python" -m venv "$1"
fi
echo "expected: a Python that can make virtual environments; got one without the venv module" >&2
echo "hint: sudo apt-get install python3-venv" >&2
exit 1
