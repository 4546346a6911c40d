//! `vdpactl daemon`: the daemon itself, and the holder that starts it again.

use serde_json::{Map, json};
use vdpa_control::api::{CrashInfo, DaemonInfo, HolderInfo};

use crate::Session;
use crate::failure::Failure;
use crate::grammar;
use crate::output::{Entry, put, section};
use crate::utc::rfc3339;

const HELP: &str = "Usage: vdpactl daemon show\n";

/// Runs one command.
pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    grammar::show_only(HELP, args, |args| match args {
        [] => {
            let daemon = session.client.daemon().map_err(Failure::from)?;
            section(session.format, "daemon", Ok(vec![entry(&daemon)]))
        }
        [extra, ..] => Err(Failure::Usage(format!("Command \"{extra}\" not found"))),
    })
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
            let HolderInfo { pid, generation, crashes, held, last_crash } = holder;
            put!(plain, "  holder pid {pid} generation {generation} crashes {crashes} held {held}\n");
            let mut value = json!({"pid": pid, "generation": generation, "crashes": crashes, "held": held});
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
