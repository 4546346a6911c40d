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

# rust_is_new_enough: whether there is a compiler that builds the workspace.
rust_is_new_enough() {
    local now
    have cargo && have rustc || return 1
    now=$(rustc --version 2>/dev/null | sed 's/^rustc \([0-9.]*\).*/\1/')
    [ "$(printf '%s\n%s\n' "$rust_minimum" "$now" | sort -V | head -n 1)" = "$rust_minimum" ]
}

# install_backported_rust: the compiler of trixie-backports, on Debian 13 as root; fails elsewhere and touches nothing there.
install_backported_rust() {
    local archive
    [ "$(id -u)" = 0 ] && have apt-get && grep -q '^VERSION_CODENAME=trixie$' /etc/os-release 2>/dev/null || return 1
    ! have rustup || return 1
    printf 'Installing Rust: packages rustc and cargo of trixie-backports, which is added to the sources of apt\n'
    if ! apt-cache policy 2>/dev/null | grep -q 'trixie-backports'; then
        archive=$( (cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null || true) |
            sed -nE 's#^(URIs: *|deb (\[[^]]*\] )?)([^ ]*/debian)/?( .*)?$#\3#p' | sed -n 1p)
        printf 'Types: deb\nURIs: %s\nSuites: trixie-backports\nComponents: main\nSigned-By: %s\n' \
            "${archive:-http://deb.debian.org/debian}" /usr/share/keyrings/debian-archive-keyring.gpg \
            >/etc/apt/sources.list.d/trixie-backports.sources
    fi
    apt-get -qq update >/dev/null &&
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y install -t trixie-backports rustc cargo >/dev/null
}

# need_rust: a C linker and a compiler that is new enough.
need_rust() {
    local found=none
    if [ -d "$HOME/.cargo/bin" ]; then PATH=$PATH:$HOME/.cargo/bin; fi
    need_apt cc build-essential
    rust_is_new_enough || install_backported_rust || true
    hash -r
    if ! rust_is_new_enough; then
        ! have rustc || found=$(rustc --version)
        die "missing Rust $rust_minimum or later (found: $found): curl --proto '=https' -sSf https://sh.rustup.rs | sh -s -- -y"
    fi
}

# need_nextest: the test runner, from the registry when it is absent.
need_nextest() {
    cargo nextest --version >/dev/null 2>&1 && return
    printf 'Installing cargo-nextest\n'
    cargo install --locked cargo-nextest || die "missing cargo-nextest: cargo install --locked cargo-nextest failed"
}
