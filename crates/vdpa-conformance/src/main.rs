//! `vdpa-conform`: runs the conformance suite against a device file.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, exit};
use std::time::Duration;

use clap::Parser;
use vdpa_conformance::expect::Expectations;
use vdpa_conformance::report::{Summary, json, junit, line};
use vdpa_conformance::runner::{self, Config, Finding};
use vdpa_conformance::{Case, LocalDevice, Probe, Target, cases, child, matrix};

/// Runs the conformance suite against a vhost-vdpa device file.
///
/// Exit codes: 0 every case passed, was skipped for a need, or deviated as expected; 1 an unexpected failure, or an
/// expected one that passed; 2 the command line or a file named in it is wrong; 3 the device cannot be opened or
/// examined; 4 a case did not return in time; 5 a case was skipped, with --deny-skip.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The device file. It is reset and must not be in use.
    #[arg(required_unless_present_any = ["list", "matrix", "child", "in_process"])]
    device: Option<PathBuf>,
    /// Checks a block device in this process in place of a file: the core of vdpad, without kernel and daemon.
    #[arg(long, conflicts_with = "device")]
    in_process: bool,
    /// Lists the cases, with the sections they check, and runs none.
    #[arg(long)]
    list: bool,
    /// Runs only cases whose name contains this; may be repeated.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Known deviations of the device, one `case-id: reason` per line.
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Makes a skipped case an error.
    #[arg(long)]
    deny_skip: bool,
    /// Prints one JSON object instead of text.
    #[arg(short, long)]
    json: bool,
    /// Also writes a JUnit XML file.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Longest time for one case, in seconds.
    #[arg(long, default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Prints docs/uapi.md: which case covers which request.
    #[arg(long)]
    matrix: bool,
    /// The second process of a case; started by the suite itself.
    #[arg(long, hide = true)]
    child: bool,
}

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NO_DEVICE: u8 = 3;
const HUNG: u8 = 4;
const SKIPPED: u8 = 5;

/// An error that ends the program, with its exit code.
struct Fatal(u8, String);

impl Fatal {
    fn new(code: u8, context: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self(code, format!("{context}: {error}"))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match dispatch(&arguments) {
        Ok(code) => ExitCode::from(code),
        Err(Fatal(code, message)) => {
            eprintln!("vdpa-conform: {message}");
            ExitCode::from(code)
        }
    }
}

fn dispatch(arguments: &Arguments) -> Result<u8, Fatal> {
    if arguments.child {
        return child::serve().map(|()| 0).map_err(|error| Fatal::new(FAILED, "second process", error));
    }
    if arguments.matrix {
        return print(&matrix::render(&cases::all())).map(|()| 0);
    }
    let selected = select(&arguments.filter)?;
    if arguments.list {
        let list: String = selected.iter().map(|case| format!("{:<36} {}\n", case.id, case.spec)).collect();
        return print(&list).map(|()| 0);
    }
    let local = LocalDevice::new();
    let (device, target) = match &arguments.device {
        Some(device) => (device.as_path(), Target::File(device)),
        None => (Path::new("in-process"), Target::InProcess(&local)),
    };
    let expected = read_expectations(arguments.expect.as_deref())?;
    let findings = run(arguments, device, target, &selected, &expected)?;
    let summary = Summary::of(&findings);
    if let Some(file) = &arguments.junit {
        std::fs::write(file, junit(device, &findings)).map_err(|e| Fatal::new(USAGE, file.display(), e))?;
    }
    if arguments.json {
        print(&format!("{}\n", json(device, &findings)))?;
    } else {
        print(&format!("{summary}\n"))?;
    }
    Ok(match summary {
        Summary { failed: 1.., .. } => FAILED,
        Summary { skipped: 1.., .. } if arguments.deny_skip => SKIPPED,
        _ => 0,
    })
}

fn select(filters: &[String]) -> Result<Vec<Case>, Fatal> {
    let mut selected = cases::all();
    selected.retain(|case| filters.is_empty() || filters.iter().any(|text| case.id.contains(text.as_str())));
    if selected.is_empty() {
        return Err(Fatal(USAGE, format!("no case contains {}; --list shows them", filters.join(" or "))));
    }
    Ok(selected)
}

fn read_expectations(file: Option<&Path>) -> Result<Expectations, Fatal> {
    let Some(file) = file else { return Ok(Expectations::default()) };
    let text = std::fs::read_to_string(file).map_err(|e| Fatal::new(USAGE, file.display(), e))?;
    let ids: Vec<_> = cases::all().iter().map(|case| case.id).collect();
    Expectations::parse(&text, &ids).map_err(|e| Fatal::new(USAGE, file.display(), e))
}

fn run(
    arguments: &Arguments,
    device: &Path,
    target: Target<'_>,
    selected: &[Case],
    expected: &Expectations,
) -> Result<Vec<Finding>, Fatal> {
    let probe = Probe::of(target).map_err(|error| Fatal::new(NO_DEVICE, device.display(), error))?;
    let program = child::program();
    let config = Config {
        device: target,
        child: program.as_deref(),
        limit: Duration::from_secs(arguments.timeout),
        on_hang: |case, limit| {
            eprintln!("vdpa-conform: case {case} did not return within {} s", limit.as_secs());
            exit(HUNG.into())
        },
    };
    Ok(runner::run(&config, &probe, selected, expected, |finding| {
        if !arguments.json {
            println!("{}", line(finding));
        }
    }))
}

fn print(text: &str) -> Result<(), Fatal> {
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| Fatal::new(FAILED, "standard output", error))
}
