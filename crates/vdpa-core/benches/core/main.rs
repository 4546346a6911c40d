//! Measures the hot paths of vdpa-core, in nanoseconds, next to other crates that do the same work.
//!
//! `just bench-core` runs it. In each round all contenders of a table run in turn, so that other load on the machine
//! affects all of them. The benchmark prints the median of the rounds and its ratio to that of vdpa-core, and writes
//! `target/bench-core.json`.
//!
//! It has a measuring loop of its own, because criterion and divan measure one contender after the other. On a shared
//! machine the ratio of two such figures is mostly noise.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a benchmark reports to a terminal, or stops"
)]

mod lookup;
mod measure;
mod plain;
mod ring;

use std::fs;
use std::path::Path;

use measure::{Settings, Table};

const USAGE: &str =
    "usage: bench-core [--rounds N (5 or more)] [--millis N per contender and round] [FILTER]";

fn main() {
    let mut settings = Settings { rounds: 9, millis: 20 };
    let mut filter = String::new();
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|value| value.parse::<u64>().ok()).expect(USAGE);
        match arg.as_str() {
            "--rounds" => settings.rounds = number().max(5),
            "--millis" => settings.millis = number().max(1),
            _ if arg.starts_with('-') => panic!("{USAGE}"),
            _ => filter = arg,
        }
    }
    let mut tables: Vec<Table> = Vec::new();
    for (name, contenders) in ring::tables().into_iter().chain(lookup::tables()) {
        if name.contains(&filter) {
            let table = measure::run(&name, contenders(), &settings);
            println!("{table}");
            tables.push(table);
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench-core.json");
    fs::write(&file, serde_json::to_vec_pretty(&measure::json(&tables, &settings)).unwrap()).unwrap();
    println!("Written to {}", fs::canonicalize(file).unwrap().display());
}
