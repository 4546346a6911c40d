//! `vhost-vdpa`: a vhost-vdpa device of somebody else, usually of the kernel and of hardware, served on as one of ours. What it cannot do
//! for its clients it can by that: change the owner.
//!
//! | | |
//! |---|---|
//! | requests on queues, status, groups, suspend | [`Device`](vdpa_core::device::Device) checks them and passes them on ([`Parent::upstream`]) |
//! | mappings | the memory objects of the client are mapped by the [keeper](crate::keeper) and told to the device by its addresses |
//! | kick, call, error and config events | the client's own, given to the device: none passes this program |
//! | owner | of the device behind, the keeper, for ever; of this one, the client |

mod mappings;
mod options;

use std::sync::Arc;

use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::{Parked, WorkerPool};
use vdpa_control::api::{Attrs, CtlError, ID_BLOCK, ID_NET, MgmtDev};
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::parent::{AddressMode, CompatReset, Dma, Parent, Profile, Upstream};
use vdpa_core::types::{GroupIndex, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::rlimit;
use vdpa_sys::space::OwnerSpace;

use self::mappings::Mappings;
#[cfg(test)]
pub(super) use self::options::KNOWN;
use self::options::{Options, open};
use super::{Kept, MgmtDevice};
use crate::keeper::{Keeper, KeeperError};

/// Backend features of the device behind that are used.
const USED: BackendFeatures = BackendFeatures::of(&[
    BackendFeatures::IOTLB_MSG_V2,
    BackendFeatures::IOTLB_BATCH,
    BackendFeatures::IOTLB_ASID,
    BackendFeatures::SUSPEND,
    BackendFeatures::RESUME,
    BackendFeatures::ENABLE_AFTER_DRIVER_OK,
    BackendFeatures::DESC_ASID,
    BackendFeatures::IOTLB_PERSIST,
]);

/// The management device `vhost-vdpa`.
#[derive(Debug)]
pub(crate) struct BrokerMgmt;

impl MgmtDevice for BrokerMgmt {
    fn describe(&self) -> MgmtDev {
        MgmtDev {
            name: "vhost-vdpa".into(),
            bus: None,
            // It takes any; these are the ones that the tool knows by name.
            supported_classes: vec![ID_NET, ID_BLOCK],
            max_supported_vqs: 0,
            dev_features: Features::NONE,
        }
    }

    fn create(
        &self,
        name: &str,
        attrs: &Attrs,
        pool: &WorkerPool,
        kept: &Kept,
    ) -> Result<AnyParent, CtlError> {
        let options = Options::parse(attrs)?;
        let failed = |error: &KeeperError| CtlError::new(error.errno(), format!("{name}: {error}"));
        let keeper = match kept.keeper() {
            Some(lobby) => Keeper::join(lobby).map_err(|error| failed(&error))?,
            None if kept.is_restored() => return Err(failed(&KeeperError::Ended)),
            None => {
                let keeper = Keeper::start(open(&options.path)?, name).map_err(|error| failed(&error))?;
                begin(&keeper).map_err(|errno| {
                    CtlError::new(errno, format!("{} cannot be used: {errno}", options.path.display()))
                })?;
                kept.keep_keeper(keeper.lobby());
                warn_of_limit(name);
                keeper
            }
        };
        let profile = profile(&keeper, &options).map_err(|errno| {
            CtlError::new(errno, format!("{} does not say what it is: {errno}", options.path.display()))
        })?;
        let phase = if kept.is_restored() { Phase::BeingRestored } else { Phase::InCharge };
        let mappings = Mappings::new(profile.address_spaces, phase == Phase::InCharge);
        let parked = pool.parked();
        Ok(Box::new(Broker {
            name: name.to_owned(),
            profile,
            keeper: Some(Arc::new(keeper)),
            mappings,
            phase,
            parked,
        }))
    }
}

/// Makes the keeper the owner of a device that was just opened.
fn begin(device: &Keeper) -> Result<()> {
    device.set_owner()?;
    let offered = device.backend_features()?;
    let asid = offered.has(BackendFeatures::IOTLB_ASID);
    let used = offered & USED;
    device.set_backend_features(if asid { used } else { used.without(BackendFeatures::DESC_ASID) })?;
    device.set_status(Status::RESET)
}

/// The kernel charges the memory of every client to the keeper, which has the limit of the daemon.
fn warn_of_limit(name: &str) {
    if let Some(bytes) = rlimit::memlock().soft {
        tracing::warn!(
            device = name,
            bytes,
            "RLIMIT_MEMLOCK limits what a device that pins memory can map, for all clients \
            together: start the daemon with LimitMEMLOCK=infinity"
        );
    }
}

/// What the device behind is.
fn profile(device: &Keeper, options: &Options) -> Result<Profile> {
    let offered = device.backend_features()?;
    let own = [BackendFeatures::ENABLE_AFTER_DRIVER_OK, BackendFeatures::DESC_ASID];
    let own =
        own.into_iter().filter(|bit| offered.has(*bit)).fold(BackendFeatures::NONE, BackendFeatures::with);
    let queues = u16::try_from(device.vqs_count()?).map_err(|_| Errno::OPNOTSUPP)?;
    let (groups, address_spaces) =
        (device.group_num().unwrap_or(1).max(1), device.as_num().unwrap_or(1).max(1));
    let groups_of = |group: &dyn Fn(QueueIndex) -> Result<GroupIndex>| -> Vec<GroupIndex> {
        // Without an answer all are in one group.
        (0..queues).map(QueueIndex).map_while(|index| group(index).ok()).collect()
    };
    // Another daemon's device can have vhost's log, which needs requests that are not passed on.
    let features = device.features()?.without(Features::LOG_ALL);
    let base = Profile::simulator(device.device_id()?, features, queues, device.config_size()?);
    Ok(Profile {
        backend_features: own.with(BackendFeatures::NEW_OWNER),
        queue_size_max: device.vring_num()?,
        queue_groups: groups_of(&|index| device.vring_group(index)),
        descriptor_groups: if offered.has(BackendFeatures::DESC_ASID) {
            groups_of(&|index| device.vring_desc_group(index))
        } else {
            Vec::new()
        },
        groups,
        address_spaces,
        iova_range: device.iova_range()?,
        suspend: offered.has(BackendFeatures::SUSPEND),
        resume: offered.has(BackendFeatures::RESUME),
        vring_size: device.vring_size(QueueIndex(0)).is_ok(),
        reset_map: offered.has(BackendFeatures::IOTLB_PERSIST),
        // It is acknowledged for all clients.
        compat_reset: CompatReset::Keep,
        address_mode: AddressMode::Pinned,
        pin_limit: options.pin_limit,
        private_memory: options.private_memory,
        max_iotlb_entries: options.max_iotlb_entries,
        identity_map: false,
        status_unsuspends: false,
        report_batch_errors: true,
        ..base
    })
}

/// Who may change the device behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Another daemon, alive or dead, has made it what it is, and this one is being told what that was.
    BeingRestored,
    /// This one knows, and has not taken over.
    Restored,
    /// This one.
    InCharge,
}

/// See the [module](self).
#[derive(Debug)]
struct Broker {
    name: String,
    profile: Profile,
    /// `None` after the device was taken away.
    keeper: Option<Arc<Keeper>>,
    mappings: Mappings,
    phase: Phase,
    parked: Parked,
}

impl Broker {
    /// Takes over from the daemon before, once that does not serve any more and this one has been told everything; makes the mappings
    /// what they are to be, if that daemon died while it changed them.
    fn take_over(&mut self) {
        if self.phase != Phase::Restored || self.parked.is_parked() {
            return;
        }
        let Some(keeper) = &self.keeper else { return };
        self.phase = Phase::InCharge;
        if let Err(errno) = keeper.take().and_then(|()| self.mappings.reconcile(keeper)) {
            tracing::error!(device = %self.name, %errno, "the device behind is not what it was");
        }
    }
}

impl Parent for Broker {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let read = self.keeper.as_ref().ok_or(Errno::NODEV).and_then(|device| device.config(offset, out));
        if let Err(errno) = read {
            tracing::warn!(device = %self.name, %errno, "the configuration cannot be read");
        }
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        self.take_over();
        let written = self.keeper.as_ref().map_or(Ok(()), |device| device.set_config(offset, data));
        if let Err(errno) = written {
            tracing::warn!(device = %self.name, %errno, "the configuration cannot be written");
        }
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        let in_force = features & self.profile.features;
        if self.phase == Phase::BeingRestored {
            return Ok(in_force);
        }
        self.take_over();
        match &self.keeper {
            Some(device) => device.set_features(features).map(|()| in_force),
            None => Ok(in_force),
        }
    }

    /// The device behind starts it, by the requests that it gets.
    fn start_queue(&mut self, _: QueueIndex, _: &QueueSetup<LinuxHost>, _: QueueState) -> Result<()> {
        Ok(())
    }

    /// As [`start_queue`](Self::start_queue); its position is asked for when a client does.
    fn stop_queue(&mut self, _: QueueIndex) -> Result<Option<QueueState>> {
        Ok(None)
    }

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        self.take_over();
        self.mappings.use_keeper(self.keeper.clone().filter(|_| self.phase == Phase::InCharge));
        Dma::SetMap(&mut self.mappings)
    }

    /// The device behind is closed, which stops its I/O. It cannot complete requests that it has with an error.
    fn fail(&mut self) -> Result<()> {
        self.take_over();
        self.mappings.use_keeper(None);
        match self.keeper.take() {
            Some(device) => device.close(),
            None => Ok(()),
        }
    }

    fn needs_reset(&self) -> bool {
        let status = self.keeper.as_ref().map(|device| device.status());
        // One that has ended cannot say so.
        status.is_some_and(|status| {
            status.is_ok_and(|status| status.contains(Status::NEEDS_RESET)) || status.is_err()
        })
    }

    fn set_config_call(&mut self, event: Option<&EventFd>) {
        if self.phase == Phase::BeingRestored {
            return;
        }
        self.take_over();
        let set = self.keeper.as_ref().map_or(Ok(()), |device| device.set_config_call(event));
        if let Err(errno) = set {
            tracing::warn!(device = %self.name, %errno, "its changes of configuration are not told");
        }
    }

    fn upstream(&mut self) -> Option<Upstream<'_, LinuxHost>> {
        self.take_over();
        self.keeper.as_deref().map(|device| device as Upstream<'_, LinuxHost>)
    }

    fn resumed(&mut self) {
        if self.phase == Phase::BeingRestored {
            self.phase = Phase::Restored;
        }
        self.take_over();
    }

    fn bind_owner(&mut self, owner: Option<&OwnerSpace>) -> Result<()> {
        if owner.is_none() && self.phase != Phase::BeingRestored {
            self.take_over();
            let unbound = self.keeper.as_ref().map_or(Ok(()), |device| device.unbind_events());
            if let Err(errno) = unbound {
                tracing::debug!(device = %self.name, %errno, "events stay bound");
            }
        }
        Ok(())
    }
}
