# What the tests of real clients share. Sourced, from the root of the project.
#
# shellcheck shell=bash

. scripts/lib.sh

# In a machine that can build nothing (testbed/cuse): a directory with the arguments of the guest's QEMU, and the patched QEMU with its
# libraries. The programs under test are in /bin.
prepared=${VDPA_PREPARED:-}
# How many times as long as usual things may take, for a host that is busy or emulated.
slowness=${VDPA_SLOWNESS:-1}

work=$(mktemp -d "${TMPDIR:-/tmp}/vdpa-client.XXXXXX")
. testbed/packages.sh
mkdir -p "$cache"

# Where the daemon is that the functions below are about; one script may have several.
place=$work
daemon= daemons=
client=
finish() {
    local code=$?
    trap - EXIT
    local group
    for group in $(jobs -pr); do
        case " $daemons " in *" $group "*) continue ;; esac
        kill -- "-$group" 2>/dev/null || continue
        local left=30
        while [ $((left -= 1)) -gt 0 ] && kill -0 "$group" 2>/dev/null; do sleep 0.1; done
        # A program that waits for its disk does not end otherwise.
        kill -KILL -- "-$group" 2>/dev/null || true
    done
    local each log
    for each in $daemons; do { kill "$each" 2>/dev/null && wait "$each"; } || true; done
    for log in "$work"/{,*/}vdpad.log; do
        [ "$code" = 0 ] || [ ! -s "$log" ] || { printf -- '---- log of vdpad\n' && tail -n 40 "$log"; } >&2
    done
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

# build: the programs under test, once for all scripts of a run.
build() {
    [ -z "$prepared" ] || { bin=/bin && return; }
    need_rust
    [ -n "${VDPA_BUILT:-}" ] || cargo build --release --locked --bins --package vdpad --package vdpactl --package vdpa-bench
    bin=${CARGO_TARGET_DIR:-target}/release
    export VDPA_BUILT=1
}

# start_daemon [ARG...]: a vdpad of this run; returns when it serves.
start_daemon() {
    mkdir -p "$place"
    mkfifo "$place/ready"
    local options=(--dir "$place/dev" --request-timeout $((30 * slowness)))
    [ "${VDPAD_TEST_FRONT:-fuse}" != cuse ] || options=(--front cuse "${options[@]:2}")
    "$bin/vdpad" "${options[@]}" --socket "$place/control" --log "${VDPAD_TEST_LOG:-info}" "$@" >"$place/ready" 2>"$place/vdpad.log" &
    daemon=$! daemons+=" $!"
    local line=
    read -r line <"$place/ready" || true
    [ "$line" = ready ] || die 'vdpad did not start'
}

ctl() { "$bin/vdpactl" --socket "$place/control" "$@"; }

# add_dev NAME MGMTDEV [ATTRIBUTE VALUE]...: prints the path of the device file.
add_dev() {
    local name=$1 mgmtdev=$2
    shift 2
    ctl dev add name "$name" mgmtdev "$mgmtdev" "$@" && path_of "$name"
}

path_of() { ctl -s dev show "$1" | sed -n 's/^  path //p'; }

# pinned: where the daemon has memory pinned, and how much.
pinned() {
    local ring text left=1000
    for ring in "/proc/$daemon/fd/"*; do
        [[ $(readlink "$ring") == *io_uring* ]] || continue
        # The kernel leaves out the list of a ring that is in use at that moment.
        until text=$(cat "/proc/$daemon/fdinfo/${ring##*/}" 2>/dev/null) && [[ $text == *UserBufs:* ]]; do
            [ -e "$ring" ] || continue 2
            [ $((left -= 1)) -gt 0 ] || die "$ring of vdpad has no list of buffers"
            sleep 0.01
        done
        sed -n '/^UserBufs/,/^[^ \t]/p' <<<"$text" | grep -a '0x.*/' || true
    done
}

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

not() { ! "$@" >/dev/null; }

# shared_root SUITE PACKAGE...: prints the directory in which the packages are unpacked.
shared_root() {
    local root
    root=$(root_of "$@")
    (flock 9 && fetch_root "$root" "$@") 9>"$cache/lock" && echo "$root"
}

# What the scripts fetch, besides the machine's tools.
blkio_root() { shared_root "${1:-trixie}" qemu-utils qemu-block-extra libblkio-dev; }

# guest_memory shared|private MIB: arguments of QEMU for memory that others can map, or none for its own default.
guest_memory() {
    case $1 in
        shared) printf -- '-object memory-backend-memfd,id=ram,share=on,size=%sM -machine memory-backend=ram' "$2" ;;
        private) ;;
        *) die "no memory $1" ;;
    esac
}

# follow: has the daemon write down every request. Before start_daemon.
follow() { VDPAD_TEST_LOG=${VDPAD_TEST_LOG:-info,vdpa_backend::front::vhost=trace}; }

# requests: what was asked of the devices, in order: an ioctl by its name, with what it gave back in bytes, or UPDATE,
# INVALIDATE, BATCH_BEGIN and BATCH_END with address space, address and size.
requests() {
    sed -nE 's/\x1b\[[0-9;]*m//g
        s/.* request="([A-Z_]+)".* result=Ok\(IoctlReply \{ result: 0, out: \[([0-9, ]*)\].*/\1 \2/p
        s/.* IOTLB .* asid=([0-9]+) .*iova: ([0-9]+), size: ([0-9]+),.* kind: ([0-9]) \} result=Ok.*/\4 \1 \2 \3/p' "$place/vdpad.log" |
        sed -E 's/^VHOST_(VDPA_)?//; s/^2 /UPDATE /; s/^3 /INVALIDATE /; s/^5 /BATCH_BEGIN /; s/^6 /BATCH_END /; s/ *$//'
}

# asked PATTERN...: whether there are requests like these, one after the other, with any others in between.
asked() {
    requests | awk 'BEGIN { for (i = 1; i < ARGC; i++) want[i] = ARGV[i]; count = ARGC - 1; ARGC = 1; at = 1 }
        at <= count && $0 ~ want[at] { at++ }
        END { if (at <= count) { print "not asked: " want[at]; exit 1 } }' "$@"
}

# at_once PATTERN: whether requests with these names come one right after the other, but for those of rings and of batches.
at_once() {
    requests | awk '!/^([GS]ET_VRING|BATCH)/ { printf "%s ", $1 }' >"$work/names"
    grep -qE "$1 " "$work/names"
}

# status_at PATTERN: the status that the client has last read when it makes the first such request.
status_at() { requests | awk -v want="$1" '/^GET_STATUS/ { status = $2 } at == "" && $0 ~ want { at = status } END { print at }'; }

# machine N ARG...: starts QEMU number N by "command", as testbed/vm -n has left it. It is told what to do through a pair of
# pipes and has its console in a file.
machine() {
    local number=$1
    shift
    mkfifo "$work/qmp$number.in" "$work/qmp$number.out"
    begin "${command[@]}" -qmp "pipe:$work/qmp$number" "$@" </dev/null \
        >"$work/console$number" 2>"$work/qemu$number.log"
    exec {to}<>"$work/qmp$number.in" {from}<>"$work/qmp$number.out"
    eval "to$number=$to from$number=$from"
}

# qmp N COMMAND [ARGUMENTS]: prints the answer of QEMU number N.
qmp() {
    local to=to$1 from=from$1 line=
    printf '{"execute": "%s"%s}\n' "$2" "${3:+, \"arguments\": $3}" >&"${!to}"
    while read -r -t $((60 * slowness)) -u "${!from}" line; do
        case $line in '{"return"'* | '{"error"'*) printf '%s\n' "$line" && return ;; esac
    done
    die "QEMU $1 does not answer to $2: $(cat "$work/qemu$1.log")"
}

# wait_for N PATTERN SECONDS: until the console of machine N has a line, at most so long.
wait_for() {
    local deadline=$((SECONDS + $3 * slowness))
    until grep -q "$2" "$work/console$1"; do
        [ $SECONDS -lt $deadline ] || die "machine $1 has not come to: $2. $(tail -n 5 "$work/console$1" "$work/qemu$1.log")"
        sleep 0.02
    done
}
good() { [[ $1 == '{"return"'* ]] || die "QEMU says: $1"; }
