//! vdpactl: iproute2's `vdpa` for the devices of vdpad.
//!
//! Objects `mgmtdev` and `dev` take words, as iproute2 does (`name vdpa0 mgmtdev blk`), so clap reads only the
//! options, which may stand anywhere; the words go to the file of their object:
//!
//! * [`mgmtdev`], [`dev`] with [`config`] and [`vstats`]: one file per object, grammar and output.
//! * [`words`]: abbreviations and `name value` pairs.
//! * [`output`]: plain lines or iproute2's JSON; [`features`], [`utc`]: names and times in it.
//! * [`failure`]: errors as iproute2 words them.
#![forbid(unsafe_code)]

mod config;
mod dev;
mod failure;
mod features;
mod mgmtdev;
mod output;
mod update;
mod utc;
mod vstats;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use vdpa_bench::{bench, blackout, demo};
use vdpa_control::DEFAULT_SOCKET;
use vdpa_control::client::Client;

use failure::Failure;
use output::Format;

/// Shows and configures the vDPA devices of vdpad, in the words of iproute2's vdpa(8).
#[derive(Debug, Parser)]
#[command(
    name = "vdpactl",
    version,
    infer_subcommands = true,
    allow_external_subcommands = true,
    disable_help_subcommand = true,
    after_help = "Exit status: 0 done, 1 refused or impossible, 2 wrong options."
)]
struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    object: Option<Object>,
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Print JSON, on one line
    #[arg(short, long, global = true)]
    json: bool,

    /// With --json, print it over several lines
    #[arg(short, long, global = true)]
    pretty: bool,

    /// Print more: what devices are doing, attributes of block devices
    #[arg(short, long, global = true, action = ArgAction::Count)]
    statistics: u8,

    /// Print numbers instead of names where there is a choice
    #[arg(short, long, global = true)]
    no_nice_names: bool,

    /// Path of vdpad's control socket
    #[arg(long, global = true, value_name = "PATH", env = "VDPAD_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// What a command is about. Further objects are added here, with a file each.
///
/// `d` and `de` mean `dev` whatever else begins with them, as long as iproute2 has no second object there.
#[derive(Debug, Subcommand)]
enum Object {
    /// Management devices: what devices can be created on
    Mgmtdev {
        /// Command and its words; "help" lists them
        words: Vec<String>,
    },
    /// Devices
    #[command(aliases = ["d", "de"])]
    Dev {
        /// Command and its words; "help" lists them
        #[arg(allow_negative_numbers = true)]
        words: Vec<String>,
        /// With "del": take the device away from the client that uses it
        #[arg(short, long)]
        force: bool,
    },
    /// Updates of clients: who owns which device since when, and what its last update cost
    Update {
        /// Command and its words; "help" lists them
        words: Vec<String>,
    },
    /// Shows what updates of a running client cost, and that nothing is lost
    Demo(Box<demo::Options>),
    /// Measures devices
    Bench {
        /// What
        #[command(subcommand)]
        what: Bench,
    },
    /// The words of every object
    Help,
    #[command(external_subcommand)]
    Other(Vec<String>),
}

/// What can be measured.
#[derive(Debug, Subcommand)]
enum Bench {
    /// Verified random requests: rate and latency
    Io(Box<bench::Options>),
    /// How long no driver is there in an update, by memory size, way and strategy
    Update(Box<blackout::Options>),
}

/// What every command needs.
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
    // Measuring requests drives a device in this process.
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

/// An ordinary user's private daemon and its clients share a namespace of their own. First thing, while there is one
/// thread.
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
        Some(Object::Mgmtdev { words }) => mgmtdev::run(&session, &words),
        Some(Object::Dev { words, force }) => dev::run(&session, &words, force),
        Some(Object::Update { words }) => update::run(&session, &words),
        None | Some(Object::Help | Object::Demo(_) | Object::Bench { .. }) => {
            eprint!("{HELP}");
            Ok(())
        }
        Some(Object::Other(words)) => {
            Err(Failure::Words(format!("Object \"{}\" not found", words.first().map_or("", String::as_str))))
        }
    }
}

const HELP: &str = "\
Usage: vdpactl [ OPTIONS ] OBJECT { COMMAND | help }
where  OBJECT := { mgmtdev | dev | update | demo | bench }
       OPTIONS := { -V[ersion] | -n[o-nice-names] | -j[son] | -p[retty] |
                    -s[tatistics] | --socket PATH }
";
