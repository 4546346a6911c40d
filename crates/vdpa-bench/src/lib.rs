//! Verified block load by a process that keeps replacing itself.
//!
//! A *tenant* ([`tenant`]) is a process with guest memory that drives a block device at a given queue depth and
//! updates itself on command, by exec, by fork or by handing over to a standby. It speaks JSON lines ([`wire`]): events
//! on standard output, commands on standard input; both outlive image and process. What every block should hold is kept in shared memory ([`ledger`]),
//! so that an orchestrator can compare it with the backing file, outside the device.
//!
//! | module | what it does |
//! |---|---|
//! | [`block`] | stamps blocks and judges them |
//! | [`ledger`] | what every block should hold |
//! | [`requests`] | requests in flight: duplicates, strangers, losses |
//! | [`timeline`] | completions per millisecond |
//! | [`engine`] | issues and reaps requests |
//! | [`tenant`] | the process |
//! | `replace` | how it gives way to its successor |
//! | [`peer`] | the processes an orchestrator starts |
//! | [`verify`] | compares the backing file with the ledger |
//! | [`summary`], [`chart`] | what a demo found out |
//! | [`stage`] | a private daemon with one disk |
//! | [`play`] | a tenant on it, updated and verified |
//! | [`demo`], [`mod@bench`], [`blackout`] | `vdpactl demo`, `vdpactl bench io` and `vdpactl bench update` |
//! | [`blackout_result`] | what the last one found out |
//! | [`hugepages`] | huge pages for it |
#![forbid(unsafe_code)]

pub mod bench;
pub mod blackout;
pub mod blackout_result;
pub mod block;
pub mod chart;
pub mod demo;
pub mod engine;
pub mod hugepages;
mod layout;
pub mod ledger;
pub mod peer;
pub mod play;
mod replace;
pub mod requests;
pub mod stage;
pub mod summary;
pub mod tenant;
pub mod timeline;
pub mod verify;
pub mod wire;
