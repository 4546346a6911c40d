//! `vdpactl dev vstats`: vendor statistics of a queue.

use serde_json::{Map, Value};
use vdpa_control::api::QueueVstats;
use vdpa_core::features::Features;

use crate::Session;
use crate::failure::Failure;
use crate::grammar;
use crate::output::{Entry, put, section};

const HELP: &str = "Usage: vdpactl dev vstats show DEV [ qidx QUEUE_INDEX ]\n";

/// `show` and `help` cannot be abbreviated here, as in iproute2.
pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    match args {
        [] => Err(Failure::Usage(HELP.trim_end().into())),
        [word, ..] if word == "help" => {
            eprint!("{HELP}");
            Ok(())
        }
        [word, rest @ ..] if word == "show" => show(session, rest),
        [word, ..] => Err(grammar::no_command(word)),
    }
}

fn show(session: &Session, args: &[String]) -> Result<(), Failure> {
    let Some((name, mut rest)) = args.split_first() else {
        return Err(Failure::Usage("String parameter expected".into()));
    };
    let mut index = None;
    while let [word, pair @ ..] = rest {
        if !grammar::matches(word, "qidx") {
            return Err(grammar::unknown_option(word));
        }
        let text = pair.first().ok_or_else(|| Failure::Usage("number expected".into()))?;
        let number: u32 =
            text.parse().map_err(|_| Failure::Usage(format!("\"{text}\" is not the index of a queue")))?;
        index = Some(number);
        rest = pair.get(1..).unwrap_or_default();
    }
    let entries = session.client.vstats(name, index).map(|vstats| vec![entry(&vstats)]);
    section(session.format, "vstats", entries.map_err(Failure::from))
}

fn entry(vstats: &QueueVstats) -> Entry {
    let kind = queue_type(vstats);
    let mut plain = format!("{}: queue_type {kind} ", vstats.name);
    let mut json = Map::from_iter([("queue_type".into(), Value::from(kind))]);
    for (name, value) in &vstats.counters {
        put!(plain, "{name} {value} ");
        json.insert(name.clone(), (*value).into());
    }
    plain.push('\n');
    Entry { name: vstats.name.clone(), plain, json }
}

/// The queue type that iproute2 prints. Without MQ, iproute2 assumes 0 pairs, and so takes queue 0 for the control queue
/// (uapi-spec 7.4). This function does the same.
fn queue_type(vstats: &QueueVstats) -> &'static str {
    let index = u32::from(vstats.queue_index);
    let control = 2 * u32::from(vstats.max_vq_pairs.unwrap_or(0));
    if vstats.negotiated_features.has(Features::NET_CTRL_VQ) && index == control {
        "control_vq"
    } else if index % 2 == 0 {
        "rx"
    } else {
        "tx"
    }
}
