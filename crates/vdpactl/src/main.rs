//! vdpactl: iproute2's `vdpa` for the devices of vdpad.
//!
//! The objects take arguments in the grammar of iproute2 (`name vdpa0 mgmtdev blk`). clap parses only the options, which may stand
//! anywhere; the arguments go to the module of their object:
//!
//! * [`mgmtdev`], [`dev`] with [`config`], [`passed`] and [`vstats`], [`update`], [`configuration`], [`cdi`], [`watch`], [`doctor`]: one module per object, with its commands and their output.
//! * [`grammar`]: abbreviations and `name value` pairs.
//! * [`output`]: plain lines or iproute2's JSON; [`features`], [`utc`]: names and times in it.
//! * [`failure`]: errors, printed as iproute2 prints them.
#![forbid(unsafe_code)]

mod cdi;
mod config;
mod configuration;
mod daemon;
mod dev;
mod doctor;
mod failure;
mod features;
mod grammar;
mod mgmtdev;
mod output;
mod passed;
mod state;
mod update;
mod utc;
mod vstats;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use vdpa_bench::{bench, blackout, demo};
use vdpa_control::api::UpgradeRequest;
use vdpa_control::client::Client;
use vdpa_control::{DEFAULT_SOCKET, SOCKET_ENV};

use failure::Failure;
use output::Format;

/// Shows and configures the vDPA devices of vdpad, with the commands of iproute2's vdpa(8).
#[derive(Debug, Parser)]
#[command(
    name = "vdpactl",
    version,
    infer_subcommands = true,
    allow_external_subcommands = true,
    disable_help_subcommand = true,
    after_help = "Exit status: 0 success, 1 failure, 2 invalid options."
)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    object: Option<Object>,
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Print JSON on one line
    #[arg(short, long, global = true)]
    json: bool,

    /// With --json, print it on several lines
    #[arg(short, long, global = true)]
    pretty: bool,

    /// Print more: the state of devices, the configuration of block devices
    #[arg(short, long, global = true, action = ArgAction::Count)]
    statistics: u8,

    /// Print numbers instead of names where there is a choice
    #[arg(short, long, global = true)]
    no_nice_names: bool,

    /// Path of vdpad's control socket
    #[arg(long, global = true, value_name = "PATH", env = SOCKET_ENV, default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// The object of a command. Each has a module.
///
/// `d` and `de` mean `dev`, and `m` means `mgmtdev`, although other objects begin with them, as iproute2 has no other objects that do.
#[derive(Debug, Subcommand)]
enum Object {
    /// Management devices, which create devices
    #[command(aliases = ["m"], after_help = mgmtdev::HELP)]
    Mgmtdev {
        /// Command and its arguments; "help" lists them
        args: Vec<String>,
    },
    /// Devices
    #[command(aliases = ["d", "de"], after_help = dev::HELP)]
    Dev {
        /// Command and its arguments; "help" lists them
        #[arg(allow_negative_numbers = true)]
        args: Vec<String>,
        /// With "del": delete the device even if a client has it open. With "set": let a disk become smaller
        #[arg(short, long)]
        force: bool,
    },
    /// Updates of clients: the owner of each device, and the last update with its phases
    #[command(after_help = update::HELP)]
    Update {
        /// Command and its arguments; "help" lists them
        args: Vec<String>,
    },
    /// The daemon itself, and the holder that starts it again after a crash
    #[command(after_help = daemon::HELP)]
    Daemon {
        /// Command and its arguments; "help" lists them
        args: Vec<String>,
        /// With "upgrade": the program to go on with [default: what lies at the path of the running one]
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
        /// With "upgrade": only check whether the program could go on
        #[arg(long)]
        dry_run: bool,
    },
    /// The configuration files, and what runs
    #[command(after_help = configuration::HELP)]
    Config {
        /// Command and its arguments; "help" lists them
        args: Vec<String>,
    },
    /// What container runtimes have to know to give a container a device
    #[command(after_help = cdi::HELP)]
    Cdi {
        /// Command and its arguments; "help" lists them
        args: Vec<String>,
        #[command(flatten)]
        options: cdi::Options,
    },
    /// Shows what the devices do, with rates, again and again
    Top(watch::Options),
    /// Prints what happens to the devices and the daemon, a line each
    Monitor(watch::Options),
    /// Checks this machine: what will and will not work, and why. For the user that the daemon runs as
    Doctor,
    /// Shows the downtime of updates of a running client, and that nothing is lost
    Demo(Box<demo::Options>),
    /// Measures devices
    Bench {
        /// The benchmark
        #[command(subcommand)]
        what: Bench,
    },
    /// Writes the manual pages and the completions of shells into a directory
    #[cfg(feature = "manual")]
    #[command(hide = true)]
    WriteManual {
        /// The directory
        directory: PathBuf,
    },
    /// Shows the usage
    Help,
    #[command(external_subcommand)]
    Other(Vec<String>),
}

/// The benchmarks.
#[derive(Debug, Subcommand)]
enum Bench {
    /// Verified random requests: rate and latency
    Io(Box<bench::Options>),
    /// Downtime of updates, by memory size, way and strategy
    Update(Box<blackout::Options>),
}

/// What every command uses.
#[derive(Debug)]
struct Session {
    client: Client,
    format: Format,
    statistics: bool,
    nice_names: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Object::Demo(_) | Object::Bench { .. }) = &cli.object
        && let Err(error) = own_namespace()
    {
        eprintln!("vdpactl: cannot start a private daemon without root: {error}");
        return ExitCode::from(1);
    }
    // `bench io` drives a device in this process, so the numbers of the live-update requests matter here.
    if let Err(error) = vdpa_sys::uapi::live::configure_from_env() {
        eprintln!("vdpactl: {}: {error}", vdpa_sys::uapi::live::ENV);
        return ExitCode::from(2);
    }
    match &cli.object {
        Some(Object::Demo(options)) => return demo::main(options, cli.options.json),
        Some(Object::Bench { what: Bench::Io(options) }) => return bench::main(options, cli.options.json),
        Some(Object::Bench { what: Bench::Update(options) }) => {
            return blackout::main(options, cli.options.json);
        }
        #[cfg(feature = "manual")]
        Some(Object::WriteManual { directory }) => return write_manual(directory),
        _ => {}
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print();
            ExitCode::from(1)
        }
    }
}

#[cfg(feature = "manual")]
fn write_manual(directory: &std::path::Path) -> ExitCode {
    use clap::CommandFactory as _;
    let pages = clap_mangen::generate_to(Cli::command().flatten_help(true), directory);
    // Bash has a completion that knows the grammar and asks for the names of devices: dist/completions.
    let written = pages.and_then(|()| {
        [clap_complete::Shell::Zsh, clap_complete::Shell::Fish].into_iter().try_for_each(|shell| {
            clap_complete::generate_to(shell, &mut Cli::command(), "vdpactl", directory).map(drop)
        })
    });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vdpactl: cannot write the manual: {error}");
            ExitCode::from(1)
        }
    }
}

/// Without root, the private daemon and its clients need a user namespace of their own. Must be called before any thread is started.
fn own_namespace() -> Result<(), vdpa_sys::userns::UserNsError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { vdpa_sys::userns::enter() }
}

fn run(Cli { options, object }: Cli) -> Result<(), Failure> {
    let session = Session {
        client: Client::new(options.socket).map_err(Failure::Runtime)?,
        format: match (options.json, options.pretty) {
            (false, _) => Format::Plain,
            (true, false) => Format::Json,
            (true, true) => Format::PrettyJson,
        },
        statistics: options.statistics > 0,
        nice_names: !options.no_nice_names,
    };
    match object {
        Some(Object::Mgmtdev { args }) => mgmtdev::run(&session, &args),
        Some(Object::Dev { args, force }) => dev::run(&session, &args, force),
        Some(Object::Update { args }) => update::run(&session, &args),
        Some(Object::Daemon { args, binary, dry_run }) => {
            daemon::run(&session, &args, &UpgradeRequest { binary, dry_run })
        }
        Some(Object::Config { args }) => configuration::run(&session, &args),
        Some(Object::Cdi { args, options }) => cdi::run(&session, &args, &options),
        Some(Object::Top(options)) => watch::top(&session, options),
        Some(Object::Monitor(options)) => watch::monitor(&session, options),
        Some(Object::Doctor) => doctor::run(&session),
        #[cfg(feature = "manual")]
        Some(Object::WriteManual { .. }) => Ok(()),
        None | Some(Object::Help | Object::Demo(_) | Object::Bench { .. }) => {
            eprint!("{HELP}");
            Ok(())
        }
        Some(Object::Other(args)) => {
            Err(Failure::Usage(format!("Object \"{}\" not found", args.first().map_or("", String::as_str))))
        }
    }
}

const HELP: &str = "\
Usage: vdpactl [ OPTIONS ] OBJECT { COMMAND | help }
where  OBJECT := { mgmtdev | dev | update | daemon | config | cdi | top | monitor | doctor | demo | bench }
       OPTIONS := { -V[ersion] | -n[o-nice-names] | -j[son] | -p[retty] |
                    -s[tatistics] | --socket PATH }
";
