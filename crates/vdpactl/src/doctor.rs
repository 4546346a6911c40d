//! `vdpactl doctor`: what this machine lets the daemon do. Asks no daemon.

use serde_json::{Map, Value};
use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_sys::machine::{Check, Loss, checks};

use crate::Session;
use crate::failure::Failure;
use crate::output::{Entry, section};

/// Runs the checks. Fails when no device can be served here.
pub(crate) fn run(session: &Session) -> Result<(), Failure> {
    let checks = checks();
    let entries = checks.iter().map(entry).collect();
    section(session.format, "doctor", Ok(entries))?;
    if checks.iter().any(|check| check.loss == Loss::All) {
        return Err(CtlError::new(Errno::NODEV, "no device can be served on this machine")
            .with_hint("See the remedies above.")
            .into());
    }
    Ok(())
}

fn entry(Check { name, loss, finding, remedy }: &Check) -> Entry {
    let state = match loss {
        Loss::None => "works",
        Loss::Some => "limited",
        Loss::All => "missing",
    };
    let mut plain = format!("{name:<12} {state:<8} {finding}\n");
    let mut json =
        Map::from_iter([("state".into(), Value::from(state)), ("finding".into(), finding.as_str().into())]);
    if let Some(remedy) = remedy {
        plain.push_str(&format!("{:<12} {:<8} -> {remedy}\n", "", ""));
        json.insert("remedy".into(), remedy.as_str().into());
    }
    Entry { name: (*name).into(), plain, json }
}
