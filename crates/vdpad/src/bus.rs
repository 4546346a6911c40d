//! [`Bus`]: the devices of this daemon, by name.

mod add;
mod configuration;
mod describe;
mod moving;
mod restore;
mod upgrade;
mod vduse;

pub(crate) use restore::HeldDevices;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard, RwLock};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::features::{Features, Status};
use vdpa_core::net::{NetConfig, is_valid_address};
use vdpa_core::parent::{Parent, Profile};
use vdpa_core::types::QueueIndex;
use vdpa_sys::process::Spaces;
use zerocopy::IntoBytes;

use self::describe::{describe_owner, last_update, state, unix};
use self::vduse::Vduse;
use crate::control::Backend;
use crate::devices::{Controls, MgmtDevice, mgmt_devices};
use crate::survival::Survival;
use crate::vdpa_bus;
use vdpa_backend::front::fuse::DeviceFiles;
use vdpa_backend::front::vhost::{AnyParent, SharedDevice, VhostVdpaFile};
use vdpa_backend::persist::Held;
use vdpa_backend::worker::WorkerPool;
use vdpa_control::Front;
use vdpa_control::api::{
    AddRequest, CtlError, DaemonInfo, DaemonRole, DevInfo, DevState, ID_NET, LimitChange, Link, MgmtDev,
    NewSize, QueueVstats, Reloaded, Running, SetAnswer, SetRequest, UpdateInfo, UpgradeRequest,
    VSTATS_INDEX_MAX,
};
use vdpa_control::config::DevConfig;

/// How long a control request waits for a device that is busy with a request of its client; then it fails with `EBUSY`.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The devices, each with its device file.
#[derive(Debug)]
pub struct Bus {
    mgmt: Vec<Box<dyn MgmtDevice>>,
    files: Arc<DeviceFiles>,
    pool: WorkerPool,
    spaces: Spaces,
    devices: Mutex<Vec<Arc<Entry>>>,
    /// `None` without a holder: the devices end with this process.
    survival: Option<Arc<Survival>>,
    /// Read while a device is added, changed or deleted; written during an upgrade.
    changing: RwLock<()>,
    since: SystemTime,
    /// The main configuration file.
    configuration: PathBuf,
    /// The kernel gets each device that it can have, unless the request says otherwise.
    by_vduse: bool,
}

#[derive(Debug)]
struct Entry {
    name: String,
    /// The N of `vhost-vdpa-N`.
    number: u32,
    mgmtdev: String,
    profile: Profile,
    device: SharedDevice,
    file: Arc<VhostVdpaFile>,
    /// Path of the device file.
    path: PathBuf,
    /// Front end that serves it: `cuse` or `fuse`.
    front: &'static str,
    /// Its number at the holder; `None` without one.
    held: Option<u32>,
    /// What of it can be changed while it is in use.
    controls: Option<Arc<dyn Controls>>,
    /// As it was asked for.
    request: AddRequest,
    /// For a device that the kernel has, and that has no device file.
    vduse: Option<Vduse>,
}

impl Bus {
    /// Creates a bus whose device files are served by `files`. At most `workers` threads serve the devices that have no
    /// attribute `cpus`; each busy-polls its rings for up to `poll` before it sleeps, while that pays. With `survival` their io_urings
    /// outlive this process; `rings` are those of a predecessor.
    #[must_use]
    pub fn new(
        files: Arc<DeviceFiles>,
        workers: usize,
        poll: Duration,
        survival: Option<Arc<Survival>>,
        rings: Vec<Held>,
    ) -> Self {
        let pool = WorkerPool::new(workers, poll);
        let pool = match survival.as_ref().filter(|_| keeps_rings()) {
            Some(survival) => pool.keeping(survival.store(), rings, survival.is_candidate()),
            None => pool,
        };
        let (mgmt, spaces, devices) = (mgmt_devices(), Spaces::new(), Mutex::default());
        let since = SystemTime::now();
        let (changing, configuration) = (RwLock::default(), PathBuf::new());
        let by_vduse = false;
        Self { mgmt, files, pool, spaces, devices, survival, changing, since, configuration, by_vduse }
    }

    /// With the front end of devices whose request names none; all but [`Front::Vduse`] are device files, which were given.
    #[must_use]
    pub fn with_front(self, front: Front) -> Self {
        Self { by_vduse: front == Front::Vduse, ..self }
    }

    /// With the main configuration file, which is read [on demand](Backend::reload).
    #[must_use]
    pub fn with_configuration(self, configuration: PathBuf) -> Self {
        Self { configuration, ..self }
    }

    /// Revokes every device from its clients and removes it.
    pub fn shutdown(&self) {
        for entry in std::mem::take(&mut *self.devices.lock()) {
            if let Some(vduse) = &entry.vduse {
                vduse.end(&entry.name);
            }
            self.release_connection(&entry);
            self.files.remove(&entry.file_name());
            if entry.file.release_now(BUSY_TIMEOUT).is_err() {
                tracing::error!(device = %entry.name, "the request that it is busy with has not ended");
            }
        }
    }

    /// The file of a device is about to end.
    fn release_connection(&self, entry: &Entry) {
        if let (Some(survival), Some(held)) = (&self.survival, entry.held) {
            survival.release_connection(held);
        }
    }

    /// Whether there is a device of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    fn find(&self, name: &str) -> Result<Arc<Entry>, CtlError> {
        let devices = self.devices.lock();
        devices.iter().find(|entry| entry.name == name).cloned().ok_or_else(CtlError::no_device)
    }

    fn info(&self, entry: &Entry) -> Result<DevInfo, CtlError> {
        let profile = &entry.profile;
        Ok(DevInfo {
            name: entry.name.clone(),
            device_id: profile.device_id,
            mgmtdev: entry.mgmtdev.clone(),
            vendor_id: profile.vendor_id,
            max_vqs: profile.queues.into(),
            max_vq_size: profile.queue_size_max,
            min_vq_size: 1,
            path: entry.path(),
            front: entry.front.into(),
            passed: entry.request.attrs.is_passed(),
            state: entry.state()?,
        })
    }
}

impl Entry {
    fn file_name(&self) -> String {
        file_name(self.number)
    }

    /// The device file; of a device that the kernel has, the file by which that is used.
    fn path(&self) -> PathBuf {
        self.vduse.as_ref().and_then(|_| vdpa_bus::file(&self.name)).unwrap_or_else(|| self.path.clone())
    }

    fn update(&self) -> Result<UpdateInfo, CtlError> {
        let owner = self.lock()?.owner().map(|space| describe_owner(space, self.file.owned_since()));
        let updates = self.file.updates();
        Ok(UpdateInfo {
            name: self.name.clone(),
            owner,
            owner_changes: updates.owner_changes,
            owner_changed: updates.owner_changed.map(unix),
            updates: updates.done,
            rolled_back: updates.rolled_back,
            last: updates.last.map(|(report, at)| last_update(&report, at)),
        })
    }

    /// Requests that were refused because daemons had begun them, and died. Without those on rings while the device is busy.
    fn poison(&self) -> u64 {
        let queues = self.lock().map_or(0, |device| {
            (0..self.profile.queues).map(|index| device.parent().queue_stats(QueueIndex(index)).poison).sum()
        });
        queues + self.file.refused()
    }

    fn lock(&self) -> Result<MutexGuard<'_, Device<AnyParent>>, CtlError> {
        self.device.try_lock_for(BUSY_TIMEOUT).ok_or_else(|| self.busy("its client"))
    }

    fn state(&self) -> Result<DevState, CtlError> {
        // Before the device is locked: a request of the successor locks the list of opens first, then the device.
        let successor = self.file.successor(BUSY_TIMEOUT).map_err(|_| self.busy("its client's successor"))?;
        Ok(state(&*self.lock()?, self.file.owned_since(), successor))
    }

    /// Changes the size of its disk, and tells its driver when that would survive this process.
    fn resize(&self, size: NewSize, force: bool) -> Result<(), CtlError> {
        let controls = self.controls.as_ref().ok_or_else(|| {
            CtlError::new(Errno::OPNOTSUPP, format!("the size of {} cannot be changed", self.name))
                .with_hint("That of a blk with a file or block device can.")
        })?;
        let device = self.lock()?;
        controls.resize(size, force)?;
        drop(device);
        self.file.log_change();
        controls.signal();
        Ok(())
    }

    /// Changes the limits of its disk.
    fn limit(&self, change: LimitChange) -> Result<(), CtlError> {
        let controls = self.controls.as_ref().ok_or_else(|| {
            CtlError::new(Errno::OPNOTSUPP, format!("{} has no limits", self.name))
                .with_hint("A blk with a file or block device has.")
        })?;
        controls.limit(change)?;
        self.file.log_change();
        tracing::info!(device = %self.name, ?change, "limits changed");
        Ok(())
    }

    fn busy(&self, client: &str) -> CtlError {
        CtlError::new(Errno::BUSY, format!("device {} is busy with a request of {client}", self.name))
            .with_hint("Its disk may hang; see the daemon's log. Try again later.")
    }
}

/// Whether rings outlive this process: always, but for the test that shows what happens without a fence, since their adoption is
/// one.
fn keeps_rings() -> bool {
    !cfg!(feature = "crash-points") || std::env::var_os("VDPA_NO_FENCE").is_none()
}

/// Name of the device file with this number.
pub(crate) fn file_name(number: u32) -> String {
    format!("vhost-vdpa-{number}")
}

impl Backend for Bus {
    fn daemon(&self) -> Result<DaemonInfo, CtlError> {
        match &self.survival {
            Some(survival) => {
                let poison = self.devices.lock().clone().iter().map(|entry| entry.poison()).sum();
                survival.daemon_info(self.since).map(|info| DaemonInfo { poison, ..info })
            }
            None => Ok(DaemonInfo {
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
                since: unix(self.since),
                role: DaemonRole::Daemon,
                poison: 0,
                holder: None,
            }),
        }
    }

    fn upgrade(&self, request: UpgradeRequest) -> Result<(), CtlError> {
        let survival = self.survival.as_ref().ok_or_else(|| {
            CtlError::new(Errno::OPNOTSUPP, "this daemon cannot be upgraded: it has no holder")
                .with_hint("Start it with --holder.")
        })?;
        // To the end: no device is added, changed or deleted.
        let upgrading = self.begin_upgrade()?;
        survival.upgrade(&request, || self.stop_serving(), || self.serve_again())?;
        if !request.dry_run {
            // What a device is now, the next daemon has read.
            std::mem::forget(upgrading);
        }
        Ok(())
    }

    fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, CtlError> {
        Ok(self.mgmt.iter().map(|mgmt| mgmt.describe()).collect())
    }

    fn devices(&self) -> Result<Vec<DevInfo>, CtlError> {
        let entries = self.devices.lock().clone();
        entries.iter().map(|entry| self.info(entry)).collect()
    }

    fn device(&self, name: &str) -> Result<DevInfo, CtlError> {
        self.info(&*self.find(name)?)
    }

    fn config(&self, name: &str) -> Result<DevConfig, CtlError> {
        let entry = self.find(name)?;
        let device = entry.lock()?;
        let profile = &entry.profile;
        let mut space = vec![0; profile.config_size as usize];
        device
            .peek_config(0, &mut space)
            .map_err(|errno| CtlError::new(errno, "the device has no configuration"))?;
        let negotiated =
            device.negotiated_features().filter(|_| device.status().contains(Status::FEATURES_OK));
        DevConfig::decode(&entry.name, profile.device_id, profile.features, negotiated, &space)
    }

    fn vstats(&self, name: &str, queue_index: u32) -> Result<QueueVstats, CtlError> {
        let entry = self.find(name)?;
        if entry.profile.device_id != ID_NET {
            return Err(CtlError::new(
                Errno::OPNOTSUPP,
                "vendor statistics are not there for devices other than net",
            )
            .with_hint("\"vdpactl -s dev show\" shows the counters of every device."));
        }
        let index = u16::try_from(queue_index).ok().filter(|_| queue_index <= VSTATS_INDEX_MAX);
        let index = index.ok_or_else(|| {
            CtlError::new(Errno::RANGE, "queue index exceeds max value")
                .with_hint(format!("An index is at most {VSTATS_INDEX_MAX}."))
        })?;
        let mut device = entry.lock()?;
        if !device.status().contains(Status::FEATURES_OK) {
            return Err(CtlError::new(Errno::AGAIN, "feature negotiation not complete")
                .with_hint("There are statistics once a client has set FEATURES_OK."));
        }
        // Has the side effect of a client's GET_CONFIG, as in the kernel.
        let mut space = NetConfig::default();
        device
            .config(0, space.as_mut_bytes())
            .map_err(|errno| CtlError::new(errno, "the device has no configuration"))?;
        let negotiated = device.negotiated_features().unwrap_or_default();
        let counters = device.parent().vendor_stats(QueueIndex(index)).map_err(|errno| {
            CtlError::new(errno, format!("no vendor statistics of queue {index}: {errno}")).with_hint(
                format!("The device has the queues 0 to {}.", entry.profile.queues.saturating_sub(1)),
            )
        })?;
        let pairs = negotiated.has(Features::NET_MQ) || negotiated.has(Features::NET_RSS);
        Ok(QueueVstats {
            name: entry.name.clone(),
            device_id: entry.profile.device_id,
            negotiated_features: negotiated,
            max_vq_pairs: pairs.then(|| space.max_virtqueue_pairs.get()),
            queue_index: index,
            counters: counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        })
    }

    fn updates(&self) -> Result<Vec<UpdateInfo>, CtlError> {
        let entries = self.devices.lock().clone();
        entries.iter().map(|entry| entry.update()).collect()
    }

    fn update(&self, name: &str) -> Result<UpdateInfo, CtlError> {
        self.find(name)?.update()
    }

    fn running(&self) -> Result<Running, CtlError> {
        let devices = self.devices.lock().iter().map(|entry| entry.request.clone()).collect();
        Ok(Running { path: self.configuration.clone(), devices })
    }

    fn reload(&self) -> Result<Reloaded, CtlError> {
        self.reload_configuration()
    }

    fn add(&self, request: AddRequest, passed: Vec<OwnedFd>) -> Result<(), CtlError> {
        self.add_device(request, passed).map_err(|error| match error.errno {
            Errno::MFILE => error.with_hint(
                "The daemon has no descriptor left: raise LimitNOFILE of its unit; \"vdpactl doctor\" says how many devices that allows.",
            ),
            _ => error,
        })
    }

    fn set(&self, name: &str, request: SetRequest) -> Result<SetAnswer, CtlError> {
        let SetRequest { mac, link, size, limits, force } = request;
        let _change = self.begin_change()?;
        let entry = self.find(name)?;
        if size.is_some() || limits.is_some() {
            entry.check_change()?;
            size.map_or(Ok(()), |size| entry.resize(size, force))?;
            limits.map_or(Ok(()), |change| entry.limit(change))?;
            if mac.is_none() && link.is_none() {
                return Ok(SetAnswer::default());
            }
        }
        let mgmt = self.mgmt.iter().map(|mgmt| mgmt.describe()).find(|mgmt| mgmt.handle() == entry.mgmtdev);
        if !mgmt.is_some_and(|mgmt| mgmt.supported_classes.contains(&ID_NET)) {
            return Ok(SetAnswer { warning: Some(format!("{name} device not supported")) });
        }
        if mac.is_none() && link.is_none() {
            return Err(CtlError::new(Errno::OPNOTSUPP, "no attribute to be set").with_hint(
                "\"mac\" and \"link\" can be set, and \"size\", \"iops\", \"bps\" and \"burst\" of a disk.",
            ));
        }
        if mac.is_some_and(|mac| !is_valid_address(mac.0)) {
            return Err(CtlError::new(Errno::OPNOTSUPP, "Invalid MAC address")
                .with_hint("An address that is not zero and not of a group is right."));
        }
        let mut device = entry.lock()?;
        let set_mac = mac.map_or(Ok(()), |mac| device.parent_mut().set_mac(mac.0));
        let mut set_link = || link.map_or(Ok(()), |link| device.parent_mut().set_link(link == Link::Up));
        set_mac
            .and_then(|()| set_link())
            .map_err(|errno| CtlError::new(errno, "Operation not supported by the device"))?;
        drop(device);
        entry.file.log_change();
        tracing::info!(device = %name, ?mac, ?link, "attribute set");
        Ok(SetAnswer::default())
    }

    fn save_state(&self, name: &str) -> Result<Vec<u8>, CtlError> {
        self.state_of(name)
    }

    fn load_state(&self, name: &str, state: &[u8]) -> Result<(), CtlError> {
        self.make_moved(name, state)
    }

    fn delete(&self, name: &str, force: bool) -> Result<(), CtlError> {
        let _change = self.begin_change()?;
        let entry = self.find(name)?;
        if let Some(vduse) = &entry.vduse {
            return self.delete_vduse(&entry, vduse, force);
        }
        if entry.lock()?.is_open() && !force {
            return Err(CtlError::new(Errno::BUSY, format!("device {name} is open"))
                .with_hint("Close its client first, or take it away with \"vdpactl dev del DEV --force\"."));
        }
        self.release_connection(&entry);
        self.files.remove(&entry.file_name());
        reach(CrashPoint::DelFileRemoved);
        let taken = entry.file.revoke(BUSY_TIMEOUT);
        if let Err(errno) = taken
            && errno != Errno::TIMEDOUT
        {
            return Err(CtlError::new(errno, format!("device {name} is busy with a request of its client")));
        }
        reach(CrashPoint::DelRevoked);
        if let (Some(survival), Some(held)) = (&self.survival, entry.held) {
            survival.release_device(held);
            reach(CrashPoint::DelIdentityReleased);
            entry.file.forget_log();
        }
        self.devices.lock().retain(|other| !Arc::ptr_eq(other, &entry));
        reach(CrashPoint::DelDone);
        tracing::info!(device = %name, force, waits = taken.is_err(), "device deleted");
        taken.map_err(|errno| {
            CtlError::new(errno, format!("device {name} is deleted, but its disk has not answered yet"))
                .with_hint("Its file is free, and its client gets errors, when the disk has answered.")
        })
    }
}
