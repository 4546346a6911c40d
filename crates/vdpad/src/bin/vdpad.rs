//! The daemon's command line. What it does is in [`vdpad::daemon`].
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use vdpad::ctl::api::{AddRequest, Backend, CtlError, DevInfo, MgmtDev, QueueVstats};
use vdpad::ctl::{DEFAULT_SOCKET, config::DevConfig};
use vdpad::daemon::{self, Config, Daemon, StartError};

/// The daemon met an error.
const EXIT_RUNTIME: u8 = 1;
/// The machine lacks something, for example /dev/fuse. (2, wrong usage, is clap's.)
const EXIT_ENVIRONMENT: u8 = 3;

/// Serves vDPA devices as vhost-vdpa device files.
///
/// Exit status: 0 after SIGTERM or SIGINT, 1 after an error, 2 for wrong usage, 3 when the machine lacks something
/// the daemon needs, for example /dev/fuse.
#[derive(Debug, Parser)]
#[command(name = "vdpad", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// Directory in which the device files appear
    #[arg(long, value_name = "DIR", default_value = "/run/vdpad/dev")]
    dir: PathBuf,

    /// Path of the control socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    control: PathBuf,

    /// Seconds a request on a device file may take before its caller gets an error
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    request_timeout: Duration,

    /// Seconds without progress after which the watchdog frees the clients
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    watchdog_timeout: Duration,

    /// What to log to standard error: error, warn, info, debug, trace, or filters as in RUST_LOG's syntax
    #[arg(long, value_name = "FILTER", env = "VDPAD_LOG", default_value = "info")]
    log: String,

    /// A device to create at start; may be repeated
    #[arg(long = "dev", value_name = "name=NAME mgmtdev=MGMTDEV ATTR=VALUE...", value_parser = daemon::parse_device)]
    devices: Vec<AddRequest>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watches a daemon; started by the daemon itself
    #[command(hide = true)]
    Watchdog,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "a number of seconds greater than 0 is right, for example 2.5".into())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match EnvFilter::try_new(&cli.serve.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("vdpad: --log {:?}: {error}", cli.serve.log);
            return ExitCode::from(2);
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .init();
    match cli.command {
        Some(Command::Watchdog) => watchdog(),
        None => serve(cli.serve),
    }
}

fn serve(options: Serve) -> ExitCode {
    let config = Config {
        dir: options.dir,
        control: options.control,
        request_timeout: options.request_timeout,
        watchdog_timeout: options.watchdog_timeout,
        devices: options.devices,
    };
    let daemon = match Daemon::start(&config, Arc::new(EmptyBus)) {
        Ok(daemon) => daemon,
        Err(error) => {
            report(&error);
            return ExitCode::from(match error {
                StartError::Environment { .. } => EXIT_ENVIRONMENT,
                _ => EXIT_RUNTIME,
            });
        }
    };
    let outcome = daemon.run(announce);
    daemon.stop();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(EXIT_RUNTIME)
        }
    }
}

/// Tells scripts that wait for it, by the line `ready`, that devices and control socket can be used.
fn announce() {
    let mut stdout = io::stdout().lock();
    if let Err(error) = writeln!(stdout, "ready").and_then(|()| stdout.flush()) {
        tracing::debug!(%error, "nobody reads standard output");
    }
}

/// One line with the whole chain of causes.
fn report(error: &dyn Error) {
    let mut line = format!("vdpad: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(&format!(": {error}"));
        cause = error.source();
    }
    eprintln!("{line}");
}

fn watchdog() -> ExitCode {
    eprintln!("vdpad: there is no device file to watch");
    ExitCode::from(EXIT_RUNTIME)
}

/// A bus without management devices.
#[derive(Debug)]
struct EmptyBus;

impl Backend for EmptyBus {
    fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, CtlError> {
        Ok(Vec::new())
    }

    fn devices(&self) -> Result<Vec<DevInfo>, CtlError> {
        Ok(Vec::new())
    }

    fn device(&self, _name: &str) -> Result<DevInfo, CtlError> {
        Err(CtlError::no_device())
    }

    fn config(&self, _name: &str) -> Result<DevConfig, CtlError> {
        Err(CtlError::no_device())
    }

    fn vstats(&self, _name: &str, _queue_index: u16) -> Result<QueueVstats, CtlError> {
        Err(CtlError::no_device())
    }

    fn add(&self, _request: AddRequest) -> Result<(), CtlError> {
        Err(CtlError::no_mgmtdev())
    }

    fn delete(&self, _name: &str, _force: bool) -> Result<(), CtlError> {
        Err(CtlError::no_device())
    }
}
