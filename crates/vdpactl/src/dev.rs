//! `vdpactl dev`: devices.

use serde_json::{Map, Value, json};
use vdpa_control::api::{DevInfo, DevState, Dirty, ID_BLOCK, ID_NET, QueueInfo, SetRequest, Successor};

use crate::Session;
use crate::failure::Failure;
use crate::features::Names;
use crate::output::{Entry, put, section};
use crate::utc::rfc3339;
use crate::{config, configuration, grammar, passed, state, vstats};

pub(crate) const HELP: &str = "\
Usage: vdpactl dev show [ DEV ]
       vdpactl dev add name NAME mgmtdev MANAGEMENTDEV [ ATTRIBUTE VALUE ]... [ persistent ]
       vdpactl dev set name NAME [ mac MACADDR ] [ link { up | down } ]
       vdpactl dev set name NAME size { auto | BYTES } [ -f | --force ]
       vdpactl dev set name NAME [ iops { N | none } ] [ bps { SIZE | none } ] [ burst MILLISECONDS ]
       vdpactl dev del DEV [ persistent ] [ -f | --force ]
       vdpactl dev state { save DEV [ FILE | - ] | load DEV { FILE | - } }
Usage: vdpactl dev config COMMAND [ OPTIONS ]
Usage: vdpactl dev vstats COMMAND
where  ATTRIBUTE of network devices := { mac MACADDR | mtu MTU | max_vqp MAX_VQ_PAIRS |
                                         device_features HEX }
       ATTRIBUTE of block devices := { path FILE | passed { on | off } | format raw | readonly [ on | off ] |
                                       shared { on | off } | direct { on | off } |
                                       pin { on | off } | packed { on | off } | in_order { on | off } |
                                       queues N | queue_size N | serial TEXT |
                                       iops N | bps SIZE | burst MILLISECONDS }
       ATTRIBUTE of all devices := { device_file PATH | cpus LIST | worker { shared | own } |
                                     front vduse | bind { virtio | vhost | none } }
";

/// Runs one command; `force` belongs to `del` and `set`.
pub(crate) fn run(session: &Session, args: &[String], force: bool) -> Result<(), Failure> {
    let Some((word, rest)) = args.split_first() else {
        return show(session, &[]);
    };
    let command = |full| grammar::matches(word, full);
    if force && !command("del") && word != "set" {
        return Err(grammar::unknown_option("--force"));
    }
    // The order of iproute2, which decides what an ambiguous abbreviation means.
    if command("help") {
        eprint!("{HELP}");
        Ok(())
    } else if command("show") || command("list") {
        show(session, rest)
    } else if command("add") {
        let (rest, persistent) = grammar::persistent(rest);
        let request = grammar::add_request(rest)?;
        if persistent {
            return configuration::add_persistent(session, &request);
        }
        Ok(session.client.add_passing(&request, passed::open(&request)?)?)
    } else if command("del") {
        let (rest, persistent) = grammar::persistent(rest);
        let name = grammar::only(rest)?;
        session.client.delete(name, force)?;
        if persistent { configuration::forget(session, name) } else { Ok(()) }
    } else if command("config") {
        config::run(session, rest)
    } else if word == "state" {
        state::run(session, rest)
    } else if word == "vstats" {
        vstats::run(session, rest)
    } else if word == "set" {
        let (name, request) = grammar::set_request(rest)?;
        let request = SetRequest { force, ..request };
        if let Some(warning) = session.client.set(&name, &request)?.warning {
            eprintln!("Warning: vdpa: {warning}.");
        }
        Ok(())
    } else {
        Err(grammar::no_command(word))
    }
}

fn show(session: &Session, args: &[String]) -> Result<(), Failure> {
    let devices = match args {
        [] => session.client.devices(),
        args => session.client.device(grammar::only(args)?).map(|device| vec![device]),
    };
    let entries = devices.map(|devices| devices.iter().map(|device| entry(session, device)).collect());
    section(session.format, "dev", entries.map_err(Failure::from))
}

fn entry(session: &Session, device: &DevInfo) -> Entry {
    let kind = type_name(device.device_id);
    let mut plain = format!(
        "{}: type {kind} mgmtdev {} vendor_id {} max_vqs {} max_vq_size {}\n",
        device.name, device.mgmtdev, device.vendor_id, device.max_vqs, device.max_vq_size
    );
    let mut json = Map::from_iter([
        ("type".into(), Value::from(kind)),
        ("mgmtdev".into(), device.mgmtdev.as_str().into()),
        ("vendor_id".into(), device.vendor_id.into()),
        ("max_vqs".into(), device.max_vqs.into()),
        ("max_vq_size".into(), device.max_vq_size.into()),
    ]);
    if session.statistics {
        let names = match device.device_id {
            _ if !session.nice_names => Names::Numbers,
            ID_NET => Names::Net,
            ID_BLOCK => Names::Block,
            _ => Names::Transport,
        };
        let path = device.path.to_string_lossy();
        put!(plain, "  path {path}\n  front {}\n  min_vq_size {}\n", device.front, device.min_vq_size);
        if device.passed {
            plain.push_str("  passed true\n");
            json.insert("passed".into(), true.into());
        }
        json.insert("path".into(), path.into());
        json.insert("front".into(), device.front.as_str().into());
        json.insert("min_vq_size".into(), device.min_vq_size.into());
        plain_state(&mut plain, &device.state, names);
        json_state(&mut json, &device.state, names);
    }
    Entry { name: device.name.clone(), plain, json }
}

fn plain_state(text: &mut String, state: &DevState, names: Names) {
    put!(text, "  open {} suspended {} status {}\n", state.open, state.suspended, state.status);
    if let Some(owner) = &state.owner {
        put!(
            text,
            "  owner pid {} comm {} since {}\n",
            owner.pid,
            owner.comm.escape_default(),
            rfc3339(owner.since)
        );
    }
    if let Some(Successor { pid, comm, since, status, mappings }) = &state.successor {
        text.push_str("  successor");
        if let Some(pid) = pid {
            put!(text, " pid {pid} comm {}", comm.escape_default());
        }
        put!(text, " since {} status {status} mappings {mappings}\n", rfc3339(*since));
    }
    if let Some(features) = state.negotiated_features {
        put!(text, "  negotiated_features{}\n", names.plain(features));
    }
    match state.memlock_limit_pages {
        Some(limit) => put!(text, "  pinned {} of {limit} pages\n", state.pinned_pages),
        None => put!(text, "  pinned {} pages\n", state.pinned_pages),
    }
    put!(text, "  mappings {}\n", state.mappings);
    if state.max_iotlb_entries > 0 {
        put!(text, "  max_iotlb_entries {}\n", state.max_iotlb_entries);
    }
    if let Some(Dirty { page_size, ranges, pages }) = &state.dirty {
        put!(text, "  dirty_tracking page_size {page_size} ranges {ranges} pages {pages}\n");
    }
    for queue in &state.queues {
        let QueueInfo { index, size, enabled, running, requests, bytes, errors, poison } = queue;
        put!(
            text,
            "  queue {index} size {size} enabled {enabled} running {running} requests {requests} bytes {bytes} \
             errors {errors} poison {poison}\n"
        );
    }
}

fn json_state(json: &mut Map<String, Value>, state: &DevState, names: Names) {
    json.insert("open".into(), state.open.into());
    json.insert("suspended".into(), state.suspended.into());
    json.insert("status".into(), state.status.to_string().into());
    if let Some(owner) = &state.owner {
        json.insert(
            "owner".into(),
            json!({"pid": owner.pid, "comm": owner.comm, "since": rfc3339(owner.since)}),
        );
    }
    if let Some(Successor { pid, comm, since, status, mappings }) = &state.successor {
        let mut object = Map::new();
        if let Some(pid) = pid {
            object.insert("pid".into(), (*pid).into());
            object.insert("comm".into(), comm.as_str().into());
        }
        object.insert("since".into(), rfc3339(*since).into());
        object.insert("status".into(), status.to_string().into());
        object.insert("mappings".into(), (*mappings).into());
        json.insert("successor".into(), object.into());
    }
    if let Some(features) = state.negotiated_features {
        json.insert("negotiated_features".into(), names.json(features));
    }
    json.insert("pinned_pages".into(), state.pinned_pages.into());
    if let Some(limit) = state.memlock_limit_pages {
        json.insert("memlock_limit_pages".into(), limit.into());
    }
    json.insert("mappings".into(), state.mappings.into());
    if state.max_iotlb_entries > 0 {
        json.insert("max_iotlb_entries".into(), state.max_iotlb_entries.into());
    }
    if let Some(Dirty { page_size, ranges, pages }) = &state.dirty {
        json.insert(
            "dirty_tracking".into(),
            json!({"page_size": page_size, "ranges": ranges, "pages": pages}),
        );
    }
    let queues = state.queues.iter().map(|queue| {
        let QueueInfo { index, size, enabled, running, requests, bytes, errors, poison } = queue;
        json!({
            "index": index, "size": size, "enabled": enabled, "running": running, "requests": requests,
            "bytes": bytes, "errors": errors, "poison": poison,
        })
    });
    json.insert("queues".into(), queues.collect());
}

fn type_name(id: u32) -> &'static str {
    match id {
        ID_NET => "network",
        ID_BLOCK => "block",
        _ => "<unknown type>",
    }
}
