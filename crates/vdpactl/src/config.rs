//! `vdpactl dev config`: the configuration space of devices.

use serde_json::{Map, Value};
use vdpa_control::client::ClientError;
use vdpa_control::config::{BlockConfig, ClassConfig, DevConfig, NetConfig};
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::net::{ANNOUNCE, LINK_UP};

use crate::Session;
use crate::failure::Failure;
use crate::features::Names;
use crate::grammar;
use crate::output::{Entry, put, section};

const HELP: &str = "Usage: vdpactl dev config show [ DEV ]\n";

pub(crate) fn run(session: &Session, args: &[String]) -> Result<(), Failure> {
    grammar::show_only(HELP, args, |args| show(session, args))
}

fn show(session: &Session, args: &[String]) -> Result<(), Failure> {
    let configs = match args {
        [] => all(session),
        args => session.client.config(grammar::only(args)?).map(|config| vec![config]),
    };
    let entries = configs.map(|configs| configs.iter().map(|config| entry(session, config)).collect());
    section(session.format, "config", entries.map_err(Failure::from))
}

/// The configuration of every device. Stops without an error at the first device that is neither network nor block, as the
/// kernel's dump does (uapi-spec 7.3).
fn all(session: &Session) -> Result<Vec<DevConfig>, ClientError> {
    let mut configs = Vec::new();
    for device in session.client.devices()? {
        match session.client.config(&device.name) {
            Ok(config) => configs.push(config),
            Err(ClientError::Refused(error)) if error.errno == Errno::OPNOTSUPP => break,
            // Deleted after the list was requested.
            Err(ClientError::Refused(error)) if error.errno == Errno::NODEV => {}
            Err(error) => return Err(error),
        }
    }
    Ok(configs)
}

fn entry(session: &Session, config: &DevConfig) -> Entry {
    let mut plain = format!("{}: ", config.name);
    let mut json = Map::new();
    match &config.class {
        ClassConfig::Net(net) => {
            net_attrs(net, &mut plain, &mut json);
            negotiated(session, config.negotiated_features, Names::Net, &mut plain, &mut json);
        }
        // iproute2 prints nothing about block devices.
        ClassConfig::Block(_) if !session.statistics => {}
        ClassConfig::Block(block) => {
            for (name, value) in block_attrs(block) {
                put!(plain, "{name} {value} ");
                json.insert(name.into(), value);
            }
            negotiated(session, config.negotiated_features, Names::Block, &mut plain, &mut json);
        }
    }
    plain.push('\n');
    Entry { name: config.name.clone(), plain, json }
}

/// Two keys end with a space, as in iproute2: scripts look for these keys.
fn net_attrs(net: &NetConfig, plain: &mut String, json: &mut Map<String, Value>) {
    if let Some(mac) = net.mac {
        put!(plain, "mac {mac} ");
        json.insert("mac".into(), mac.to_string().into());
    }
    if let Some(status) = net.status {
        let link = if status & LINK_UP != 0 { "up" } else { "down" };
        let announce = status & ANNOUNCE != 0;
        put!(plain, "link {link} link_announce {announce} ");
        json.insert("link ".into(), link.into());
        json.insert("link_announce ".into(), announce.into());
    }
    if let Some(pairs) = net.max_vq_pairs {
        put!(plain, "max_vq_pairs {pairs} ");
        json.insert("max_vq_pairs".into(), pairs.into());
    }
    if let Some(mtu) = net.mtu {
        put!(plain, "mtu {mtu} ");
        json.insert("mtu".into(), mtu.into());
    }
}

/// The names are those of the netlink attributes without `VDPA_ATTR_DEV_BLK_CFG_`, in the order of the attributes (uapi-spec 7.2).
fn block_attrs(block: &BlockConfig) -> Vec<(&'static str, Value)> {
    let topology = block.topology;
    let (discard, zeroes) = (block.discard, block.write_zeroes);
    let attrs = [
        ("capacity", Some(block.capacity.into())),
        ("size_max", block.size_max.map(Value::from)),
        ("blk_size", block.blk_size.map(Value::from)),
        ("seg_max", block.seg_max.map(Value::from)),
        ("num_queues", block.num_queues.map(Value::from)),
        ("phy_blk_exp", topology.map(|topology| topology.physical_block_exp.into())),
        ("align_offset", topology.map(|topology| topology.alignment_offset.into())),
        ("min_io_size", topology.map(|topology| topology.min_io_size.into())),
        ("opt_io_size", topology.map(|topology| topology.opt_io_size.into())),
        ("max_discard_sec", discard.map(|limits| limits.max_sectors.into())),
        ("max_discard_seg", discard.map(|limits| limits.max_segments.into())),
        ("discard_sec_align", discard.map(|limits| limits.sector_alignment.into())),
        ("max_write_zeroes_sec", zeroes.map(|limits| limits.max_sectors.into())),
        ("max_write_zeroes_seg", zeroes.map(|limits| limits.max_segments.into())),
        ("read_only", Some(block.read_only.into())),
        ("flush", Some(block.flush.into())),
    ];
    attrs.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn negotiated(
    session: &Session,
    features: Option<Features>,
    names: Names,
    plain: &mut String,
    json: &mut Map<String, Value>,
) {
    let Some(features) = features else { return };
    let names = if session.nice_names { names } else { Names::Numbers };
    put!(plain, "\n  negotiated_features{}", names.plain(features));
    json.insert("negotiated_features".into(), names.json(features));
}
