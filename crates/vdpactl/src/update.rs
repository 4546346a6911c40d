//! `vdpactl update`: the owner of each device, and the last update of its clients.

use serde_json::{Map, Value, json};
use vdpa_control::api::{LastUpdate, UpdateInfo};

use crate::Session;
use crate::failure::Failure;
use crate::grammar;
use crate::output::{Entry, put, section};
use crate::utc::rfc3339;

pub(crate) const HELP: &str = "Usage: vdpactl update show [ DEV ]\n";

/// Runs one command.
pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    grammar::show_only(HELP, args, |args| show(session, args))
}

fn show(session: &Session, args: &[String]) -> Result<(), Failure> {
    let updates = match args {
        [] => session.client.updates(),
        args => session.client.update(grammar::only(args)?).map(|update| vec![update]),
    };
    let entries = updates.map(|updates| updates.iter().map(entry).collect());
    section(session.format, "update", entries.map_err(Failure::from))
}

/// Milliseconds with three digits.
fn ms(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000, ns / 1_000 % 1_000)
}

fn entry(update: &UpdateInfo) -> Entry {
    let UpdateInfo { name, owner, owner_changes, owner_changed, updates, rolled_back, last } = update;
    let mut plain = format!("{name}: ");
    let mut json = Map::new();
    match owner {
        Some(owner) => {
            let since = rfc3339(owner.since);
            put!(plain, "owner pid {} comm {} since {since}", owner.pid, owner.comm.escape_default());
            json.insert("owner".into(), json!({"pid": owner.pid, "comm": owner.comm, "since": since}));
        }
        None => plain.push_str("no owner"),
    }
    put!(plain, "\n  owner_changes {owner_changes}");
    json.insert("owner_changes".into(), (*owner_changes).into());
    if let Some(at) = owner_changed {
        put!(plain, " last {}", rfc3339(*at));
        json.insert("owner_changed".into(), rfc3339(*at).into());
    }
    put!(plain, " updates {updates} rolled_back {rolled_back}\n");
    json.insert("updates".into(), (*updates).into());
    json.insert("rolled_back".into(), (*rolled_back).into());
    if let Some(last) = last {
        last_update(last, &mut plain, &mut json);
    }
    Entry { name: name.clone(), plain, json }
}

fn last_update(last: &LastUpdate, plain: &mut String, json: &mut Map<String, Value>) {
    let LastUpdate { at, way, strategy, outcome, reason, predecessor, successor, .. } = last;
    let at = rfc3339(*at);
    put!(plain, "  last update {at} way {way} strategy {strategy} {outcome} pid {predecessor}");
    if successor != predecessor {
        put!(plain, " -> {successor}");
    }
    put!(plain, " mappings {} queues {}\n", last.mappings, last.queues);
    let mut object = json!({
        "at": at, "way": way, "strategy": strategy, "outcome": outcome, "predecessor": predecessor,
        "successor": successor, "mappings": last.mappings, "queues": last.queues,
    });
    if reason.is_empty() {
        put!(plain, "  total {} ms:", ms(last.total_ns));
        let phases = last.phases_ns.iter().filter(|(_, ns)| *ns > 0);
        phases.for_each(|(phase, ns)| put!(plain, " {phase} {}", ms(*ns)));
        put!(plain, " (prepare {})\n", ms(last.prepare_ns));
    } else {
        put!(plain, "  because: {}\n", reason.escape_default());
        object["reason"] = reason.as_str().into();
    }
    object["total_ns"] = last.total_ns.into();
    object["prepare_ns"] = last.prepare_ns.into();
    object["phases_ns"] =
        last.phases_ns.iter().map(|(phase, ns)| (phase.clone(), Value::from(*ns))).collect();
    json.insert("last".into(), object);
}
