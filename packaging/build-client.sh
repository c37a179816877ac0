#!/bin/sh
# build-client.sh [DIR]: the wheel skerry-client, with no more than the client needs, into DIR (dist).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
source=$(dirname "$here")
python=${PYTHON:-python3}
mkdir -p "${1:-dist}"
target=$(cd "${1:-dist}" && pwd)

modules="__init__ address arrays asyncclient asynctransport calls client errors h1 plans receiver regions results
    retries sharing terms transport"

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir "$stage/skerry"
for module in $modules; do
    cp "$source/skerry/$module.py" "$stage/skerry/"
done
cp "$source/skerry/py.typed" "$stage/skerry/"
cp "$here/client/pyproject.toml" "$source/LICENSE" "$stage/"
cp "$source/docs/python.md" "$stage/README.md"
cd "$stage"
"$python" -m hatchling build --target wheel --directory "$target"
