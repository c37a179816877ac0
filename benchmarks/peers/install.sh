#!/bin/sh
# install.sh DIR: the servers that Skerry is compared with, each in an environment of its own, because their pins
# exclude each other. 1.3 GB of disk. One that cannot be installed leaves DIR/NAME.failed with the reason, which the
# results show; the others go on.
#
# All run the ONNX Runtime that Skerry runs here, so that the comparison is one of servers.
set -u
[ $# = 1 ] || {
    echo "expected: install.sh DIR; got $# arguments" >&2
    exit 2
}
here=$(dirname "$0")
runtime="onnxruntime>=1.31,<1.32"

# install NAME PYTHON PACKAGE...
install() {
    name=$1 interpreter=$2
    shift 2
    rm -rf "$peers/$name" "$peers/$name.failed"
    echo "peer $name: $*"
    { PYTHON=$interpreter sh "$here/../../packaging/make-venv.sh" "$peers/$name" &&
        "$peers/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$runtime" "$@"; } \
        >"$peers/$name.log" 2>&1 && return
    tail -n 1 "$peers/$name.log" >"$peers/$name.failed"
    echo "peer $name: not installed: $(cat "$peers/$name.failed")" >&2
}

mkdir -p "$1"
peers=$(cd "$1" && pwd)
python=${PYTHON:-python3}
install fastapi "$python" "fastapi==0.163.2" "uvicorn[standard]==0.54.0"
install litserve "$python" "litserve==0.2.19"
# uvloop 0.22 broke the way in which MLServer 1.7.1 makes its event loop.
install mlserver "$python" "mlserver==1.7.1" "uvloop<0.22"
# Triton's Python backend looks for its libpython where a distribution's Python has it.
debian=/usr/bin/python3
[ -x $debian ] || debian=$python
install triton $debian "nvidia-pytriton==0.7.0"
