//! The daemon's command line. What it does is in [`vdpad::daemon`].
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use vdpa_backend::front::watchdog::{self, Ended};
use vdpa_control::Front;
use vdpa_control::api::AddRequest;
use vdpa_sys::uapi::live::{self, Numbers};
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
    /// What clients open: cuse for character devices, fuse for files, auto for what there is (a directory not below
    /// /dev is for files)
    #[arg(long, value_name = "auto|cuse|fuse", default_value = "auto")]
    front: Front,

    /// Directory in which the device files appear [default: /dev for character devices; for files /run/vdpad/dev, without
    /// root $XDG_RUNTIME_DIR/vdpad/dev]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Path of the control socket [default: /run/vdpad/control.sock, without root
    /// $XDG_RUNTIME_DIR/vdpad/control.sock]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Seconds a request on a device file may take before its caller gets an error
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    request_timeout: Duration,

    /// Seconds without progress after which the watchdog frees the clients
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    watchdog_timeout: Duration,

    /// Threads that serve the rings of all devices without the attribute cpus, at most [default: one for each processor
    /// that the daemon may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// Microseconds for which such a thread may look at rings before it sleeps, as long as that pays; 0 is never
    #[arg(long, value_name = "N", env = "VDPAD_POLL_US", default_value = "20", value_parser = clap::value_parser!(u16).range(..=1000))]
    poll_us: u16,

    /// Other numbers for the live-update requests, which no released kernel has: NAME=NUMBER,... with new_owner, remap,
    /// new_owner_bit and remap_bit
    #[arg(long, value_name = "NUMBERS", env = live::ENV, default_value = "")]
    live_numbers: Numbers,

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
    Watchdog {
        /// Source of the mounts that are the daemon's
        #[arg(long)]
        source: String,
        /// Seconds without a sign of life
        #[arg(long, value_parser = seconds)]
        timeout: Duration,
    },
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
    #[cfg(feature = "planted-faults")]
    if let Err(name) = plant_fault() {
        eprintln!("vdpad: VDPA_PLANTED_FAULT: there is no fault {name:?}");
        return ExitCode::from(2);
    }
    match cli.command {
        Some(Command::Watchdog { source, timeout }) => watch(&source, timeout),
        None => serve(cli.serve),
    }
}

/// Makes this daemon wrong in the way that `VDPA_PLANTED_FAULT` names, for the test of the conformance suite.
#[cfg(feature = "planted-faults")]
fn plant_fault() -> Result<(), std::ffi::OsString> {
    let Some(name) = std::env::var_os("VDPA_PLANTED_FAULT") else { return Ok(()) };
    let fault = name.to_str().and_then(vdpa_core::faults::plant);
    tracing::warn!(?fault, "this daemon is wrong on purpose");
    fault.map(drop).ok_or(name)
}

fn serve(options: Serve) -> ExitCode {
    if let Err(error) = live::configure(options.live_numbers) {
        eprintln!("vdpad: --live-numbers: {error}");
        return ExitCode::from(2);
    }
    let root = rustix::process::geteuid().is_root();
    let (Some(mount_dir), Some(control)) = (
        options.dir.clone().or_else(|| default_path("dev", root)),
        options.control.or_else(|| default_path("control.sock", root)),
    ) else {
        eprintln!("vdpad: without root and without XDG_RUNTIME_DIR give --dir and --control");
        return ExitCode::from(2);
    };
    // First thing, while there is one thread: an ordinary user serves the processes of a namespace of their own.
    if !root && let Err(error) = vdpa_sys::userns::enter() {
        eprintln!("vdpad: cannot run without root: {error}");
        return ExitCode::from(EXIT_ENVIRONMENT);
    }
    let config = Config {
        front: options.front,
        dir: options.dir,
        mount_dir,
        control,
        request_timeout: options.request_timeout,
        watchdog_timeout: options.watchdog_timeout,
        poll: Duration::from_micros(options.poll_us.into()),
        workers: options.workers.map_or_else(processors, usize::from),
        devices: options.devices,
    };
    let daemon = match Daemon::start(&config) {
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

/// Processors that this process may use.
fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
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
    eprintln!("vdpad: {}", vdpa_core::error::chain(error));
}

/// Where things are unless told otherwise.
fn default_path(name: &str, root: bool) -> Option<PathBuf> {
    let base = if root { PathBuf::from("/run") } else { std::env::var_os("XDG_RUNTIME_DIR")?.into() };
    Some(base.join("vdpad").join(name))
}

fn watch(source: &str, timeout: Duration) -> ExitCode {
    match watchdog::run(io::stdin(), source, timeout) {
        Ok(Ended::DaemonDied | Ended::Shutdown) => ExitCode::SUCCESS,
        Ok(Ended::Fired) => ExitCode::from(EXIT_RUNTIME),
        Err(error) => {
            eprintln!("vdpad watchdog: {error}");
            ExitCode::from(EXIT_RUNTIME)
        }
    }
}
