//! The command line of vdpad. The daemon itself is [`vdpad::daemon`].
#![forbid(unsafe_code)]

mod configured;
mod setup;

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use vdpa_backend::front::watchdog::{self, Ended};
use vdpa_control::api::AddRequest;
use vdpa_control::files::{self, Configuration};
use vdpa_control::{Front, SOCKET_ENV};
use vdpa_holder::holder::{self, Outcome, Program};
use vdpa_holder::protocol::Role;
use vdpa_sys::sigsys;
use vdpa_sys::uapi::live::{self, Numbers};
use vdpad::control::Access;
use vdpad::daemon::{self, Config, Daemon, StartError, User};
use vdpad::keeper;
use vdpad::rights::{self, Capabilities};
use vdpad::seccomp;
use vdpad::survival::{self, Survival};

use configured::Configured;

/// The daemon failed.
const EXIT_RUNTIME: u8 = 1;
/// Wrong usage: as clap's.
const EXIT_USAGE: u8 = 2;
/// The machine lacks something, for example /dev/fuse.
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
    /// Configuration file, with options and devices; those in conf.d beside it are read too
    #[arg(long, value_name = "FILE", env = "VDPAD_CONFIG", default_value = files::DEFAULT)]
    config: PathBuf,

    /// Only check command line and configuration files
    #[arg(long)]
    check: bool,

    /// The options of the configuration files are on the command line
    #[arg(long, hide = true)]
    options_read: bool,

    /// Kind of the device files: cuse for character devices, fuse for files, auto for character devices where they can be made
    /// (never in a directory outside /dev); vduse for none, the kernel gets the devices
    #[arg(long, value_name = "auto|cuse|fuse|vduse", default_value = "auto")]
    front: Front,

    /// Directory of the device files [default: /dev for character devices; for files /run/vdpad/dev, without
    /// root $XDG_RUNTIME_DIR/vdpad/dev]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Who mounts that directory, for files: own, the daemon; given, the service manager passes a mount that was made by "--mount make".
    /// And for ExecStartPre= and ExecStopPost= of a service that may not mount: make, only mount it, and give it to the service manager;
    /// end, only end it, unless the service restarts
    #[arg(long, value_name = "own|given|make|end", default_value = "own")]
    mount: Mounting,

    /// Path of the control socket [default: /run/vdpad/control.sock, without root
    /// $XDG_RUNTIME_DIR/vdpad/control.sock]
    #[arg(long, value_name = "PATH", env = SOCKET_ENV, alias = "control")]
    socket: Option<PathBuf>,

    /// Group whose members may use the control socket as root may: a name in /etc/group, or a number [default: none]
    #[arg(long, value_name = "GROUP", value_parser = daemon::group)]
    socket_group: Option<u32>,

    /// Group whose members may ask over the control socket, and change nothing [default: none]
    #[arg(long, value_name = "GROUP", value_parser = daemon::group)]
    socket_readers: Option<u32>,

    /// User to run as, with a few capabilities in place of all rights of root: a name in /etc/passwd, or UID:GID. For root, and for that
    /// user [default: the user that starts it]
    #[arg(long, value_name = "NAME|UID:GID", value_parser = daemon::user)]
    user: Option<User>,

    /// Whose clients are served, with --user: any, or only those of that user (own), for which far fewer capabilities are kept
    #[arg(long, value_name = "any|own", default_value = "any", requires = "user")]
    clients: Clients,

    /// Capabilities to keep besides: net_admin for TAP interfaces and the kernel's vdpa bus, dac_override for disks of other users,
    /// sys_admin for device_file with --front cuse [default: none]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = rights::capability, requires = "user")]
    capability: Vec<Capabilities>,

    /// What becomes of system calls that the daemon has no use for: on, they fail and are named on standard error; log, the kernel logs
    /// their numbers; off, nothing
    #[arg(long, value_name = "on|log|off", default_value = "off")]
    seccomp: seccomp::Mode,

    /// Serve metrics over TCP too, to everybody who can connect to this address: 127.0.0.1:9476, [::]:9476 [default: on the control
    /// socket only]
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<std::net::SocketAddr>,

    /// Seconds that a request on a device file may take before its caller gets an error
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    request_timeout: Duration,

    /// Seconds without a heartbeat of the daemon after which the watchdog releases its clients
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    watchdog_timeout: Duration,

    /// Most threads that serve the rings of devices without the attribute cpus [default: one for each processor that the daemon
    /// may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,

    /// Microseconds for which such a thread busy-polls rings before it sleeps, while that pays; 0 disables it
    #[arg(long, value_name = "N", env = "VDPAD_POLL_US", default_value = "20", value_parser = clap::value_parser!(u16).range(..=1000))]
    poll_us: u16,

    /// Numbers for the live-update requests, which no released kernel has yet: NAME=NUMBER,... with new_owner, remap,
    /// new_owner_bit and remap_bit
    #[arg(long, value_name = "NUMBERS", env = live::ENV, default_value = "")]
    live_numbers: Numbers,

    /// Run below a holder process, which starts the daemon again after a crash: its devices and their clients go on. For root
    #[arg(long)]
    holder: bool,

    /// Crashes within the time of --crash-window that the holder tolerates; after one more the daemon answers every request with
    /// an error
    #[arg(long, value_name = "N", default_value = "5", requires = "holder")]
    crash_limit: u16,

    /// Seconds for which a crash counts
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, requires = "holder")]
    crash_window: Duration,

    /// Keep requests on device files in memory until they are answered, also where the kernel can send them again after a crash (Linux
    /// 6.9 and later; before, they are always kept)
    #[arg(long, requires = "holder")]
    keep_requests: bool,

    /// Seconds without progress after which the holder ends the daemon and starts it again; 0: never
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds_or_never, requires = "holder")]
    hang_limit: Duration,

    /// What to log to standard error: error, warn, info, debug, trace, or filters in the syntax of RUST_LOG
    #[arg(long, value_name = "FILTER", env = "VDPAD_LOG", default_value = "info")]
    log: String,

    /// A device to create at start; may be repeated
    #[arg(long = "dev", value_name = "name=NAME mgmtdev=MGMTDEV ATTR=VALUE...", value_parser = daemon::parse_device_spec)]
    devices: Vec<AddRequest>,
}

/// Who mounts the directory of device files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mounting {
    Own,
    Given,
    Make,
    End,
}

/// Whose clients are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Clients {
    Any,
    Own,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes the manual page and the completions of shells into a directory
    #[cfg(feature = "manual")]
    #[command(hide = true)]
    WriteManual {
        /// The directory
        directory: PathBuf,
    },
    /// Watches a daemon, which starts it
    #[command(hide = true)]
    Watchdog {
        /// Source of the daemon's mounts
        #[arg(long)]
        source: String,
        /// Seconds without a heartbeat
        #[arg(long, value_parser = seconds)]
        timeout: Duration,
    },
    /// Keeps a device of somebody else open for a daemon, which starts it
    #[command(hide = true)]
    Keeper {
        /// Name of the device
        #[arg(long)]
        device: String,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "a number of seconds greater than 0 is right, for example 2.5".into())
}

fn seconds_or_never(text: &str) -> Result<Duration, String> {
    if text.trim_matches('0').is_empty() { Ok(Duration::ZERO) } else { seconds(text) }
}

fn main() -> ExitCode {
    let configured = match Configured::read() {
        Ok(configured) => configured,
        Err(status) => return status,
    };
    let args = configured.args_of_daemon();
    let Configured { cli, files, .. } = configured;
    if cli.serve.check {
        println!("{} options of files, {} devices: ok", files.options.len(), files.devices.len());
        return ExitCode::SUCCESS;
    }
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
    #[cfg(feature = "crash-points")]
    if let Err(error) = vdpad::crash_points::from_env() {
        eprintln!("vdpad: {}: {error}", vdpad::crash_points::ENV);
        return ExitCode::from(2);
    }
    if cli.command.is_none() {
        if let Some(status) = cli.serve.mount_for_service() {
            return status;
        }
        if let Err(status) = cli.serve.take_rights() {
            return status;
        }
    }
    // A process that the daemon starts has its filter, and not its handler.
    if let Err(errno) = sigsys::name_refused() {
        tracing::debug!(%errno, "refused system calls are not named");
    }
    match cli.command {
        #[cfg(feature = "manual")]
        Some(Command::WriteManual { directory }) => write_manual(&directory),
        Some(Command::Watchdog { source, timeout }) => watch(&source, timeout),
        Some(Command::Keeper { device }) => keep(&device),
        None if cli.serve.holder => hold(cli.serve, files, args),
        None => serve(cli.serve, files, None),
    }
}

#[cfg(feature = "manual")]
fn write_manual(directory: &std::path::Path) -> ExitCode {
    use clap::CommandFactory as _;
    use clap_complete::Shell;
    let page = clap_mangen::Man::new(Cli::command()).generate_to(directory).map(drop);
    let written = page.and_then(|()| {
        [Shell::Bash, Shell::Zsh, Shell::Fish].into_iter().try_for_each(|shell| {
            clap_complete::generate_to(shell, &mut Cli::command(), "vdpad", directory).map(drop)
        })
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(EXIT_RUNTIME)
        }
    }
}

/// Plants the fault that `VDPA_PLANTED_FAULT` names, to test that the conformance suite finds it.
#[cfg(feature = "planted-faults")]
fn plant_fault() -> Result<(), OsString> {
    let Some(name) = std::env::var_os("VDPA_PLANTED_FAULT") else { return Ok(()) };
    let fault = name.to_str().and_then(vdpa_core::faults::plant);
    tracing::warn!(?fault, "this daemon has a planted fault");
    fault.map(drop).ok_or(name)
}

/// The main process with `--holder`: the holder, or the daemon that it has started.
fn hold(options: Serve, files: Configuration, args: Vec<OsString>) -> ExitCode {
    match Survival::from_env() {
        Err(errno) => {
            eprintln!("vdpad: cannot speak with the holder: {errno}");
            ExitCode::from(EXIT_RUNTIME)
        }
        Ok(Some(survival)) if survival.role() == Role::Failed => {
            survival.log_crash();
            tracing::error!("the daemon has crashed too often: its devices are given up");
            serve(options, files, Some(survival))
        }
        Ok(Some(survival)) => {
            survival.log_crash();
            serve(options, files, Some(survival))
        }
        Ok(None) if !options.is_service() => {
            eprintln!("vdpad: --holder needs root, or --user");
            ExitCode::from(2)
        }
        Ok(None) => run_holder(&options, args),
    }
}

/// `args` are those of the daemons.
fn run_holder(options: &Serve, args: Vec<OsString>) -> ExitCode {
    let file = match File::open("/proc/self/exe") {
        Ok(file) => Arc::new(file.into()),
        Err(error) => {
            eprintln!("vdpad: cannot open its own program: {error}");
            return ExitCode::from(EXIT_RUNTIME);
        }
    };
    let args = args.into_iter().map(OsStringExt::into_vec).collect();
    let limits = holder::Options {
        crash_limit: options.crash_limit.into(),
        crash_window: options.crash_window,
        hang: Some(options.hang_limit).filter(|limit| !limit.is_zero()),
        ..holder::Options::default()
    };
    match holder::run(Program { file, args }, limits) {
        Ok(Outcome::Stopped(end)) if end.signal == 0 => {
            ExitCode::from(u8::try_from(end.status).unwrap_or(EXIT_RUNTIME))
        }
        Ok(outcome) => {
            let end = match outcome {
                Outcome::Stopped(end) => end,
                Outcome::GaveUp(end, held) => {
                    survival::unmount_held(held, options.mount == Mounting::Given);
                    end
                }
            };
            eprintln!("vdpad: the daemon has ended: signal {}, status {}", end.signal, end.status);
            ExitCode::from(EXIT_RUNTIME)
        }
        Err(error) => {
            report(&error);
            ExitCode::from(EXIT_RUNTIME)
        }
    }
}

fn serve(options: Serve, files: Configuration, survival: Option<Survival>) -> ExitCode {
    if let Err(error) = live::configure(options.live_numbers) {
        eprintln!("vdpad: --live-numbers: {error}");
        return ExitCode::from(2);
    }
    let Some((mount_dir, socket)) = options.places() else {
        eprintln!("vdpad: without root and without XDG_RUNTIME_DIR give --dir and --socket");
        return ExitCode::from(2);
    };
    // Before any thread is started, as the namespaces require: without root the daemon serves processes of its own user namespace.
    if !options.is_service()
        && let Err(error) = vdpa_sys::userns::enter()
    {
        eprintln!("vdpad: cannot run without root: {error}");
        return ExitCode::from(EXIT_ENVIRONMENT);
    }
    // Before any thread, which would have none, and after the namespaces, which it does not allow.
    if let Err(error) = seccomp::restrict(options.seccomp) {
        report(&error);
        return ExitCode::from(EXIT_ENVIRONMENT);
    }
    let config = Config {
        front: options.front,
        dir: options.dir,
        mount_dir,
        mount_given: options.mount == Mounting::Given,
        socket,
        access: Access { admins: options.socket_group, readers: options.socket_readers },
        metrics: options.metrics,
        request_timeout: options.request_timeout,
        resend: !options.keep_requests,
        watchdog_timeout: options.watchdog_timeout,
        poll: Duration::from_micros(options.poll_us.into()),
        workers: options.workers.map_or_else(processors, usize::from),
        devices: files.devices.iter().map(|device| device.request.clone()).chain(options.devices).collect(),
        configuration: std::path::absolute(&options.config).unwrap_or(options.config),
    };
    let first = survival.as_ref().is_none_or(|survival| survival.generation() <= 1);
    let started = match survival {
        Some(survival) if survival.role() == Role::Failed => Daemon::start_failed(&config, survival),
        survival => Daemon::start(&config, survival).map(Some),
    };
    let daemon = match started {
        Ok(Some(daemon)) => daemon,
        Ok(None) => {
            eprintln!("vdpad: the daemon has crashed too often, and no device files are left");
            return ExitCode::from(EXIT_RUNTIME);
        }
        Err(error) => {
            if let StartError::Device { name, .. } = &error
                && let Some(device) = files.device(name)
            {
                eprintln!("vdpad: {}: of this device:", device.at);
            }
            report(&error);
            return ExitCode::from(match error {
                StartError::Environment { .. } => EXIT_ENVIRONMENT,
                _ => EXIT_RUNTIME,
            });
        }
    };
    // Scripts wait for the first one only.
    let outcome = daemon.run(|| {
        if first {
            print_ready();
        }
    });
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

/// Prints the line `ready`: scripts wait for it before they use devices and control socket.
fn print_ready() {
    let mut stdout = io::stdout().lock();
    if let Err(error) = writeln!(stdout, "ready").and_then(|()| stdout.flush()) {
        tracing::debug!(%error, "nobody reads standard output");
    }
}

/// Prints an error with its causes on one line.
fn report(error: &dyn Error) {
    eprintln!("vdpad: {}", vdpa_core::error::chain(error));
}

fn keep(device: &str) -> ExitCode {
    match keeper::run(io::stdin(), device) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::from(EXIT_RUNTIME)
        }
    }
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
