//! `vdpa-conform`: runs the conformance suite against a device file.
#![forbid(unsafe_code)]

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, exit};
use std::time::Duration;

use clap::{Parser, ValueEnum};
use vdpa_conformance::expect::Expectations;
use vdpa_conformance::report::{Summary, json, junit, line};
use vdpa_conformance::runner::{self, Config, Finding};
use vdpa_conformance::{Bus, Case, LocalDevice, Probe, Resources, Target, Vstats, cases, child, matrix};
use vdpa_sys::uapi::live;

/// A device in this process.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// A block device.
    Blk,
    /// A network device that receives what it sends.
    Net,
}

/// Runs the conformance suite against a vhost-vdpa device file.
///
/// VDPA_LIVE_NUMBERS gives the requests of the live-update series other numbers, as for vdpad and vdpactl:
/// new_owner=0xaf2f,remap=9,new_owner_bit=20,remap_bit=21.
///
/// Exit codes: 0 every case passed, was skipped for a need, or deviated as expected; 1 an unexpected failure, or an
/// expected one that passed; 2 the command line, a file named in it or the environment is wrong; 3 the device cannot be opened or
/// examined; 4 a case did not return in time; 5 a case was skipped, with --deny-skip.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The device file. It is reset and must not be in use.
    #[arg(required_unless_present_any = ["list", "matrix", "child", "in_process", "vduse"])]
    device: Option<PathBuf>,
    /// Checks a device in this process in place of a file: the core of vdpad, without kernel and daemon.
    #[arg(long, conflicts_with = "device", value_name = "KIND", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "blk")]
    in_process: Option<Kind>,
    /// Checks the kernel's VDUSE in place of a device: each case makes devices and puts them on the bus with this command, such as
    /// "vdpa". Needs the modules vduse and vhost_vdpa, and no other driver on the bus; root.
    #[arg(long, conflicts_with_all = ["device", "in_process"], value_name = "COMMAND")]
    vduse: Option<String>,
    /// Lists the cases, with the sections they check, and runs none.
    #[arg(long)]
    list: bool,
    /// Runs only cases whose name contains this; may be repeated.
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// What is known of the device: `case-id: reason` for a deviation, `n/a case-id: reason` for what cannot be run,
    /// `max_iotlb_entries N: reason` for a setting; may be repeated, and later files win.
    #[arg(long, value_name = "FILE")]
    expect: Vec<PathBuf>,
    /// How to learn what the device counts: a command that prints the vendor statistics of a queue as JSON when "qidx N"
    /// is appended, such as "vdpa -j dev vstats show NAME".
    #[arg(long, value_name = "COMMAND")]
    vstats: Option<String>,
    /// Makes a skipped case an error.
    #[arg(long)]
    deny_skip: bool,
    /// Prints one JSON object instead of text.
    #[arg(short, long)]
    json: bool,
    /// Also writes the JSON object to a file.
    #[arg(long, value_name = "FILE")]
    json_file: Option<PathBuf>,
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

/// An error that ends the program: exit code and message.
struct Fatal(u8, String);

impl Fatal {
    fn new(code: u8, context: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self(code, format!("{context}: {error}"))
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let numbers = live::configure_from_env().map_err(|error| Fatal::new(USAGE, live::ENV, error));
    match numbers.and_then(|()| dispatch(&arguments)) {
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
        let text = matrix::render(&cases::all()).map_err(|e| Fatal::new(FAILED, "expectation file", e))?;
        return print(&text).map(|()| 0);
    }
    let known = if arguments.vduse.is_some() { cases::vduse() } else { cases::all() };
    let selected = select(&known, &arguments.filter)?;
    if arguments.list {
        let list: String = selected.iter().map(|case| format!("{:<36} {}\n", case.id, case.spec)).collect();
        return print(&list).map(|()| 0);
    }
    let local = match arguments.in_process {
        Some(Kind::Net) => LocalDevice::net(),
        _ => LocalDevice::new(),
    };
    let bus = arguments.vduse.as_deref().map(Bus::from);
    let (device, target) = match (&arguments.device, &bus) {
        (Some(device), _) => (device.as_path(), Target::File(device)),
        (None, Some(bus)) => (Path::new("vduse"), Target::Vduse(bus)),
        (None, None) => (Path::new("in-process"), Target::InProcess(&local)),
    };
    let expected = read_expectations(&known, &arguments.expect)?;
    let findings = run(arguments, device, target, &selected, &expected)?;
    let summary = Summary::of(&findings);
    let json = || format!("{}\n", json(device, &findings));
    let save = |file: &Path, text: String| {
        std::fs::write(file, text).map_err(|error| Fatal::new(USAGE, file.display(), error))
    };
    if let Some(file) = &arguments.junit {
        save(file, junit(device, &findings))?;
    }
    if let Some(file) = &arguments.json_file {
        save(file, json())?;
    }
    if arguments.json {
        print(&json())?;
    } else {
        print(&format!("{summary}\n"))?;
    }
    Ok(match summary {
        Summary { failed: 1.., .. } => FAILED,
        Summary { skipped: 1.., .. } if arguments.deny_skip => SKIPPED,
        _ => 0,
    })
}

fn select(known: &[Case], filters: &[String]) -> Result<Vec<Case>, Fatal> {
    let mut selected = known.to_vec();
    selected.retain(|case| filters.is_empty() || filters.iter().any(|text| case.id.contains(text.as_str())));
    if selected.is_empty() {
        return Err(Fatal(USAGE, format!("no case contains {}; --list shows them", filters.join(" or "))));
    }
    Ok(selected)
}

fn read_expectations(known: &[Case], files: &[PathBuf]) -> Result<Expectations, Fatal> {
    let ids: Vec<_> = known.iter().map(|case| case.id).collect();
    files.iter().try_fold(Expectations::default(), |expected, file| {
        let text = std::fs::read_to_string(file).map_err(|e| Fatal::new(USAGE, file.display(), e))?;
        let more = Expectations::parse(&text, &ids).map_err(|e| Fatal::new(USAGE, file.display(), e))?;
        Ok(expected.and(more))
    })
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
    let vstats = arguments.vstats.as_deref().map(Vstats::from);
    let config = Config {
        device: target,
        resources: Resources { child: program.as_deref(), vstats: vstats.as_ref() },
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
