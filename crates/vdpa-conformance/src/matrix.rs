//! The matrix of `docs/uapi.md`: how each device handles each request.
//!
//! The device columns are made from the expectation files. Runs of the suite keep these files true: a run fails if a case
//! deviates unexpectedly, and also if it passes although its file lists a deviation.

mod choices;
mod vduse;

use std::collections::BTreeSet;
use std::fmt::Write as _;

use crate::case::Case;
use crate::expect::{Expectations, ParseError};
use crate::request::Request;

/// A column of the matrix: several devices, each with its expectation files. A line in a later file replaces one in an earlier
/// file.
struct Column {
    title: &'static str,
    devices: &'static [&'static [&'static str]],
}

macro_rules! file {
    ($name:literal) => {
        include_str!(concat!("../expect/", $name, ".txt"))
    };
}

const FUSE: &str = file!("fuse");
const BLK: &str = file!("fuse-blk");

const CUSE: &str = file!("cuse");
const COLUMNS: [Column; 7] = [
    Column { title: "sim-net", devices: &[&[FUSE, file!("fuse-sim-net")]] },
    Column {
        title: "sim-blk",
        devices: &[
            &[FUSE, file!("fuse-sim-blk"), file!("fuse-sim-blk-verified")],
            &[FUSE, file!("fuse-sim-blk"), file!("fuse-sim-blk-verified"), file!("fuse-tables")],
        ],
    },
    Column {
        title: "blk",
        devices: &[
            &[FUSE, BLK],
            &[FUSE, BLK, file!("fuse-blk-unlimited")],
            &[FUSE, BLK, file!("fuse-blk-unlimited"), file!("fuse-blk-handover")],
            &[FUSE, BLK, file!("fuse-blk-unlimited"), file!("fuse-tables")],
        ],
    },
    Column {
        title: "net",
        devices: &[
            &[FUSE, file!("fuse-net"), file!("fuse-net-one-pair")],
            &[FUSE, file!("fuse-net"), file!("fuse-net-pairs")],
        ],
    },
    Column {
        title: "these by CUSE",
        devices: &[
            &[CUSE, file!("fuse-sim-net")],
            &[CUSE, file!("fuse-sim-blk"), file!("fuse-sim-blk-verified")],
            &[CUSE, BLK, file!("fuse-blk-unlimited")],
            &[CUSE, BLK, file!("fuse-blk-unlimited"), file!("fuse-blk-handover")],
        ],
    },
    Column {
        title: "vdpasim, Linux 6.12",
        devices: &[
            &[file!("kernel-6.12-sim-net")],
            &[file!("kernel-6.12-sim-blk")],
            &[file!("kernel-6.12-sim-net-pinned")],
            &[file!("kernel-6.12-sim-blk-dma-map")],
        ],
    },
    Column {
        title: "VDUSE, Linux 6.12 and 7.2",
        devices: &[&[file!("kernel-6.12-vduse-blk")], &[file!("kernel-7.2-vduse-blk")]],
    },
];

const HEAD: &str = include_str!("matrix/head.md");
const TAIL: &str = include_str!("matrix/tail.md");

/// Generates the document from the table of requests, the requests that the cases cover, and the expectation files.
///
/// # Errors
/// [`ParseError`] if an expectation file is malformed.
pub fn render(cases: &[Case]) -> Result<String, ParseError> {
    let known: Vec<_> = cases.iter().map(|case| case.id).collect();
    let mut columns = Vec::new();
    for column in COLUMNS {
        let devices: Result<Vec<_>, _> = column.devices.iter().map(|files| read(files, &known)).collect();
        columns.push((column.title, devices?));
    }
    let mut text = HEAD.to_owned();
    let titles: Vec<_> = columns.iter().map(|(title, _)| *title).collect();
    let _ = writeln!(text, "\n| Request | Number | Section | Effect | {} | Cases |", titles.join(" | "));
    let _ = writeln!(text, "|---|---|---|---|{}---|", "---|".repeat(titles.len()));
    for request in Request::ALL {
        text.push_str(&row(request, cases, &columns));
    }
    text.push_str("\n## Known differences\n");
    for (title, devices) in &columns {
        let _ = write!(text, "\n{title}:\n\n");
        let all: BTreeSet<_> = devices.iter().flat_map(Expectations::deviations).collect();
        all.iter().for_each(|(id, reason)| {
            let _ = writeln!(text, "- `{id}`: {reason}");
        });
    }
    choices::render(&mut text);
    vduse::render(&mut text)?;
    text.push_str(TAIL);
    Ok(text)
}

fn read(files: &[&str], known: &[&str]) -> Result<Expectations, ParseError> {
    files.iter().try_fold(Expectations::default(), |all, text| {
        Expectations::parse(text, known).map(|more| all.and(more))
    })
}

fn row(request: &Request, cases: &[Case], columns: &[(&str, Vec<Expectations>)]) -> String {
    let number = request.number.map_or_else(|| "–".to_owned(), |number| format!("`0x{number:08X}`"));
    let covering: Vec<_> =
        cases.iter().filter(|case| case.covers.contains(request)).map(|case| case.id).collect();
    let cells: Vec<_> = columns.iter().map(|(_, devices)| cell(&covering, devices)).collect();
    let ids = if covering.is_empty() { "none".to_owned() } else { names(covering) };
    let Request { name, spec, effect, .. } = request;
    format!("| {name} | {number} | {spec} | {effect} | {} | {ids} |\n", cells.join(" | "))
}

/// The cell of a request: how the devices of a column behave in the cases that cover the request.
fn cell(cases: &[&'static str], devices: &[Expectations]) -> String {
    let differs: BTreeSet<_> = devices
        .iter()
        .flat_map(|device| cases.iter().filter(|id| device.deviation(id).is_some()).copied())
        .collect();
    let tried = devices.iter().any(|device| {
        cases.iter().any(|id| device.inapplicable(id).is_none() && device.not_run(id).is_none())
    });
    match (tried, differs.is_empty()) {
        (false, _) => "–".to_owned(),
        (true, true) => "as specified".to_owned(),
        (true, false) => format!("differs: {}", names(differs)),
    }
}

fn names(ids: impl IntoIterator<Item = &'static str>) -> String {
    ids.into_iter().map(|id| format!("`{id}`")).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_the_generated_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/uapi.md");
        let document = std::fs::read_to_string(path).unwrap();
        let text = render(&crate::cases::all()).unwrap();
        assert!(document == text, "docs/uapi.md is out of date: run `just matrix`");
    }

    #[test]
    fn every_request_has_a_case() {
        let text = render(&crate::cases::all()).unwrap();
        assert!(!text.lines().any(|line| line.ends_with("| none |")), "{text}");
    }

    #[test]
    fn a_cell_distinguishes_deviations_from_cases_that_are_not_run() {
        let known = ["a.x", "a.y"];
        let cell = |cases: &[&'static str], text| cell(cases, &[Expectations::parse(text, &known).unwrap()]);
        assert_eq!(cell(&known, "a.x: why"), "differs: `a.x`");
        assert_eq!(cell(&known, "n/a a.x: why"), "as specified");
        assert_eq!(cell(&known, "n/a a.x: why\nnot-run a.y: why"), "–");
        assert_eq!(cell(&[], ""), "–");
    }
}
