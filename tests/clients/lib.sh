# What the tests of real clients share. Sourced, from the root of the project.
#
# shellcheck shell=bash

. scripts/lib.sh

work=$(mktemp -d "${TMPDIR:-/tmp}/vdpa-client.XXXXXX")
. testbed/packages.sh
mkdir -p "$cache"

daemon=
client=
finish() {
    local code=$?
    trap - EXIT
    local group
    for group in $(jobs -pr); do
        [ "$group" != "$daemon" ] || continue
        kill -- "-$group" 2>/dev/null || continue
        local left=30
        while [ $((left -= 1)) -gt 0 ] && kill -0 "$group" 2>/dev/null; do sleep 0.1; done
        # A program that waits for its disk does not end otherwise.
        kill -KILL -- "-$group" 2>/dev/null || true
    done
    [ -z "$daemon" ] || { kill "$daemon" 2>/dev/null && wait "$daemon"; } || true
    [ "$code" = 0 ] || [ ! -s "$work/vdpad.log" ] || { printf -- '---- log of vdpad\n' && tail -n 40 "$work/vdpad.log"; } >&2
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# build: the programs under test, once for all scripts of a run.
build() {
    need_rust
    [ -n "${VDPA_BUILT:-}" ] || cargo build --release --locked --package vdpad
    bin=${CARGO_TARGET_DIR:-target}/release
    export VDPA_BUILT=1
}

# start_daemon [ARG...]: a vdpad of this run; returns when it serves.
start_daemon() {
    mkfifo "$work/ready"
    "$bin/vdpad" --dir "$work/dev" --control "$work/control" --log "${VDPAD_TEST_LOG:-info}" "$@" >"$work/ready" 2>"$work/vdpad.log" &
    daemon=$!
    local line=
    read -r line <"$work/ready" || true
    [ "$line" = ready ] || die 'vdpad did not start'
}

ctl() { "$bin/vdpactl" --socket "$work/control" "$@"; }

# add_dev NAME MGMTDEV [ATTRIBUTE VALUE]...: prints the path of the device file.
add_dev() {
    local name=$1 mgmtdev=$2
    shift 2
    ctl dev add name "$name" mgmtdev "$mgmtdev" "$@" && path_of "$name"
}

path_of() { ctl -s dev show "$1" | sed -n 's/^  path //p'; }

# begin COMMAND...: in a process group of its own, which ends with the script at the latest.
begin() {
    setsid "$@" &
    client=$!
}

# finished: waits for what was begun; its status. Unlike a command in the foreground, it can be interrupted.
finished() {
    local code=0
    wait "$client" || code=$?
    client=
    return "$code"
}

# expect TEXT COMMAND...: says what is checked, and whether it was so.
expect() {
    local text=$1
    shift
    if "$@"; then printf 'ok    %s\n' "$text"; else die "FAILED $text: $*"; fi
}

# shared_root SUITE PACKAGE...: prints the directory in which the packages are unpacked.
shared_root() {
    local root
    root=$(root_of "$@")
    (flock 9 && fetch_root "$root" "$@") 9>"$cache/lock" && echo "$root"
}

# What the scripts fetch, besides the machine's tools.
blkio_root() { shared_root trixie qemu-utils qemu-block-extra libblkio-dev; }

# guest_memory shared|private MIB: arguments of QEMU for memory that others can map, or none for its own default.
guest_memory() {
    case $1 in
        shared) printf -- '-object memory-backend-memfd,id=ram,share=on,size=%sM -machine memory-backend=ram' "$2" ;;
        private) ;;
        *) die "no memory $1" ;;
    esac
}
