//! The configuration of the program: its command line, and the files that it names. What the command line says counts.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{ArgMatches, Command, CommandFactory, FromArgMatches};
use vdpa_control::files::{Configuration, DaemonOption};

use crate::{Cli, EXIT_USAGE};

/// Options that have no place in a file.
const NOT_IN_FILES: [&str; 6] = ["config", "check", "options-read", "dev", "help", "version"];

/// The switch that says that the options of the files are on the command line: the holder gives it to the daemons that it starts, so
/// that they are all the same.
const OPTIONS_READ: &str = "--options-read";

/// What the program is to do.
pub(crate) struct Configured {
    pub(crate) cli: Cli,
    pub(crate) files: Configuration,
    /// The command line, with the options of the files.
    pub(crate) args: Vec<OsString>,
}

impl Configured {
    /// Reads the command line and the files. Ends the process for what clap ends it for, such as `--help`.
    pub(crate) fn read() -> Result<Self, ExitCode> {
        let args: Vec<OsString> = std::env::args_os().collect();
        let matches = Cli::command().get_matches_from(&args);
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        if cli.command.is_some() {
            return Ok(Self { cli, files: Configuration::default(), args });
        }
        let given = !matches!(matches.value_source("config"), None | Some(ValueSource::DefaultValue));
        let files = match read_files(&cli.serve.config, given) {
            Ok(files) => files,
            Err(error) if cli.serve.options_read => {
                // The devices are there already, or the operator hears of it from "vdpactl config reload".
                eprintln!("vdpad: the configuration is not read again: {error}");
                Configuration::default()
            }
            Err(error) => return Err(refuse(&error)),
        };
        if cli.serve.options_read || files.options.is_empty() {
            return Ok(Self { cli, files, args });
        }
        let merged = merge(&args, &matches, &files.options).map_err(|error| refuse(&error))?;
        let matches = Cli::command().get_matches_from(&merged);
        let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        Ok(Self { cli, files, args: merged })
    }

    /// The command line of the daemons of a holder.
    pub(crate) fn args_of_daemon(&self) -> Vec<OsString> {
        let (program, rest) = self
            .args
            .split_first()
            .map_or((OsString::from("vdpad"), &[][..]), |(program, rest)| (program.clone(), rest));
        let first = [program, OPTIONS_READ.into()];
        first.into_iter().chain(rest.iter().filter(|arg| *arg != OPTIONS_READ).cloned()).collect()
    }
}

fn refuse(error: &str) -> ExitCode {
    eprintln!("vdpad: {error}");
    ExitCode::from(EXIT_USAGE)
}

fn read_files(path: &Path, given: bool) -> Result<Configuration, String> {
    if given && !path.exists() {
        return Err(format!("--config {}: there is no such file", path.display()));
    }
    Configuration::read(path).map_err(|error| error.to_string())
}

/// Puts the options of the files before those of the command line, unless these have the same.
fn merge(args: &[OsString], matches: &ArgMatches, options: &[DaemonOption]) -> Result<Vec<OsString>, String> {
    let command = Cli::command();
    let mut merged: Vec<OsString> = args.iter().take(1).cloned().collect();
    for (place, option) in options.iter().enumerate() {
        let DaemonOption { name, value, at } = option;
        let known = command.get_arguments().find(|arg| arg.get_long() == Some(name));
        let known = known.filter(|_| !NOT_IN_FILES.contains(&name.as_str()));
        let id = known.ok_or_else(|| {
            format!("{at}: \"{name}\" is no option for a file; {} are", names(&command).join(", "))
        })?;
        let given = matches.value_source(id.get_id().as_str());
        let later = options.iter().skip(place + 1).any(|other| other.name == *name);
        if matches!(given, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) || later {
            continue;
        }
        let arg = match value {
            Some(value) => format!("--{name}={value}"),
            None => format!("--{name}"),
        };
        check(&arg).map_err(|reason| format!("{at}: {name}: {reason}"))?;
        merged.push(arg.into());
    }
    merged.extend(args.iter().skip(1).cloned());
    Ok(merged)
}

/// Whether the program takes this argument, by itself.
fn check(arg: &str) -> Result<(), String> {
    match Cli::command().try_get_matches_from(["vdpad", arg]) {
        Ok(_) => Ok(()),
        // Another option that it needs may be given elsewhere.
        Err(error) if error.kind() == clap::error::ErrorKind::MissingRequiredArgument => Ok(()),
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            Err(first.trim_start_matches("error: ").to_owned())
        }
    }
}

fn names(command: &Command) -> Vec<String> {
    let long = command.get_arguments().filter_map(|arg| arg.get_long());
    long.filter(|name| !NOT_IN_FILES.contains(name)).map(str::to_owned).collect()
}
