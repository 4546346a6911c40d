//! Verified block load by a process that keeps replacing itself.
//!
//! A *client* ([`client`]) is a process with guest memory that drives a block device at a given queue depth and updates itself on
//! command: by exec, by fork, or by a hand-over to a standby process. It reads commands from standard input and writes events to
//! standard output, as JSON lines ([`wire`]); both streams outlive image and process. The expected contents of every block are in
//! shared memory ([`journal`]), so an orchestrator can compare them with the backing file without the device.
//!
//! The program of the client is called `vdpa-tenant`.
//!
//! | module | what it does |
//! |---|---|
//! | [`block`] | writes and verifies the stamps of blocks |
//! | [`journal`] | the expected contents of every block |
//! | [`requests`] | requests in flight: finds duplicate, unknown and lost completions |
//! | [`timeline`] | completions per millisecond |
//! | [`engine`] | issues and completes requests |
//! | [`client`] | the process: main loop and commands |
//! | `replace` | its replacement by a successor |
//! | [`process`] | the child processes of an orchestrator: daemon and client |
//! | [`verify`] | compares the backing file with the journal |
//! | [`summary`], [`chart`] | the results of a demo |
//! | [`fixture`] | a private daemon with one disk |
//! | [`scenario`] | a client on a fixture, updated and verified |
//! | [`demo`], [`mod@bench`], [`blackout`] | `vdpactl demo`, `vdpactl bench io` and `vdpactl bench update` |
//! | `output` | prints the result of a command |
//! | [`blackout_result`] | the results of `vdpactl bench update` |
//! | [`rounds`], [`comparison`], [`bars`] | medians, ratios, goals and charts of benchmarks that compare programs |
//! | [`hugepages`] | reserves huge pages |
#![forbid(unsafe_code)]

pub mod bars;
pub mod bench;
pub mod blackout;
pub mod blackout_result;
pub mod block;
pub mod chart;
pub mod client;
pub mod comparison;
pub mod demo;
pub mod engine;
pub mod fixture;
pub mod hugepages;
pub mod journal;
mod layout;
mod output;
pub mod process;
mod replace;
pub mod requests;
pub mod rounds;
pub mod scenario;
pub mod summary;
pub mod timeline;
pub mod verify;
pub mod wire;
