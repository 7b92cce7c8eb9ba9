#!/usr/bin/env bash
# Prove the image where no Docker engine runs: build the Dockerfile on a bare Debian, run server and edge as
# compose.yaml does, ask for a prediction, and stop them. Takes some minutes and 15 GB; leaves nothing behind.
# Usage: sudo deploy/docker/prove.sh cpu|gpu|IMAGE RUN_FOLDER [BUILD_OPTION]...      IMAGE: one that Podman has already
# Needs Debian's packages debootstrap, buildah, podman and runc, and openssl. RUN_FOLDER is what training wrote. Build
# options are buildah's, for example --build-arg TORCH_INDEX_URL=... or --secret id=pip.conf,src=FILE.
set -euo pipefail
cd "$(dirname "$0")/../.."
if (($# < 2)) || [[ ! -f $2/golden/golden.json ]]; then
    echo "usage: deploy/docker/prove.sh cpu|gpu|IMAGE RUN_FOLDER [BUILD_OPTION]..." >&2
    exit 2
fi
target=$1 run=$(realpath "$2")
shift 2
for program in debootstrap buildah podman runc openssl; do
    if ! command -v "$program" >/dev/null; then
        echo "error: $program is needed: install your system's package of that name" >&2
        exit 1
    fi
done
model=$(basename "$run") image=localhost/proved-classifier bare=localhost/proved-python work=$(mktemp --directory)
server=proved-server edge=proved-edge
storage=()
# What is built here goes as a whole.
[[ $target != cpu && $target != gpu ]] || storage=(--root "$work/storage" --runroot "$work/state")
# Health is asked for here; by itself Podman would need systemd for that.
export DISABLE_HC_SYSTEMD=true
podman=(podman "${storage[@]}" --runtime runc)

clean() {
    "${podman[@]}" rm --force --time 0 "$edge" "$server" >/dev/null 2>&1 || true
    "${podman[@]}" volume rm --force proved-run proved-models proved-bodies >/dev/null 2>&1 || true
    "${podman[@]}" untag "$image" "$image" >/dev/null 2>&1 || true
    ((${#storage[@]} == 0)) || buildah "${storage[@]}" rm --all >/dev/null 2>&1 || true  # of a build that failed
    umount "$work/storage/overlay" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT

proved() { echo "proved      $*"; }
fail() { echo "error: $*" >&2 && exit 1; }

# Await SECONDS WHAT COMMAND...
await() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >"$work/awaited" 2>&1; do
        ((SECONDS < deadline)) || fail "$what: $(tail -n 3 "$work/awaited")"
        sleep 0.5
    done
}

# A container as compose.yaml confines it; no network but the loopback address.
confined=(
    --read-only --cap-drop all --security-opt no-new-privileges --tmpfs "/tmp:noexec,nosuid,nodev"
    --ulimit "nofile=$(ulimit -Hn)" --ulimit nproc=4096
)

build() {
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/root" \
        >"$work/debootstrap.log"
    ln -s python3 "$work/root/usr/bin/python"
    # As in images: no service starts.
    install -m 755 /dev/stdin "$work/root/usr/sbin/policy-rc.d" <<<$'#!/bin/sh\nexit 101'
    cp -L /etc/ssl/certs/ca-certificates.crt "$work/root/etc/ssl/certs/"
    tar --directory "$work/root" --create . | "${podman[@]}" import --quiet - "$bare"
    rm -rf "$work/root"
    buildah "${storage[@]}" build --format docker --isolation chroot --network host --layers --build-arg "PYTHON_IMAGE=$bare" \
        --file deploy/docker/Dockerfile --target "$target" --tag "$image" "$@" .
    proved "every step of the Dockerfile for $target, on a bare Debian"
}

archives() {
    .venv/bin/python -m archive keygen "$work/mine" && .venv/bin/python -m archive keygen "$work/foreign"
    mkdir "$work/archives"
    .venv/bin/python -m archive build "$run" --model-store "$work/archives" --private-key "$work/mine"
    cp "$run"/golden/*.png "$work/archives/"
    local take=("${podman[@]}" run --rm --network none "${confined[@]}" --volume "$work/archives:/run/archives:ro"
        --volume proved-models:/run/models:U)
    "${take[@]}" --volume "$work/mine.pub:/run/archive.pub:ro" "$image" \
        deploy/docker/take.sh /run/archives /run/models /run/archive.pub
    if "${take[@]}" --volume "$work/foreign.pub:/run/archive.pub:ro" "$image" \
        deploy/docker/take.sh /run/archives /run/models /run/archive.pub; then
        fail "an archive that somebody else signed was taken"
    fi
    proved "take.sh takes a signed archive, and none that somebody else signed"
}

serve() {
    "${podman[@]}" run --detach --name "$server" --network none "${confined[@]}" \
        --volume "$work/archives:/app/model_store:ro" --volume proved-run:/run/torchserve \
        --volume "$work/mine.pub:/run/archive.pub:ro" --env ARCHIVE_PUBLIC_KEY=/run/archive.pub \
        "$image" scripts/serve.sh cpu --foreground --run-dir /run/torchserve >/dev/null
    # The health check itself waits for seconds, in which a small model is up; this is one look.
    "${podman[@]}" exec "$server" deploy/docker/healthcheck.sh --workers >/dev/null 2>&1 && fail "healthy before it is ready"
    await 120 "the server is not healthy" "${podman[@]}" healthcheck run "$server"
    proved "healthy once its model is ready, and not before"
    [[ $("${podman[@]}" exec "$server" id --user) == 10001 ]] || fail "it is not the user 10001"
    "${podman[@]}" exec "$server" touch /app/file 2>/dev/null && fail "the root file system can be written to"
    "${podman[@]}" exec "$server" cat /proc/1/status | grep --quiet "^CapEff:.*[1-9a-f]" && fail "it has capabilities"
    proved "user 10001, read-only root, no capabilities, no network"
}

guard() {
    openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
        -keyout "$work/certificate.key" -out "$work/certificate.pem" 2>/dev/null
    sed 's|default "";|default ""; "Bearer proof" "proof";|' deploy/nginx/keys.conf >"$work/keys.conf"
    sed "s|lenet5-digits|$model|g" deploy/docker/servers.yaml >"$work/servers.yaml"
    chown 10001 "$work"/{keys.conf,certificate.*}
    local folder=/app/deploy/nginx
    "${podman[@]}" run --detach --name "$edge" --network "container:$server" "${confined[@]}" \
        --tmpfs "$folder/run:mode=1777" --tmpfs "$folder/logs:mode=1777" --volume proved-run:/run/torchserve:ro \
        --volume "proved-bodies:$folder/run/temp" \
        --volume "$work/servers.yaml:$folder/servers.yaml:ro" --volume "$work/keys.conf:$folder/keys.conf:ro" \
        --volume "$work/certificate.pem:$folder/certificate.pem:ro" \
        --volume "$work/certificate.key:$folder/certificate.key:ro" \
        --volume "$work/archives:/app/model_store:ro" "$image" python -m operate edge "$folder" >/dev/null
    await 60 "the edge does not answer" ask Bearer\ proof
    ask "Bearer another" >"$work/refused" 2>&1 && fail "the edge answers without a valid key"
    grep --quiet 401 "$work/refused" || fail "$(tail -n 1 "$work/refused")"
    proved "a prediction over TLS with a key of keys.conf, 401 without: $(ask Bearer\ proof)"
}

# Send a golden image to the edge, from within its container.
ask() {
    "${podman[@]}" exec --interactive "$edge" python - "$model" "$1" <<'PYTHON'
import ssl, sys, urllib.request
from pathlib import Path

model, key = sys.argv[1:]
image = sorted(Path("/app/model_store").glob("*.png"))[0].read_bytes()
headers = {"Authorization": key, "Content-Type": "application/octet-stream"}
request = urllib.request.Request(f"https://localhost:8443/predictions/{model}", image, headers)
trusted = ssl.create_default_context(cafile="/app/deploy/nginx/certificate.pem")
with urllib.request.urlopen(request, timeout=10, context=trusted) as answer:
    print(" ".join(answer.read().decode().split()))
PYTHON
}

stop() {
    "${podman[@]}" stop --time 70 "$edge" >/dev/null
    "${podman[@]}" stop --time 90 "$server" >/dev/null
    for name in "$edge" "$server"; do
        local status
        status=$("${podman[@]}" inspect --format '{{.State.ExitCode}}' "$name")
        [[ $status == 0 ]] || fail "$name ended with $status: $("${podman[@]}" logs "$name" 2>&1 | tail -n 5)"
    done
    "${podman[@]}" logs "$server" 2>&1 | grep --quiet "every request is answered" || fail "the server did not drain"
    [[ ! -e $("${podman[@]}" volume inspect --format '{{.Mountpoint}}' proved-run)/key_file.json ]] || fail "tokens were left"
    proved "SIGTERM: the edge finished, the server drained, both ended with 0, no token was left"
}

if [[ $target == cpu || $target == gpu ]]; then
    build "$@"
else
    "${podman[@]}" tag "$target" "$image"
fi
archives
serve
guard
stop
