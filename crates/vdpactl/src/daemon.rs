//! `vdpactl daemon`: the daemon itself, and the holder that starts it again.

use std::time::{Duration, Instant};

use serde_json::Map;
use vdpa_control::api::{CrashInfo, CtlError, DaemonInfo, DaemonRole, HolderInfo, Phase, UpgradeRequest};
use vdpa_core::Errno;

use crate::Session;
use crate::failure::Failure;
use crate::grammar;
use crate::output::{Entry, put, section};
use crate::utc::rfc3339;

pub(crate) const HELP: &str = "Usage: vdpactl daemon show
       vdpactl daemon upgrade [ --binary PATH ] [ --dry-run ]
";
/// How long the next daemon may take to serve.
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(90);

/// Runs one command; `upgrade` has the options of that command.
pub(crate) fn run(session: &Session, args: &[String], upgrade: &UpgradeRequest) -> Result<(), Failure> {
    match args {
        [word, rest @ ..] if grammar::matches(word, "upgrade") => match rest {
            [] => replace(session, upgrade),
            [extra, ..] => Err(grammar::unknown_option(extra)),
        },
        _ if *upgrade != UpgradeRequest::default() => {
            Err(Failure::Usage("--binary and --dry-run belong to \"daemon upgrade\"".into()))
        }
        _ => grammar::show_only(HELP, args, |args| match args {
            [] => show(session, &session.client.daemon()?),
            [extra, ..] => Err(grammar::no_command(extra)),
        }),
    }
}

fn show(session: &Session, daemon: &DaemonInfo) -> Result<(), Failure> {
    section(session.format, "daemon", Ok(vec![entry(daemon)]))
}

/// Asks for the upgrade, and waits until the next daemon serves.
fn replace(session: &Session, request: &UpgradeRequest) -> Result<(), Failure> {
    let binary = request.binary.as_deref().map(std::path::absolute).transpose().map_err(Failure::Runtime)?;
    let before = session.client.daemon()?;
    session.client.upgrade(&UpgradeRequest { binary, ..*request })?;
    if request.dry_run {
        return Ok(());
    }
    let deadline = Instant::now() + UPGRADE_TIMEOUT;
    loop {
        // It waits in the socket for the next daemon.
        match session.client.daemon() {
            Ok(daemon) if daemon.pid != before.pid => return show(session, &daemon),
            _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {
                let error = CtlError::new(Errno::TIMEDOUT, "the daemon has not been replaced");
                return Err(error.with_hint("It goes on; its log says why.").into());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn entry(daemon: &DaemonInfo) -> Entry {
    let DaemonInfo { version, pid, since, role, poison, holder } = daemon;
    let since = rfc3339(*since);
    let role = match role {
        DaemonRole::Daemon => "daemon",
        DaemonRole::Failed => "failed",
    };
    let mut plain = format!("vdpad: version {version} pid {pid} since {since} role {role} poison {poison}\n");
    let mut json = Map::new();
    json.insert("version".into(), version.as_str().into());
    json.insert("pid".into(), (*pid).into());
    json.insert("since".into(), since.into());
    json.insert("role".into(), role.into());
    json.insert("poison".into(), (*poison).into());
    match holder {
        None => plain.push_str("  holder none: a crash ends all devices (vdpad --holder)\n"),
        Some(holder) => {
            write_holder(&mut plain, holder);
            json.insert("holder".into(), serde_json::to_value(holder).unwrap_or_default());
        }
    }
    Entry { name: "vdpad".into(), plain, json }
}

fn write_holder(plain: &mut String, holder: &HolderInfo) {
    let HolderInfo { pid, generation, upgrades, crashes, held, held_kinds, recovery, last_crash } = holder;
    put!(plain, "  holder pid {pid} generation {generation} upgrades {upgrades} crashes {crashes}\n");
    put!(plain, "  held {held}");
    held_kinds.iter().for_each(|(kind, count)| put!(plain, " {kind} {count}"));
    plain.push('\n');
    if let Some(CrashInfo { pid, signal, status, core, hung, recovery_ms }) = last_crash {
        put!(
            plain,
            "  last_crash pid {pid} signal {signal} status {status} core {} hung {} recovery_ms {recovery_ms:.3}\n",
            on_off(*core),
            on_off(*hung)
        );
    }
    if !recovery.is_empty() {
        plain.push_str("  recovery");
        recovery.iter().for_each(|Phase { name, ms }| put!(plain, " {} {ms:.3}", name.replace(' ', "_")));
        plain.push('\n');
    }
}

const fn on_off(value: bool) -> &'static str {
    if value { "on" } else { "off" }
}
