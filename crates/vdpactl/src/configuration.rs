//! `vdpactl config`: the configuration files, and what runs.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::{Map, Value, json};
use vdpa_control::api::{AddRequest, CtlError, Running};
use vdpa_control::files::{self, Configuration};
use vdpa_core::Errno;

use crate::Session;
use crate::failure::Failure;
use crate::grammar;
use crate::output::{Entry, section};

pub(crate) const HELP: &str = "\
Usage: vdpactl config check [ FILE ]
       vdpactl config diff
       vdpactl config save
       vdpactl config reload
";

/// Runs one command.
pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    let Some((word, rest)) = args.split_first() else {
        return diff(session);
    };
    let none = |rest: &[String]| rest.first().map_or(Ok(()), |extra| Err(grammar::unknown_option(extra)));
    match word.as_str() {
        word if grammar::matches(word, "help") => {
            eprint!("{HELP}");
            Ok(())
        }
        word if grammar::matches(word, "check") => check(session, rest),
        word if grammar::matches(word, "diff") => none(rest).and_then(|()| diff(session)),
        word if grammar::matches(word, "save") => none(rest).and_then(|()| save(session)),
        word if grammar::matches(word, "reload") => none(rest).and_then(|()| reload(session)),
        word => Err(grammar::no_command(word)),
    }
}

fn read(path: &std::path::Path) -> Result<Configuration, Failure> {
    Configuration::read(path).map_err(|error| CtlError::new(Errno::INVAL, error.to_string()).into())
}

/// Reads the files as the daemon does. Asks a daemon only for their place.
fn check(session: &Session, args: &[String]) -> Result<(), Failure> {
    let path = match args {
        [] => session.client.running().map_or_else(|_| PathBuf::from(files::DEFAULT), |running| running.path),
        args => PathBuf::from(grammar::only(args)?),
    };
    if !path.exists() {
        return Err(CtlError::new(Errno::NOENT, format!("{} does not exist", path.display())).into());
    }
    let Configuration { options, devices } = read(&path)?;
    let mut json = Map::new();
    json.insert("options".into(), options.len().into());
    json.insert("devices".into(), devices.len().into());
    let plain = format!("{}: options {} devices {}\n", path.display(), options.len(), devices.len());
    section(session.format, "config", Ok(vec![Entry { name: path.display().to_string(), plain, json }]))
}

/// How a device runs and how it is written.
#[derive(Debug, PartialEq, Eq)]
enum Difference {
    /// It runs, and is not written.
    Unwritten,
    /// It is written, and does not run.
    Missing,
    /// Attributes, each with what runs and what is written; `None` where it is not.
    Attributes(Vec<(String, Option<String>, Option<String>)>),
}

/// What differs, by device.
fn differences(running: &[AddRequest], written: &Configuration) -> Vec<(String, Difference)> {
    let mut all = Vec::new();
    for device in running {
        match written.device(&device.name) {
            None => all.push((device.name.clone(), Difference::Unwritten)),
            Some(written) => {
                let attributes = attributes(device, &written.request);
                if !attributes.is_empty() {
                    all.push((device.name.clone(), Difference::Attributes(attributes)));
                }
            }
        }
    }
    let names: BTreeSet<_> = running.iter().map(|device| &device.name).collect();
    let missing = written.devices.iter().filter(|device| !names.contains(&device.request.name));
    all.extend(missing.map(|device| (device.request.name.clone(), Difference::Missing)));
    all
}

fn attributes(running: &AddRequest, written: &AddRequest) -> Vec<(String, Option<String>, Option<String>)> {
    let mut differ = Vec::new();
    if running.mgmtdev != written.mgmtdev {
        differ.push(("mgmtdev".into(), Some(running.mgmtdev.clone()), Some(written.mgmtdev.clone())));
    }
    let names: BTreeSet<&str> =
        running.attrs.iter().chain(written.attrs.iter()).map(|(name, _)| name).collect();
    for name in names {
        let (runs, is_written) = (running.attrs.get(name), written.attrs.get(name));
        if runs != is_written {
            differ.push((name.to_owned(), runs.map(str::to_owned), is_written.map(str::to_owned)));
        }
    }
    differ
}

/// Shows what differs. Fails when something does.
fn diff(session: &Session) -> Result<(), Failure> {
    let Running { path, devices } = session.client.running()?;
    let differences = differences(&devices, &read(&path)?);
    let entries = differences.iter().map(|(name, difference)| entry(name, difference)).collect();
    section(session.format, "config", Ok(entries))?;
    if differences.is_empty() {
        return Ok(());
    }
    Err(CtlError::new(Errno::INVAL, format!("what runs is not what is written in {}", path.display()))
        .with_hint(
            "\"vdpactl config save\" writes what runs; \"vdpactl config reload\" adds what is written.",
        )
        .into())
}

fn entry(name: &str, difference: &Difference) -> Entry {
    let mut json = Map::new();
    let plain = match difference {
        Difference::Unwritten => {
            json.insert("state".into(), "unwritten".into());
            format!("+ {name}: runs and is not written\n")
        }
        Difference::Missing => {
            json.insert("state".into(), "missing".into());
            format!("- {name}: is written and does not run\n")
        }
        Difference::Attributes(attributes) => {
            json.insert("state".into(), "differs".into());
            let pairs = attributes
                .iter()
                .map(|(name, runs, written)| (name.clone(), json!({"running": runs, "written": written})));
            json.insert("attributes".into(), Value::Object(pairs.collect()));
            let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".into());
            let lines = attributes.iter().map(|(attr, runs, written)| {
                format!("~ {name}: {attr} running {} written {}\n", text(runs), text(written))
            });
            lines.collect()
        }
    };
    Entry { name: name.to_owned(), plain, json }
}

/// Writes the devices that run and are not written as they run, each to a file of its own.
fn save(session: &Session) -> Result<(), Failure> {
    let Running { path, devices } = session.client.running()?;
    let written = read(&path)?;
    let (mut elsewhere, mut passed) = (Vec::new(), Vec::new());
    for (name, difference) in differences(&devices, &written) {
        let Some(device) = devices.iter().find(|device| device.name == name) else { continue };
        let own = files::device_file(&path, &name);
        match written.device(&name).map(|device| &device.at) {
            _ if device.attrs.is_passed() => passed.push(name),
            // It was written by hand, with others perhaps.
            Some(at) if at.file != own => elsewhere.push(format!("{name} ({at})")),
            _ => write(&path, device)?,
        }
        drop(difference);
    }
    if !passed.is_empty() {
        return Err(unwritable(&passed.join(", ")).into());
    }
    if elsewhere.is_empty() {
        return Ok(());
    }
    Err(CtlError::new(Errno::EXIST, format!("written in another way by hand: {}", elsewhere.join(", ")))
        .with_hint("Change these files; \"vdpactl config diff\" shows what runs.")
        .into())
}

/// The error for devices whose descriptors were passed.
fn unwritable(names: &str) -> CtlError {
    CtlError::new(Errno::INVAL, format!("{names}: descriptors were passed, and no file can have them")).with_hint(
        "A device that the daemon opens by path is right here, or add it anew after each start of the service.",
    )
}

fn write(path: &std::path::Path, device: &AddRequest) -> Result<(), Failure> {
    files::write_device(path, device).map(drop).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(5));
        let file = files::device_file(path, &device.name);
        CtlError::new(errno, format!("cannot write {}: {error}", file.display())).into()
    })
}

fn reload(session: &Session) -> Result<(), Failure> {
    let reloaded = session.client.reload()?;
    let entry = |name: &String, state: &str, text: &str| {
        let json = Map::from_iter([("state".to_owned(), Value::from(state))]);
        Entry { name: name.clone(), plain: format!("{name}: {text}\n"), json }
    };
    let added = reloaded.added.iter().map(|name| entry(name, "added", "added"));
    let differ = reloaded.differ.iter().map(|name| {
        entry(
            name,
            "differs",
            "runs in another way than is written; its client keeps it until it is deleted and added",
        )
    });
    let unwritten = reloaded.unwritten.iter().map(|name| entry(name, "unwritten", "runs and is not written"));
    section(session.format, "config", Ok(added.chain(differ).chain(unwritten).collect()))
}

/// Adds a device, and writes it so that the next start of the service adds it too.
pub(crate) fn add_persistent(session: &Session, request: &AddRequest) -> Result<(), Failure> {
    if request.attrs.is_passed() {
        return Err(unwritable(&request.name).into());
    }
    let path = session.client.running()?.path;
    if let Some(device) = read(&path)?.device(&request.name) {
        return Err(CtlError::new(
            Errno::EXIST,
            format!("{} is written already, at {}", request.name, device.at),
        )
        .with_hint("\"vdpactl config reload\" adds it.")
        .into());
    }
    session.client.add(request)?;
    write(&path, request)
}

/// Removes the file that [`add_persistent`] has written for a device that is deleted. Returns where else it is written.
pub(crate) fn forget(session: &Session, name: &str) -> Result<(), Failure> {
    let path = session.client.running()?.path;
    let file = files::device_file(&path, name);
    match std::fs::remove_file(&file) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(5));
            return Err(CtlError::new(errno, format!("cannot remove {}: {error}", file.display())).into());
        }
    }
    match read(&path)?.device(name) {
        None => Ok(()),
        Some(device) => {
            Err(CtlError::new(Errno::EXIST, format!("{name} is still written, at {}", device.at))
                .with_hint("It comes back at the next start; remove it there.")
                .into())
        }
    }
}
