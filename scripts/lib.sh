# Shared by ./demo, ./test and .ci/run: tools that must be there. Sourced, never run.

# The oldest compiler that builds the workspace: rust-version in Cargo.toml.
rust_minimum=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# need_apt PROGRAM PACKAGE: makes PROGRAM available, from PACKAGE where this user may install it.
need_apt() {
    have "$1" && return
    if have apt-get && [ "$(id -u)" = 0 ]; then
        printf 'Installing %s, which provides %s\n' "$2" "$1"
        apt-get -qq update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$2" >/dev/null ||
            die "missing $1: apt-get install $2 failed"
    fi
    have "$1" || die "missing $1: install the package $2 (Debian, Ubuntu) or its like"
}

# need_rust: a C linker and a compiler that is new enough.
need_rust() {
    if [ -d "$HOME/.cargo/bin" ]; then PATH=$PATH:$HOME/.cargo/bin; fi
    need_apt cc build-essential
    have cargo || die "missing cargo: get Rust $rust_minimum or later from https://rustup.rs"
    local now
    now=$(rustc --version | sed 's/^rustc \([0-9.]*\).*/\1/')
    [ "$(printf '%s\n%s\n' "$rust_minimum" "$now" | sort -V | head -n 1)" = "$rust_minimum" ] ||
        die "rustc $now is too old: get Rust $rust_minimum or later from https://rustup.rs"
}

# need_nextest: the test runner, from the registry when it is absent.
need_nextest() {
    cargo nextest --version >/dev/null 2>&1 && return
    printf 'Installing cargo-nextest\n'
    cargo install --locked cargo-nextest || die "missing cargo-nextest: cargo install --locked cargo-nextest failed"
}
