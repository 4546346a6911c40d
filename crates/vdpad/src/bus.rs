//! [`Bus`]: the devices of this daemon, by name.

mod describe;
mod restore;
mod upgrade;

pub(crate) use restore::HeldDevices;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::{Mutex, MutexGuard, RwLock};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::features::{Features, Status};
use vdpa_core::handover::Handover;
use vdpa_core::net::{NetConfig, is_valid_address};
use vdpa_core::parent::{Parent, Profile};
use vdpa_core::types::QueueIndex;
use vdpa_sys::process::Spaces;
use zerocopy::IntoBytes;

use self::describe::{describe_owner, last_update, state, unix};
use crate::control::Backend;
use crate::devices::{Kept, MgmtDevice, NetAttrs, mgmt_devices};
use crate::survival::{Identity, Survival};
use vdpa_backend::front::fuse::{AddError, DeviceFile, DeviceFiles};
use vdpa_backend::front::vhost::{AnyParent, SharedDevice, SharedParent, VhostVdpaFile};
use vdpa_backend::persist::{DeviceLog, Held};
use vdpa_backend::worker::{QueueLogs, WorkerPool};
use vdpa_control::api::{
    AddRequest, Attrs, CtlError, DaemonInfo, DaemonRole, DevInfo, DevState, ID_NET, MgmtDev, QueueVstats,
    SetAnswer, SetRequest, UpdateInfo, UpgradeRequest, VSTATS_INDEX_MAX,
};
use vdpa_control::config::DevConfig;

/// How long a control request waits for a device that is busy with a request of its client; then it fails with `EBUSY`.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Queues of a device at most, for its in-flight logs.
const QUEUES_MAX: u16 = 64;

/// Bytes of the longest device name: what a file name can have.
const NAME_MAX: usize = 255;

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
}

/// Attribute of every device: the path of its device file.
const DEVICE_FILE_ATTR: &str = "device_file";

/// Attribute of every device: whether a successor may open it while it is in use.
const HANDOVER_ATTR: &str = "handover";

/// How many names of device files are tried: the kernel's devices have names of the same form.
const NUMBERS_TRIED: usize = 4096;

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
        Self { mgmt, files, pool, spaces, devices, survival, changing: RwLock::default(), since }
    }

    /// Revokes every device from its clients and removes it.
    pub fn shutdown(&self) {
        for entry in std::mem::take(&mut *self.devices.lock()) {
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

    /// Creates the device file under the first free number; `taken` are the numbers of this bus.
    fn add_file(
        &self,
        taken: &BTreeSet<u32>,
        path: Option<&Path>,
        file: &Arc<VhostVdpaFile>,
    ) -> Result<(u32, PathBuf), CtlError> {
        for number in (0..).filter(|number| !taken.contains(number)).take(NUMBERS_TRIED) {
            let name = file_name(number);
            let file = Arc::clone(file) as Arc<dyn DeviceFile>;
            let added = match path {
                Some(path) => self.files.add_at(path, &name, file),
                None => self.files.add(&name, file),
            };
            match added {
                Ok(path) => return Ok((number, path)),
                // A device of the kernel, or one of ours that was deleted and is still open.
                Err(AddError::Exists { .. }) => {}
                Err(error) => {
                    return Err(CtlError::new(
                        Errno::IO,
                        format!("cannot make the device file {name}: {error}"),
                    ));
                }
            }
        }
        Err(CtlError::new(Errno::NOSPC, format!("no file name from {} on is free", file_name(0))))
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
            path: entry.path.clone(),
            front: entry.front.into(),
            state: entry.state()?,
        })
    }
}

impl Entry {
    fn file_name(&self) -> String {
        file_name(self.number)
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

    fn busy(&self, client: &str) -> CtlError {
        CtlError::new(Errno::BUSY, format!("device {} is busy with a request of {client}", self.name))
            .with_hint("Its disk may hang; see the daemon's log. Try again later.")
    }
}

/// Parses `handover`: whether a successor may open the device while it is in use.
fn handover(attrs: &mut Attrs) -> Result<bool, CtlError> {
    match attrs.take(HANDOVER_ATTR).as_deref() {
        None | Some("off") => Ok(false),
        Some("open") => Ok(true),
        Some(text) => Err(CtlError::new(Errno::INVAL, format!("{HANDOVER_ATTR} is \"{text}\""))
            .with_hint("\"off\" or \"open\" is right.")),
    }
}

/// Shares a parent between clients. Returns the handle of the first client, and what creates handles for successors.
fn shared(parent: AnyParent) -> Result<(AnyParent, Option<SharedParent>), CtlError> {
    let handover = Handover::new(parent).map_err(|errno| {
        CtlError::new(errno, "this device cannot be opened by a successor")
            .with_hint("It uses addresses of its owner. Leave handover out; blk takes it.")
    })?;
    let first = handover.handle();
    let handle = first.id();
    Ok((Box::new(first), Some(SharedParent { handover, handle })))
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

fn check_name(name: &str) -> Result<(), CtlError> {
    let fits = !name.is_empty()
        && name.len() <= NAME_MAX
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_graphic() && c != '/');
    if fits {
        return Ok(());
    }
    Err(CtlError::new(Errno::INVAL, format!("\"{name}\" is no device name"))
        .with_hint("1 to 255 visible ASCII characters without a slash, not beginning with a dot, are right."))
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

    fn add(&self, mut request: AddRequest) -> Result<(), CtlError> {
        check_name(&request.name)?;
        let path = request.attrs.take(DEVICE_FILE_ATTR).map(PathBuf::from);
        if path.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(CtlError::new(Errno::INVAL, format!("{DEVICE_FILE_ATTR} is not an absolute path"))
                .with_hint("A path such as /dev/vhost-vdpa-0 is right: of a regular file, or of none yet."));
        }
        let handover = handover(&mut request.attrs)?;
        let net_attrs = NetAttrs::parse(&request.attrs)?;
        let mgmt = self
            .mgmt
            .iter()
            .find(|mgmt| mgmt.describe().handle() == request.mgmtdev)
            .ok_or_else(CtlError::no_mgmtdev)?;
        net_attrs.check(&**mgmt)?;
        let _change = self.begin_change()?;
        // Locked to the end, as the kernel holds its management lock: no two requests can take the same name.
        let mut devices = self.devices.lock();
        if devices.iter().any(|entry| entry.name == request.name) {
            return Err(CtlError::new(Errno::EXIST, format!("device {} exists already", request.name))
                .with_hint("Choose another name, or delete it first with \"vdpactl dev del\"."));
        }
        let no_memory = |errno| {
            CtlError::new(errno, format!("no memory for the in-flight logs of {}: {errno}", request.name))
        };
        let survival = self.survival.as_ref();
        let logs = survival.map(|_| QueueLogs::create(QUEUES_MAX)).transpose().map_err(no_memory)?;
        let kept = survival.map(|_| Kept::new()).transpose().map_err(no_memory)?.unwrap_or_default();
        let logged = logs.as_ref().map(|(_, logs)| self.pool.with_logs(logs.clone()));
        let pool = logged.as_ref().unwrap_or(&self.pool);
        let parent = mgmt.create(&request.name, &request.attrs, pool, &kept)?;
        reach(CrashPoint::AddCreated);
        let profile = parent.profile().clone();
        let (parent, shared) = if handover { shared(parent)? } else { (parent, None) };
        let device: SharedDevice = Arc::new(Mutex::new(Device::new(parent)));
        let file = VhostVdpaFile::new(request.name.clone(), Arc::clone(&device), self.spaces.clone());
        let file = file.with_handover(shared);
        let held = survival.map(|survival| survival.new_device());
        let file = file.with_notes(logs.as_ref().and_then(|(_, logs)| logs.notes()));
        let file = match (survival, held, logs) {
            (Some(survival), Some(held), Some((memory, _))) => DeviceLog::create(held, survival.store())
                .and_then(|log| log.hold_logs(memory).map(|()| log))
                .and_then(|log| file.with_log(log))
                .map_err(|error| {
                    CtlError::new(Errno::IO, format!("the device would not survive: {error}"))
                })?,
            _ => file,
        };
        reach(CrashPoint::AddLogHeld);
        let file = Arc::new(file);
        let taken: BTreeSet<u32> = devices.iter().map(|entry| entry.number).collect();
        let front = if path.is_some() { "fuse" } else { self.files.front() };
        let added = self.add_file(&taken, path.as_deref(), &file);
        let (number, path) = added.inspect_err(|_| file.forget_log())?;
        reach(CrashPoint::AddFileMade);
        if let (Some(survival), Some(held)) = (survival, held) {
            let identity = Identity::new(number, &request, kept.mark(), &self.files);
            let contents = kept.held_memory();
            survival.hold_device(held, identity, &self.files, contents.as_deref()).map_err(|errno| {
                survival.release_device(held);
                file.forget_log();
                self.files.remove(&file_name(number));
                CtlError::new(errno, "the device would not survive: the holder refuses it")
            })?;
        }
        reach(CrashPoint::AddIdentityHeld);
        let AddRequest { name, mgmtdev, .. } = request;
        let entry = Entry { name, number, mgmtdev, profile, device, file, path, front, held };
        tracing::info!(device = %entry.name, mgmtdev = %entry.mgmtdev, file = %entry.path.display(), front, "device added");
        devices.push(Arc::new(entry));
        reach(CrashPoint::AddDone);
        Ok(())
    }

    fn set(&self, name: &str, SetRequest { mac }: SetRequest) -> Result<SetAnswer, CtlError> {
        let _change = self.begin_change()?;
        let entry = self.find(name)?;
        let mgmt = self.mgmt.iter().map(|mgmt| mgmt.describe()).find(|mgmt| mgmt.handle() == entry.mgmtdev);
        if !mgmt.is_some_and(|mgmt| mgmt.supported_classes.contains(&ID_NET)) {
            return Ok(SetAnswer { warning: Some(format!("{name} device not supported")) });
        }
        let mac = mac.ok_or_else(|| {
            CtlError::new(Errno::OPNOTSUPP, "no attribute to be set").with_hint("\"mac\" can be set.")
        })?;
        if !is_valid_address(mac.0) {
            return Err(CtlError::new(Errno::OPNOTSUPP, "Invalid MAC address")
                .with_hint("An address that is not zero and not of a group is right."));
        }
        entry
            .lock()?
            .parent_mut()
            .set_mac(mac.0)
            .map_err(|errno| CtlError::new(errno, "Operation not supported by the device"))?;
        entry.file.log_change();
        tracing::info!(device = %name, %mac, "attribute set");
        Ok(SetAnswer::default())
    }

    fn delete(&self, name: &str, force: bool) -> Result<(), CtlError> {
        let _change = self.begin_change()?;
        let entry = self.find(name)?;
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
