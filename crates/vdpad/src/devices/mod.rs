//! The devices that this daemon can create, and the management devices that create them.

pub(crate) mod blk;
mod broker;
mod busy;
mod kept;
mod net;
mod net_attrs;
mod options;
mod sim;
pub(crate) mod sim_blk;
pub(crate) mod sim_net;

use std::fmt::Debug;

use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::WorkerPool;
use vdpa_control::api::{Attrs, CtlError, LimitChange, MgmtDev, NewSize};

pub(crate) use kept::{DiskFacts, Kept};
pub(crate) use net_attrs::{NetAttr, NetAttrs};

/// Creates devices of one kind, as `vdpa_mgmt_dev` does in the kernel.
pub(crate) trait MgmtDevice: Debug + Send + Sync {
    /// What `mgmtdev show` reports.
    fn describe(&self) -> MgmtDev;

    /// The attributes of the kernel's netlink family that its devices take.
    fn net_attrs(&self) -> &'static [NetAttr] {
        &[]
    }

    /// Creates a device called `name`, whose rings are served by a thread of `pool` and whose contents are in `kept`, if they
    /// are in no file. May block on files and threads. Leaves nothing behind on an error.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for an unknown attribute, `EINVAL` for an invalid value, else the errno of the file or thread that the device
    /// needs and did not get.
    fn create(
        &self,
        name: &str,
        attrs: &Attrs,
        pool: &WorkerPool,
        kept: &Kept,
    ) -> Result<AnyParent, CtlError>;
}

/// What of a device an administrator can change while it is in use.
pub(crate) trait Controls: Debug + Send + Sync {
    /// Changes the size of a disk. Called with the device locked, so that its client sees the size before or the one after. May block
    /// on the file.
    ///
    /// # Errors
    /// `EINVAL` for a size that the disk cannot have, and for a smaller one without `force`; `EBUSY` when somebody else needs the file
    /// as it is; `ENODEV` when the disk was taken away; those of ftruncate(2).
    fn resize(&self, size: NewSize, force: bool) -> Result<(), CtlError>;

    /// Changes the limits on requests and bytes in a second, at once. Does not block.
    ///
    /// # Errors
    /// `EINVAL` for limits that cannot be.
    fn limit(&self, change: LimitChange) -> Result<(), CtlError>;

    /// Tells the driver that the configuration has changed. Called when the change would survive this process.
    fn signal(&self);
}

/// All management devices, in the order in which `mgmtdev show` lists them.
#[must_use]
pub(crate) fn mgmt_devices() -> Vec<Box<dyn MgmtDevice>> {
    vec![
        Box::new(blk::BlkMgmt),
        Box::new(net::NetMgmt),
        Box::new(sim_blk::SimBlkMgmt),
        Box::new(sim_net::SimNetMgmt),
        Box::new(broker::BrokerMgmt),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// In docs/vdpactl.md, the table of attributes: the names, and the devices that take each.
    #[test]
    fn every_attribute_is_documented() {
        let document = include_str!("../../../../docs/vdpactl.md");
        let rows = document.lines().skip_while(|line| !line.starts_with("| Attribute | Devices |")).skip(2);
        let documented: BTreeSet<_> = rows
            .take_while(|line| line.starts_with('|'))
            .flat_map(|row| {
                let mut cells = row.trim_start_matches("| `").split([' ', '`']);
                let (name, rest) = (cells.next().unwrap(), row.split(" | ").nth(1).unwrap());
                let kinds: Vec<_> = match rest {
                    "all" => vec!["blk", "net", "sim-blk", "sim-net", "vhost-vdpa"],
                    some => some.split(", ").map(|kind| kind.trim_matches('`')).collect(),
                };
                kinds.into_iter().map(move |kind| (kind, name))
            })
            .collect();
        let names = |kind, known: &[(&'static str, &str)]| -> Vec<(&'static str, &'static str)> {
            known.iter().map(|(name, _)| (kind, *name)).collect()
        };
        let mut known = names("blk", &super::blk::KNOWN);
        known.push(("blk", "handover"));
        known.extend(names("net", &super::net::KNOWN));
        known.push(("net", "handover"));
        for kind in ["blk", "net", "sim-blk", "sim-net"] {
            known.extend([(kind, "front"), (kind, "bind")]);
        }
        known.extend(names("sim-blk", &super::sim::KNOWN));
        known.extend(names("sim-net", &super::sim::KNOWN));
        known.extend(names("sim-net", &super::sim_net::KNOWN));
        known.extend(names("vhost-vdpa", &super::broker::KNOWN));
        known.extend(["blk", "net", "sim-blk", "sim-net", "vhost-vdpa"].map(|kind| (kind, "device_file")));
        assert_eq!(documented, known.into_iter().collect());
    }
}
