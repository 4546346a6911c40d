# The commands of this repository. `just --list` shows them.

# Builds everything, optimised.
build:
    cargo build --release --locked

# Runs every test; arguments go to nextest.
test *args:
    ./test {{args}}

# Everything a change must pass.
ci:
    .ci/run

# A live update on this machine.
demo *args:
    ./demo {{args}}

# How long no driver is there in an update, by memory size, way and strategy. Wants a quiet machine.
bench-update *args:
    cargo build --release --locked --workspace --bins
    target/release/vdpactl bench update --tenant "$(scripts/static-tenant)" {{args}}

# Formats the code.
fmt:
    cargo fmt --all

# Lints, as the CI does.
clippy:
    cargo clippy --workspace --all-targets --all-features --locked -- -D warnings

# API documentation, as the CI builds it.
doc:
    RUSTDOCFLAGS='-D warnings' cargo doc --workspace --all-features --no-deps --locked

# Runs one fuzz target for a minute.
fuzz target seconds='60':
    scripts/fuzz {{target}} {{seconds}}

# Runs the conformance suite against a device file.
conform device *args:
    cargo run --release --locked --package vdpa-conformance --bin vdpa-conform -- {{device}} {{args}}

# Nanoseconds of rings and look-ups beside other crates; arguments: --rounds N, --millis N, a part of a table's name.
bench-core *args:
    cargo bench --locked --package vdpa-core --bench core -- {{args}}

# How long an empty program takes from its start to main, linked in four ways: "just bench-start ROUNDS".
bench-start *args:
    scripts/bench-start {{args}}

# How long I/O stands still when the daemon is upgraded or killed: "just bench-survival --help".
bench-survival *args:
    cargo build --locked --release --package vdpad
    cargo run --locked --release --package vdpa-bench --example bench-survival -- --vdpad target/release/vdpad {{args}}

# What a map and an unmap cost, by the number of mappings: "just bench-iotlb --help".
bench-iotlb *args:
    cargo build --locked --release --package vdpad
    cargo run --locked --release --package vdpa-bench --example bench-iotlb -- --vdpad target/release/vdpad {{args}}

# What looking at rings before sleeping gives or costs: "just bench-poll ROUNDS MICROSECONDS...".
bench-poll *args:
    cargo build --release --locked --workspace --bins
    scripts/bench-poll {{args}}

# A flame graph of the thread that serves a ring: "just flame WORKLOAD FILE.svg".
flame *args:
    scripts/flame {{args}}

# Our block device beside QEMU's and the floors, in turn: IOPS, latency, CPU per request. Wants a quiet machine.
bench-io *args:
    scripts/bench-io {{args}}

# Our network card beside DPDK's testpmd, passt and the floor, in turn: packets, streams, latency, CPU. Wants root and a quiet machine.
bench-net *args:
    scripts/bench-net {{args}}

# Two builds in turn: whether the programs became slower: "just bench-compare BEFORE AFTER".
bench-compare *args:
    scripts/bench-compare {{args}}

# Writes docs/uapi.md anew from the suite.
matrix:
    cargo run --locked --package vdpa-conformance --bin vdpa-conform -- --matrix > docs/uapi.md

# Runs QEMU, libblkio and the like against our devices: "all", or the name of a script of tests/clients.
clients *args:
    tests/clients/run {{args}}

# Runs the conformance suite on the kernel's own devices, in an emulated machine (downloads 400 MB the first time).
conform-kernel *args:
    testbed/conform {{args}}

# Checks character devices in an emulated machine (downloads 400 MB the first time); parts, or "all".
cuse *args:
    testbed/cuse {{args}}

# A thousand updates in a row for each way, with requests in flight and a look at what everybody holds.
many-updates count='1000':
    VDPA_TEST_UPDATES={{count}} cargo nextest run --locked --package vdpad --test many_updates --no-capture

# Updates of a network card's driver under pings and streams, by each way and with each strategy, and upgrades of its daemon.
net-updates count='100':
    VDPA_TEST_UPDATES={{count}} cargo nextest run --locked --package vdpad --test net_update --test net_streams --no-capture

# What an update costs by devices and mappings; medians.
bench-scale rounds='5':
    VDPA_TEST_ROUNDS={{rounds}} cargo test --release --locked --package vdpad --test scale -- figures --exact --nocapture

# Dirty tracking against the model, ten million requests of each device and ring format: "just dirty-model 10000000".
dirty-model requests='10000000':
    cargo build --release --locked --workspace --bins
    VDPA_TEST_DIRTY_REQUESTS={{requests}} cargo test --release --locked --package vdpad --test dirty -- --nocapture --test-threads 1

# How long a machine stands still that moves between two daemons: "just bench-migrate --help".
bench-migrate *args:
    cargo build --locked --release --package vdpad
    cargo run --locked --release --package vdpa-bench --example bench-migrate -- --vdpad target/release/vdpad {{args}}

# What dirty tracking costs, and how long a report over 1 TiB takes: "just bench-dirty --help".
bench-dirty *args:
    cargo build --locked --release --package vdpad
    cargo run --locked --release --package vdpa-bench --example bench-dirty -- --vdpad target/release/vdpad {{args}}

# How long it takes to put other memory behind addresses that are mapped: "just bench-remap --help".
bench-remap *args:
    cargo build --locked --release --package vdpad
    cargo run --locked --release --package vdpa-bench --example bench-remap -- --vdpad target/release/vdpad {{args}}

# How exactly limits of a disk hold, and what they cost a neighbour: "just bench-limits SECONDS".
bench-limits *args:
    cargo build --release --locked --workspace --bins
    scripts/bench-limits {{args}}

# The metrics against the load's own counts: "just metrics 1000000".
metrics requests='1000000':
    VDPA_TEST_REQUESTS={{requests}} cargo nextest run --locked --package vdpad --test metrics --no-capture

# Makes Debian packages, in target/deb.
deb:
    cargo build --release --locked --package vdpad --package vdpactl --features vdpad/manual,vdpactl/manual --bins
    cargo build --release --locked --package vdpa-conformance --bin vdpa-conform
    scripts/make-deb target/deb

# Installs the packages in a fresh Debian with a real systemd, and uses the service as an operator does.
package-test:
    testbed/package
