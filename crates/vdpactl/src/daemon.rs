//! `vdpactl daemon`: the daemon itself, and the holder that starts it again.

use std::time::{Duration, Instant};

use serde_json::{Map, json};
use vdpa_control::api::{CrashInfo, CtlError, DaemonInfo, HolderInfo, UpgradeRequest};
use vdpa_core::Errno;

use crate::Session;
use crate::failure::Failure;
use crate::grammar;
use crate::output::{Entry, put, section};
use crate::utc::rfc3339;

const HELP: &str = "Usage: vdpactl daemon show
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
        // Meanwhile nobody listens on the socket.
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
    let DaemonInfo { version, pid, since, holder } = daemon;
    let since = rfc3339(*since);
    let mut plain = format!("vdpad: version {version} pid {pid} since {since}\n");
    let mut json = Map::new();
    json.insert("version".into(), version.as_str().into());
    json.insert("pid".into(), (*pid).into());
    json.insert("since".into(), since.into());
    match holder {
        None => plain.push_str("  holder none: a crash ends all devices (vdpad --holder)\n"),
        Some(holder) => {
            let HolderInfo { pid, generation, upgrades, crashes, held, last_crash } = holder;
            put!(
                plain,
                "  holder pid {pid} generation {generation} upgrades {upgrades} crashes {crashes} held {held}\n"
            );
            let mut value = json!({
                "pid": pid, "generation": generation, "upgrades": upgrades, "crashes": crashes, "held": held
            });
            if let Some(CrashInfo { pid, signal, status, core, hung, recovery_ms }) = last_crash {
                put!(
                    plain,
                    "  last_crash pid {pid} signal {signal} status {status} core {} hung {} recovery_ms {recovery_ms:.3}\n",
                    on_off(*core),
                    on_off(*hung)
                );
                if let Some(object) = value.as_object_mut() {
                    object.insert(
                        "last_crash".into(),
                        json!({
                            "pid": pid, "signal": signal, "status": status, "core": core, "hung": hung,
                            "recovery_ms": recovery_ms
                        }),
                    );
                }
            }
            json.insert("holder".into(), value);
        }
    }
    Entry { name: "vdpad".into(), plain, json }
}

const fn on_off(value: bool) -> &'static str {
    if value { "on" } else { "off" }
}
