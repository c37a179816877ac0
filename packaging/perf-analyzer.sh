#!/bin/sh
# perf-analyzer.sh DIR: Triton's perf_analyzer as DIR/bin/perf_analyzer, for tests/agent/test_perf_analyzer.py.
#
# NVIDIA publishes no package of it. The last wheel of tritonclient that carries the program is 2.41.1; it needs two
# libraries beside the system's: libb64 from Debian and libcudart from PyPI, though no GPU. 16 MB of download, 19 MB on disk.
set -eu
[ $# = 1 ] || {
    echo "expected: perf-analyzer.sh DIR; got $# arguments" >&2
    exit 2
}
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
rm -rf "$1"
mkdir -p "$1/bin" "$1/lib" "$1/parts"
cd "$1"
fetch() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest parts "$1"
    "$python" -m zipfile -e parts/"$2"*.whl parts/"$2"
}
fetch tritonclient==2.41.1 tritonclient
cp parts/tritonclient/tritonclient-*.data/data/bin/perf_analyzer lib/
fetch nvidia-cuda-runtime-cu12==12.9.79 nvidia_cuda_runtime
cp parts/nvidia_cuda_runtime/nvidia/cuda_runtime/lib/libcudart.so.12 lib/
(
    cd parts
    download="apt-get -qq -o APT::Sandbox::User=root download libb64-0d"
    $download 2>/dev/null || { apt-get -qq update && $download; } # the list of packages may be missing or old
)
dpkg-deb -x parts/libb64-0d_*.deb parts/libb64
find parts/libb64 -name 'libb64.so.0d*' -exec cp -P {} lib/ \;
rm -r parts
chmod 755 lib/perf_analyzer
said=$(LD_LIBRARY_PATH=lib lib/perf_analyzer --version 2>&1) || {
    echo "expected: a perf_analyzer that starts on this machine; got: $said" >&2
    exit 1
}
# The last thing to appear: whoever looks for it finds a program that runs, or nothing.
cat >bin/perf_analyzer <<'END'
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)
LD_LIBRARY_PATH=$here/lib exec "$here/lib/perf_analyzer" "$@"
END
chmod 755 bin/perf_analyzer
