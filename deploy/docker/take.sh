#!/usr/bin/env bash
# Take the archives of a folder into one that nobody else writes to, with their golden images beside them, and only if
# the owner of the key signed them.
# Usage: deploy/docker/take.sh FROM TO KEY.pub      makes TO/store/NAME.mar and TO/golden/NAME
set -euo pipefail
if (($# != 3)); then
    echo "usage: deploy/docker/take.sh FROM TO KEY.pub" >&2
    exit 2
fi
from=$(realpath "$1") to=$(realpath "$2") key=$(realpath "$3")
cd "$(dirname "$0")/../.."
shopt -s nullglob
archives=("$from"/*.mar)
if ((${#archives[@]} == 0)); then
    echo "error: no archive in $from: copy NAME.mar and NAME.mar.sig there" >&2
    exit 1
fi
incoming=$(mktemp --directory "$to/incoming.XXXXXX")
trap 'rm -rf "$incoming"' EXIT
rm -rf "${to:?}/store" "${to:?}/golden"
mkdir "$incoming/store" "$incoming/golden" "$incoming/unpacked"
for archive in "${archives[@]}"; do
    name=$(basename "$archive" .mar)
    cp "$archive" "$archive.sig" "$incoming/store/"
    # The copy is what is verified: the folder may change meanwhile.
    python -m archive verify "$incoming/store/$name.mar" --public-key "$key"
    python -m zipfile --extract "$incoming/store/$name.mar" "$incoming/unpacked/$name"
    mv "$incoming/unpacked/$name/golden" "$incoming/golden/$name"
done
mv "$incoming/store" "$incoming/golden" "$to/"
