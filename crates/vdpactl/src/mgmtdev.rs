//! `vdpactl mgmtdev`: management devices, which create devices.

use serde_json::{Map, Value};
use vdpa_control::api::{CtlError, ID_BLOCK, ID_NET, MgmtDev};
use vdpa_core::Errno;

use crate::Session;
use crate::failure::Failure;
use crate::features::Names;
use crate::grammar;
use crate::output::{Entry, put, section};

pub(crate) const HELP: &str = "Usage: vdpactl mgmtdev show [ DEV ]\n";

pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    if args.is_empty() {
        // As iproute2: this object shows its usage, the others their entries.
        eprint!("{HELP}");
        return Ok(());
    }
    grammar::show_only(HELP, args, |args| show(session, args))
}

fn show(session: &Session, args: &[String]) -> Result<(), Failure> {
    let wanted = match args {
        [] => None,
        args => {
            grammar::handle(args)?;
            Some(grammar::only(args)?)
        }
    };
    section(session.format, "mgmtdev", entries(session, wanted))
}

fn entries(session: &Session, wanted: Option<&str>) -> Result<Vec<Entry>, Failure> {
    let mut mgmtdevs = session.client.mgmtdevs()?;
    if let Some(handle) = wanted {
        mgmtdevs.retain(|mgmtdev| mgmtdev.handle() == handle);
        if mgmtdevs.is_empty() {
            return Err(CtlError::new(Errno::NODEV, "Fail to find the specified mgmt device")
                .with_hint("\"vdpactl mgmtdev show\" lists the management devices that exist.")
                .into());
        }
    }
    Ok(mgmtdevs.iter().map(|mgmtdev| entry(session, mgmtdev)).collect())
}

fn entry(session: &Session, mgmtdev: &MgmtDev) -> Entry {
    let handle = mgmtdev.handle();
    let classes: Vec<&str> = mgmtdev.supported_classes.iter().map(|id| class_name(*id)).collect();
    let names = match mgmtdev.supported_classes.contains(&ID_NET) {
        _ if !session.nice_names => Names::Numbers,
        true => Names::Net,
        false => Names::Transport,
    };

    let mut plain = format!("{handle}: \n  supported_classes");
    for class in &classes {
        put!(plain, " {class}");
    }
    put!(plain, "\n  max_supported_vqs {}", mgmtdev.max_supported_vqs);
    put!(plain, "\n  dev_features{}\n", names.plain(mgmtdev.dev_features));

    let json = Map::from_iter([
        ("supported_classes".into(), Value::from(classes)),
        ("max_supported_vqs".into(), mgmtdev.max_supported_vqs.into()),
        ("dev_features".into(), names.json(mgmtdev.dev_features)),
    ]);
    Entry { name: handle, plain, json }
}

fn class_name(id: u32) -> &'static str {
    match id {
        ID_NET => "net",
        ID_BLOCK => "block",
        _ => "< unknown class >",
    }
}
