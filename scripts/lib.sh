# Shared by ./demo, ./test and .ci/run: tools that must be there. Sourced, never run.

# The oldest compiler that builds the workspace: rust-version in Cargo.toml.
rust_minimum=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# The test runner where there is none: the newest that rust_minimum builds.
nextest_version=0.9.128

# can_install: whether packages of Debian or Ubuntu can be installed here.
can_install() { have apt-get && [ "$(id -u)" = 0 ]; }

# apt_lists: refreshes the package lists, once for all.
apt_lists() {
    [ "${apt_lists_fresh:-0}" = 1 ] && return
    apt-get -qq update >/dev/null || return
    apt_lists_fresh=1
}

# apt_install PACKAGE...: removes nothing to make room, and adds nothing that is only recommended.
apt_install() {
    apt_lists && DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y --no-install-recommends --no-remove install "$@" >/dev/null
}

# need_apt PROGRAM PACKAGE: makes PROGRAM available, from PACKAGE where this user may install it.
need_apt() {
    have "$1" && return
    if can_install; then
        printf 'Installing %s, which provides %s\n' "$2" "$1"
        apt_install "$2" || die "missing $1: apt-get install $2 failed"
    fi
    have "$1" || die "missing $1: install the package $2 (Debian, Ubuntu) or its like"
}

# at_least VERSION MINIMUM
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# rust_version: prints the version of the compiler; fails where cargo or a compiler is missing.
rust_version() {
    have cargo && have rustc && rustc --version 2>/dev/null | sed -n 's/^rustc \([0-9.]*\).*/\1/p' | grep .
}

# apt_rust: prints the package of a compiler that is new enough, with the release to take it from where it is not the
# default. cargo-web is the compiler that Debian 12 and 13 keep current to build browsers.
apt_rust() {
    local package version origin
    for package in cargo cargo-web; do
        version=$(apt-cache policy "$package" | sed -n 's/^  Candidate: \([0-9][0-9.]*\).*/\1/p')
        if [ -n "$version" ] && at_least "$version" "$rust_minimum"; then
            echo "$package"
            return
        fi
    done
    # Backports are no candidate unless asked for.
    origin=$(apt-cache madison cargo | sed -n 's/^.* \([a-z]*-backports\)\/.*/\1/p' | head -n 1)
    version=$(apt-cache madison cargo | sed -n 's/^ *cargo | \([0-9][0-9.]*\).*-backports\/.*/\1/p' | head -n 1)
    [ -n "$version" ] && at_least "$version" "$rust_minimum" && echo "cargo/$origin rustc/$origin"
}

# install_rust: from packages, or by the package rustup. Fails where neither is to be had.
install_rust() {
    local packages
    can_install && apt_lists || return
    if packages=$(apt_rust); then
        printf 'Installing %s, which provides Rust %s or later\n' "$packages" "$rust_minimum"
        # shellcheck disable=SC2086
        apt_install $packages ca-certificates && return
    fi
    apt-cache show rustup >/dev/null 2>&1 || return
    printf 'Installing rustup, and with it the stable toolchain of Rust\n'
    apt_install rustup ca-certificates && rustup toolchain install --profile minimal stable
}

# need_rust: a C linker and a compiler that is new enough.
need_rust() {
    local now command="curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"
    if [ -d "$HOME/.cargo/bin" ]; then PATH=$PATH:$HOME/.cargo/bin; fi
    need_apt cc build-essential
    now=$(rust_version) && at_least "$now" "$rust_minimum" && return
    if have rustup; then
        # Which toolchains there are is for its user to decide.
        command='rustup toolchain install stable'
    else
        install_rust || true
        hash -r
        now=$(rust_version) && at_least "$now" "$rust_minimum" && return
    fi
    die "${now:+rustc $now is too old: }Rust $rust_minimum or later is needed; get it with: $command"
}

# need_nextest: the test runner, from the registry when it is absent.
need_nextest() {
    cargo nextest --version >/dev/null 2>&1 && return
    printf 'Installing cargo-nextest %s\n' "$nextest_version"
    cargo install --locked --quiet "cargo-nextest@$nextest_version" ||
        die "missing cargo-nextest: cargo install --locked cargo-nextest@$nextest_version failed"
}

# test_program NAME [OPTION...]: builds the test NAME of the package vdpad and prints its path. With VDPA_TESTS_BUILT as one of all tests:
# after ./test there is nothing to build then, whereas cargo unites other features of the dependencies for one test alone.
test_program() {
    local name=$1 only=(--test "$1")
    shift
    [ -z "${VDPA_TESTS_BUILT:-}" ] || only=()
    cargo test --workspace --all-features --locked --no-run "${only[@]}" "$@" --message-format json-render-diagnostics |
        sed -n "s/.*\"executable\":\"\([^\"]*\/$name-[^\"]*\)\".*/\1/p" | tail -n 1 | grep . || die "the test $name was not built"
}
