#!/bin/sh
# second-ep-venv.sh DIR: Skerry on another ONNX Runtime core, for tests/providers/test_second_ep.py.
#
# onnxruntime-openvino runs on any x86-64 CPU and cannot stand beside the plain core, hence an environment of
# its own: 84 MB of download, 560 MB on disk. Everything else is the same as in .venv, the daemon included.
set -eu
[ $# = 1 ] || {
    echo "expected: second-ep-venv.sh DIR; got $# arguments" >&2
    exit 2
}
here=$(dirname "$0")
[ -x "$1/bin/python" ] || sh "$here/make-venv.sh" "$1"
"$1/bin/python" -m pip install --quiet --editable "$here/..[openvino]"
