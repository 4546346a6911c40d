//! Adding a device.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use vdpa_backend::front::fuse::{AddError, DeviceFile};
use vdpa_backend::front::vhost::{AnyParent, SharedDevice, SharedParent, VhostVdpaFile};
use vdpa_backend::persist::DeviceLog;
use vdpa_backend::worker::QueueLogs;
use vdpa_control::api::{AddRequest, Attrs, CtlError, PATH_ATTRS};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::device::Device;
use vdpa_core::handover::Handover;
use vdpa_sys::dirty::DirtyMemory;

use super::{Bus, Entry, file_name, vduse};
use crate::devices::{Kept, MgmtDevice, NetAttrs};
use crate::survival::{Identity, Survival};

/// Queues of a device at most, for its in-flight logs.
const QUEUES_MAX: u16 = 64;

/// Bytes of the longest device name: what a file name can have.
const NAME_MAX: usize = 255;

/// Attribute of every device: the path of its device file.
pub(super) const DEVICE_FILE_ATTR: &str = "device_file";

/// Attribute of every device: whether a successor may open it while it is in use.
pub(super) const HANDOVER_ATTR: &str = "handover";

/// How many names of device files are tried: the kernel's devices have names of the same form.
const NUMBERS_TRIED: usize = 4096;

impl Bus {
    /// Makes a device and its file, and has held what it is if there is a holder. `passed` are descriptors that came with the request.
    ///
    /// # Errors
    /// Those of [`Backend::add`](crate::control::Backend::add).
    pub(super) fn add_device(&self, mut request: AddRequest, passed: Vec<OwnedFd>) -> Result<(), CtlError> {
        check_name(&request.name)?;
        check_paths(&request.attrs)?;
        check_passed(&request.attrs, &passed)?;
        let asked = request.clone();
        let path = request.attrs.take(DEVICE_FILE_ATTR).map(PathBuf::from);
        let handover = handover(&mut request.attrs)?;
        let bind = vduse::taken(&mut request, path.is_some(), handover, self.by_vduse)?;
        let net_attrs = NetAttrs::parse(&request.attrs)?;
        let mgmt = self.mgmt_of(&request)?;
        net_attrs.check(mgmt)?;
        let _change = self.begin_change()?;
        // Locked to the end, as the kernel holds its management lock: no two requests can take the same name.
        let mut devices = self.devices.lock();
        check_free(&devices, &request.name)?;
        let passed = request.attrs.is_passed().then_some(passed);
        if let Some(bind) = bind {
            devices.push(Arc::new(self.make_vduse(mgmt, &request, asked, bind, passed)?));
            return Ok(());
        }
        let no_memory = |errno| no_memory(&request.name, errno);
        let survival = self.survival.as_ref();
        let logs = survival.map(|_| make_logs()).transpose().map_err(no_memory)?;
        let kept = survival.map(|_| Kept::new()).transpose().map_err(no_memory)?.unwrap_or_default();
        let kept = kept.with_passed(passed);
        let logged = logs.as_ref().map(|(_, logs, _)| self.pool.with_logs(logs.clone()));
        let parent =
            mgmt.create(&request.name, &request.attrs, logged.as_ref().unwrap_or(&self.pool), &kept)?;
        reach(CrashPoint::AddCreated);
        let profile = parent.profile().clone();
        let (parent, shared) = if handover { shared(parent)? } else { (parent, None) };
        let device: SharedDevice = Arc::new(Mutex::new(Device::new(parent)));
        let file = VhostVdpaFile::new(request.name.clone(), Arc::clone(&device), self.spaces.clone())
            .with_handover(shared);
        let held = survival.map(|survival| survival.new_device());
        let file = file.with_notes(logs.as_ref().and_then(|(_, logs, _)| logs.notes()));
        let file = match (survival, held, logs) {
            (Some(survival), Some(held), Some((memory, _, dirty))) => {
                DeviceLog::create(held, survival.store())
                    .and_then(|log| log.hold_logs(memory).map(|()| log))
                    .and_then(|log| log.hold_dirty(&*dirty).map(|()| log))
                    .and_then(|log| file.with_log(log))
                    .map_err(|error| not_held(Errno::IO, &error))?
            }
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
            let identity = Identity::new(number, &request, &kept, &self.files);
            let done = survival.hold_device(held, identity, &self.files, &kept);
            done.inspect_err(|_| self.take_back(survival, held, number, &file))
                .map_err(|errno| not_held(errno, &"the holder refuses it"))?;
        }
        reach(CrashPoint::AddIdentityHeld);
        let AddRequest { name, mgmtdev, .. } = request;
        let (controls, request, vduse) = (kept.controls(), asked, None);
        let entry = Entry {
            name,
            number,
            mgmtdev,
            profile,
            device,
            file,
            path,
            front,
            held,
            controls,
            request,
            vduse,
        };
        tracing::info!(device = %entry.name, mgmtdev = %entry.mgmtdev, file = %entry.path.display(), front, "device added");
        devices.push(Arc::new(entry));
        reach(CrashPoint::AddDone);
        Ok(())
    }

    /// The holder has refused a device.
    fn take_back(&self, survival: &Survival, held: u32, number: u32, file: &VhostVdpaFile) {
        survival.release_device(held);
        file.forget_log();
        self.files.remove(&file_name(number));
    }

    /// The management device that a request names.
    fn mgmt_of(&self, request: &AddRequest) -> Result<&dyn MgmtDevice, CtlError> {
        let found = self.mgmt.iter().find(|mgmt| mgmt.describe().handle() == request.mgmtdev);
        found.map(|mgmt| &**mgmt).ok_or_else(CtlError::no_mgmtdev)
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
}

/// The error for a device that would end with this process.
pub(super) fn not_held(errno: Errno, reason: &dyn std::fmt::Display) -> CtlError {
    CtlError::new(errno, format!("the device would not survive: {reason}"))
}

/// Memory for the in-flight logs of a device that is to outlive this process, and for the pages that it writes.
pub(super) fn make_logs() -> Result<(OwnedFd, QueueLogs, Arc<DirtyMemory>), Errno> {
    let (memory, logs) = QueueLogs::create(QUEUES_MAX)?;
    let dirty = Arc::new(DirtyMemory::create()?);
    Ok((memory, logs.with_dirty(Arc::clone(&dirty)), dirty))
}

/// Refuses a name that a device has.
fn check_free(devices: &[Arc<Entry>], name: &str) -> Result<(), CtlError> {
    if devices.iter().all(|entry| entry.name != name) {
        return Ok(());
    }
    Err(CtlError::new(Errno::EXIST, format!("device {name} exists already"))
        .with_hint("Choose another name, or delete it first with \"vdpactl dev del\"."))
}

/// The error for a device whose logs cannot be made.
pub(super) fn no_memory(name: &str, errno: Errno) -> CtlError {
    CtlError::new(errno, format!("no memory for the in-flight logs of {name}: {errno}"))
}

/// Refuses relative paths: they would be those of this daemon's directory, which is not the caller's.
fn check_paths(attrs: &Attrs) -> Result<(), CtlError> {
    let paths = PATH_ATTRS.iter().filter_map(|name| Some((name, attrs.get(name)?)));
    for (name, path) in paths {
        if !path.is_empty() && Path::new(path).is_relative() {
            return Err(CtlError::new(
                Errno::INVAL,
                format!("{name} is \"{path}\", which is not an absolute path"),
            )
            .with_hint(
                "A path that begins with / is right: the daemon does not know the directory of its caller.",
            ));
        }
    }
    Ok(())
}

/// Refuses descriptors that nothing says what to do with.
fn check_passed(attrs: &Attrs, passed: &[OwnedFd]) -> Result<(), CtlError> {
    if passed.is_empty() || attrs.is_passed() {
        return Ok(());
    }
    Err(CtlError::new(Errno::INVAL, "descriptors came with the request, and none are asked for")
        .with_hint("passed on uses them."))
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
    if parent.profile().vhost_log {
        return Err(CtlError::new(Errno::INVAL, "handover and vhost_log exclude each other").with_hint(
            "The log is in memory of one client. A successor can use the requests VDPA_DIRTY_* instead.",
        ));
    }
    let handover = Handover::new(parent).map_err(|errno| {
        CtlError::new(errno, "this device cannot be opened by a successor").with_hint(
            "It uses addresses of its owner, or is another device's. Leave handover out; blk takes it.",
        )
    })?;
    let first = handover.handle();
    let handle = first.id();
    Ok((Box::new(first), Some(SharedParent { handover, handle })))
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
