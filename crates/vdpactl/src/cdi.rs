//! `vdpactl cdi`: the specification by which container runtimes give a container a device (docs/containers.md).

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use vdpa_control::api::CtlError;
use vdpa_control::cdi::{DIRECTORY, Given, Spec};
use vdpa_core::Errno;

use crate::Session;
use crate::failure::Failure;
use crate::grammar;

pub(crate) const HELP: &str = "\
Usage: vdpactl cdi generate [ --output FILE ] [ --container-dir DIR ]
";

/// Where to, and of what.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// File for the specification, which is replaced as a whole: /var/run/cdi/vdpa-live.json [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Directory in which a container finds its devices, by name
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, value_parser = absolute)]
    container_dir: PathBuf,
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(format!("an absolute path is right, such as {DIRECTORY}"))
}

/// Runs one command.
pub(crate) fn run(session: &Session, args: &[String], options: &Options) -> Result<(), Failure> {
    match args {
        [] => {
            eprint!("{HELP}");
            Ok(())
        }
        [word, ..] if grammar::matches(word, "help") => {
            eprint!("{HELP}");
            Ok(())
        }
        [word] if grammar::matches(word, "generate") => generate(session, options),
        [word, extra, ..] if grammar::matches(word, "generate") => Err(grammar::unknown_option(extra)),
        [word, ..] => Err(grammar::no_command(word)),
    }
}

/// Writes the specification of the devices that run. Those that no container can be given are named and left out.
fn generate(session: &Session, options: &Options) -> Result<(), Failure> {
    let mut given = Vec::new();
    for info in session.client.devices()? {
        match Given::of(&info, &options.container_dir, Path::new("/sys")) {
            Ok(device) => given.push(device),
            Err(reason) => eprintln!("vdpactl: left out: {reason}"),
        }
    }
    let spec = Spec::new(&given).ok_or_else(|| {
        CtlError::new(Errno::NODEV, "there is no device that a container can be given")
            .with_hint("\"vdpactl dev add\" makes one. A specification without devices is none of CDI.")
    })?;
    let Some(file) = &options.output else {
        let mut out = io::stdout().lock();
        return out.write_all(spec.text().as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output);
    };
    spec.write(file).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::INVAL.raw()));
        CtlError::new(errno, format!("cannot write {}", file.display()))
            .with_hint(
                "Runtimes read *.json in /etc/cdi and /var/run/cdi; make the directory if there is none.",
            )
            .into()
    })
}
