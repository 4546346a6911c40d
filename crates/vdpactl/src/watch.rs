//! `vdpactl top` and `vdpactl monitor`: what the devices do, as it goes on.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use vdpa_control::api::{DaemonInfo, DevInfo, UpdateInfo};
use vdpa_control::client::ClientError;
use vdpa_core::features::Status;

use crate::Session;
use crate::failure::Failure;
use crate::output::Format;
use crate::utc::rfc3339;

/// How often and how long is looked.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds from one look to the next
    #[arg(short, long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    delay: Duration,

    /// End after this many looks [default: never]
    #[arg(short = 'c', long, value_name = "N")]
    count: Option<u64>,
}

fn interval(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.01..=3600.0).contains(seconds))
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "a number of seconds from 0.01 to 3600 is right".into())
}

impl Options {
    /// Calls `look` at each interval.
    fn each(self, mut look: impl FnMut() -> Result<(), Failure>) -> Result<(), Failure> {
        let mut left = self.count;
        loop {
            let begin = Instant::now();
            look()?;
            left = left.map(|left| left.saturating_sub(1));
            if left == Some(0) {
                return Ok(());
            }
            std::thread::sleep(self.delay.saturating_sub(begin.elapsed()));
        }
    }
}

/// What a device has done since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    requests: u64,
    bytes: u64,
    errors: u64,
}

impl Totals {
    fn of(info: &DevInfo) -> Self {
        let sum = |of: fn(&vdpa_control::api::QueueInfo) -> u64| info.state.queues.iter().map(of).sum();
        Self { requests: sum(|q| q.requests), bytes: sum(|q| q.bytes), errors: sum(|q| q.errors) }
    }
}

/// Shows a table of the devices, with rates since the look before; the first one has no rates.
pub(crate) fn top(session: &Session, options: Options) -> Result<(), Failure> {
    let mut before: BTreeMap<String, Totals> = BTreeMap::new();
    let mut last = None;
    options.each(|| {
        let devices = session.client.devices()?;
        let now = Instant::now();
        let seconds = last.replace(now).map(|last: Instant| now.duration_since(last).as_secs_f64());
        let rows: Vec<Row> = devices.iter().map(|info| Row::of(info, &before, seconds)).collect();
        before = devices.iter().map(|info| (info.name.clone(), Totals::of(info))).collect();
        print_rows(session.format, &rows).map_err(Failure::Output)
    })
}

/// A line of the table.
struct Row {
    name: String,
    client: String,
    state: &'static str,
    /// Requests and bytes in a second; `None` at the first look.
    rates: Option<(f64, f64)>,
    totals: Totals,
    pinned_pages: u64,
}

impl Row {
    fn of(info: &DevInfo, before: &BTreeMap<String, Totals>, seconds: Option<f64>) -> Self {
        let totals = Totals::of(info);
        let rates = before.get(&info.name).zip(seconds).map(|(before, seconds)| {
            // A device that was made anew begins at 0.
            let rate =
                |now: u64, then: u64| f64::from(u32::try_from(now.saturating_sub(then)).unwrap_or(u32::MAX));
            let kib = rate(totals.bytes >> 10, before.bytes >> 10) * 1024.0;
            (rate(totals.requests, before.requests) / seconds, kib / seconds)
        });
        let client =
            info.state.owner.as_ref().map(|owner| format!("{}/{}", owner.comm.escape_default(), owner.pid));
        let state = match &info.state {
            state if state.status.contains(Status::NEEDS_RESET) => "failed",
            state if state.suspended => "suspended",
            state if state.queues.iter().any(|queue| queue.running) => "running",
            state if state.open => "open",
            _ => "idle",
        };
        let client = client.unwrap_or_else(|| "-".into());
        Self { name: info.name.clone(), client, state, rates, totals, pinned_pages: info.state.pinned_pages }
    }
}

fn print_rows(format: Format, rows: &[Row]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if format != Format::Plain {
        let devices: Map<_, _> = rows.iter().map(|row| (row.name.clone(), row_json(row))).collect();
        writeln!(out, "{}", json!({ "top": devices }))?;
        return out.flush();
    }
    if out.is_terminal() {
        // Clears the screen.
        write!(out, "\x1b[H\x1b[2J")?;
    }
    writeln!(
        out,
        "{:<16} {:<24} {:<10} {:>10} {:>10} {:>14} {:>10} {:>10}",
        "DEVICE", "CLIENT", "STATE", "REQ/s", "MIB/s", "REQUESTS", "ERRORS", "PINNED_MIB"
    )?;
    for Row { name, client, state, rates, totals, pinned_pages } in rows {
        let (requests, bytes) = rates.map_or(("-".into(), "-".into()), |(requests, bytes)| {
            (format!("{requests:.0}"), format!("{:.1}", bytes / 1_048_576.0))
        });
        writeln!(
            out,
            "{name:<16} {client:<24} {state:<10} {requests:>10} {bytes:>10} {:>14} {:>10} {:>10}",
            totals.requests,
            totals.errors,
            pinned_pages >> 8
        )?;
    }
    out.flush()
}

fn row_json(row: &Row) -> Value {
    let Row { client, state, rates, totals, pinned_pages, .. } = row;
    let mut json = json!({
        "client": client, "state": state, "requests": totals.requests, "bytes": totals.bytes,
        "errors": totals.errors, "pinned_pages": pinned_pages,
    });
    if let (Some((requests, bytes)), Some(object)) = (rates, json.as_object_mut()) {
        object.insert("requests_per_second".into(), json!(requests));
        object.insert("bytes_per_second".into(), json!(bytes));
    }
    json
}

/// What `monitor` compares.
struct Seen {
    daemon: Option<DaemonInfo>,
    devices: BTreeMap<String, (DevInfo, Option<u64>)>,
    updates: BTreeMap<String, UpdateInfo>,
}

/// Prints what has changed, a line for each event. What lasts less than the interval is not seen.
pub(crate) fn monitor(session: &Session, options: Options) -> Result<(), Failure> {
    let mut before: Option<Seen> = None;
    options.each(|| {
        let now = match look(session) {
            Ok(seen) => seen,
            // It may be replaced just now.
            Err(ClientError::Refused(error)) => return Err(error.into()),
            Err(error) if before.is_none() => return Err(error.into()),
            Err(_) => return Ok(()),
        };
        let events = before.as_ref().map(|before| events(before, &now)).unwrap_or_default();
        before = Some(now);
        let mut out = io::stdout().lock();
        events
            .into_iter()
            .try_for_each(|event| event.print(session.format, &mut out))
            .and_then(|()| out.flush())
            .map_err(Failure::Output)
    })
}

fn look(session: &Session) -> Result<Seen, ClientError> {
    let daemon = session.client.daemon()?;
    let devices = session.client.devices()?.into_iter().map(|info| {
        let config = session.client.config(&info.name).ok();
        let capacity = config.and_then(|config| match config.class {
            vdpa_control::config::ClassConfig::Block(block) => Some(block.capacity),
            vdpa_control::config::ClassConfig::Net(_) => None,
        });
        (info.name.clone(), (info, capacity))
    });
    let devices = devices.collect();
    let updates = session.client.updates()?.into_iter().map(|update| (update.name.clone(), update)).collect();
    Ok(Seen { daemon: Some(daemon), devices, updates })
}

/// Something that has happened.
#[derive(Debug, PartialEq)]
struct Event {
    what: &'static str,
    device: Option<String>,
    details: Vec<(&'static str, Value)>,
}

impl Event {
    fn print(&self, format: Format, out: &mut impl Write) -> io::Result<()> {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let at = rfc3339(at);
        let Self { what, device, details } = self;
        if format != Format::Plain {
            let mut json = Map::from_iter([("time".to_owned(), at.into()), ("event".into(), (*what).into())]);
            json.extend(device.iter().map(|device| ("device".into(), device.as_str().into())));
            json.extend(details.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
            return writeln!(out, "{}", Value::Object(json));
        }
        write!(out, "{at} {what}")?;
        device.iter().try_for_each(|device| write!(out, " {device}"))?;
        for (name, value) in details {
            match value {
                Value::String(text) => write!(out, " {name} {}", text.escape_default())?,
                other => write!(out, " {name} {other}")?,
            }
        }
        writeln!(out)
    }
}

/// What has happened between two looks.
fn events(before: &Seen, now: &Seen) -> Vec<Event> {
    let mut events = Vec::new();
    if let (Some(before), Some(now)) = (&before.daemon, &now.daemon)
        && before.pid != now.pid
    {
        let crashes = |info: &DaemonInfo| info.holder.as_ref().map_or(0, |holder| holder.crashes);
        let what = if crashes(before) < crashes(now) { "daemon_crashed" } else { "daemon_replaced" };
        let details = vec![("pid", now.pid.into()), ("version", now.version.as_str().into())];
        events.push(Event { what, device: None, details });
    }
    for name in before.devices.keys().filter(|name| !now.devices.contains_key(*name)) {
        events.push(Event { what: "deleted", device: Some(name.clone()), details: Vec::new() });
    }
    for (name, device) in &now.devices {
        match before.devices.get(name) {
            None => {
                let details = vec![("mgmtdev", device.0.mgmtdev.as_str().into())];
                events.push(Event { what: "added", device: Some(name.clone()), details });
            }
            Some(before) => device_events(name, before, device, &mut events),
        }
    }
    for (name, update) in &now.updates {
        let Some(before) = before.updates.get(name) else { continue };
        if (before.updates, before.rolled_back) != (update.updates, update.rolled_back)
            && let Some(last) = &update.last
        {
            let details = vec![
                ("outcome", last.outcome.as_str().into()),
                ("way", last.way.as_str().into()),
                ("strategy", last.strategy.as_str().into()),
                ("total_ns", last.total_ns.into()),
            ];
            events.push(Event { what: "update", device: Some(name.clone()), details });
        }
    }
    events
}

fn device_events(
    name: &str,
    (before, old): &(DevInfo, Option<u64>),
    (now, new): &(DevInfo, Option<u64>),
    events: &mut Vec<Event>,
) {
    let mut add = |what, details| events.push(Event { what, device: Some(name.to_owned()), details });
    let (then, state) = (&before.state, &now.state);
    if then.open != state.open {
        add(if state.open { "opened" } else { "closed" }, Vec::new());
    }
    let owner = |state: &vdpa_control::api::DevState| state.owner.as_ref().map(|owner| owner.pid);
    if owner(then) != owner(state)
        && let Some(owner) = &state.owner
    {
        add("owner", vec![("pid", owner.pid.into()), ("comm", owner.comm.as_str().into())]);
    }
    if then.suspended != state.suspended {
        add(if state.suspended { "suspended" } else { "resumed" }, Vec::new());
    }
    if !then.status.contains(Status::NEEDS_RESET) && state.status.contains(Status::NEEDS_RESET) {
        add("failed", Vec::new());
    }
    if let (Some(old), Some(new)) = (old, new)
        && old != new
    {
        add("resized", vec![("from_bytes", (old * 512).into()), ("to_bytes", (new * 512).into())]);
    }
    let (old, new) = (Totals::of(before).errors, Totals::of(now).errors);
    if new > old {
        add("error", vec![("requests", (new - old).into()), ("total", new.into())]);
    }
}
