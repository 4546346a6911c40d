//! Devices that the kernel has, by VDUSE: adding, deleting, and what becomes of them after a crash and in an upgrade.
//!
//! Nothing of such a device is in a journal: the kernel knows what its driver has set, the in-flight logs know the positions of the queues,
//! and beside these there are two words ([`KeptState`]).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;
use vdpa_backend::front::vduse::{KeptState, VduseError, VduseFront};
use vdpa_backend::front::vhost::{SharedDevice, VhostVdpaFile};
use vdpa_backend::persist::items::device::{DIRTY, LOGS};
use vdpa_backend::persist::{Held, Kind, key, split_key};
use vdpa_backend::worker::QueueLogs;
use vdpa_control::api::{AddRequest, CtlError};
use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::error::chain;
use vdpa_core::features::Status;
use vdpa_core::types::QueueIndex;
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::shared_words::SharedWords;

use super::add::{make_logs, no_memory, not_held};
use super::restore::{Error, HeldDevices, create_again, kept_again};
use super::{BUSY_TIMEOUT, Bus, Entry};
use crate::devices::{Kept, MgmtDevice};
use crate::survival::{Identity, LegacyParts, Survival};
use crate::vdpa_bus::{self, Bind};

/// Attribute of every device: its front end, where it is not that of the daemon.
const FRONT_ATTR: &str = "front";
/// Attribute of a device of VDUSE: the driver that it gets.
const BIND_ATTR: &str = "bind";
/// The number of its device file: it has none.
const NO_NUMBER: u32 = u32::MAX;
/// Words of a device that does not outlive this process.
const WORDS: usize = 8;

/// What a device of VDUSE has in the place of a device file.
#[derive(Debug)]
pub(super) struct Vduse {
    front: VduseFront,
}

/// What of a device outlives this process: nothing without a holder.
#[derive(Debug)]
struct Lasting {
    logs: Option<QueueLogs>,
    kept: Kept,
    /// Its number at the holder.
    held: Option<u32>,
}

/// Takes the attributes `front` and `bind` out of a request. Returns the driver that a device of VDUSE is to have; `None` for
/// another device. `default`: that of the daemon is VDUSE, for what the kernel can have.
///
/// # Errors
/// `EINVAL` for other values, and for attributes that VDUSE excludes.
pub(super) fn taken(
    request: &mut AddRequest,
    own_path: bool,
    handover: bool,
    default: bool,
) -> Result<Option<Bind>, CtlError> {
    let invalid = |text: String, hint: &str| Err(CtlError::new(Errno::INVAL, text).with_hint(hint));
    let bind = request.attrs.take(BIND_ATTR);
    match request.attrs.take(FRONT_ATTR).as_deref() {
        Some("vduse") => {}
        None if default && !own_path && !handover && request.mgmtdev != "vhost-vdpa" => {}
        None if bind.is_some() => {
            return invalid(
                "bind is for a device with front vduse".into(),
                "Add \"front vduse\", or leave bind out.",
            );
        }
        None => return Ok(None),
        Some(text) => {
            let hint =
                "\"vduse\" is right. Without this attribute the device has a file as --front of vdpad says.";
            return invalid(format!("front is \"{text}\""), hint);
        }
    }
    if own_path || handover {
        return invalid(
            "a device with front vduse has no device file of its own, and one client, the kernel".into(),
            "Leave device_file and handover out.",
        );
    }
    // The kernel's drivers have memory that cannot be pinned, and no addresses of a process.
    let needed: &[_] = match request.mgmtdev.as_str() {
        "blk" => &[("pin", "off")],
        "sim-blk" | "sim-net" => &[("use_va", "objects"), ("batch_mapping", "on")],
        _ => &[],
    };
    for &(name, value) in needed {
        match request.attrs.get(name) {
            None => request
                .attrs
                .insert(name, value)
                .map_err(|error| CtlError::new(Errno::INVAL, error.to_string()))?,
            Some(given) if given == value => {}
            Some(given) => {
                let text = format!("{name} is \"{given}\", and with front vduse it is \"{value}\"");
                return invalid(text, &format!("Leave {name} out."));
            }
        }
    }
    Bind::parse(bind.as_deref()).map(Some)
}

/// What is asked for by a request whose attributes [`taken`] has taken out.
fn asked_for(mut request: AddRequest, bind: Bind) -> AddRequest {
    for (name, value) in [(FRONT_ATTR, "vduse"), (BIND_ATTR, bind.name())] {
        // It is not there: it was taken out.
        let _ = request.attrs.insert(name, value);
    }
    request
}

fn refused(error: &VduseError) -> CtlError {
    let told = CtlError::new(error.errno(), chain(error).to_string());
    match error {
        VduseError::Control { errno: Errno::NOENT } => {
            told.with_hint("\"modprobe vduse\" loads it, if the kernel was built with CONFIG_VDPA_USER.")
        }
        VduseError::Exists { .. } => told.with_hint(
            "Choose another name. One that a program has left is replaced when it is not on the bus: \"vdpa dev del NAME\".",
        ),
        VduseError::Unsuitable { .. } => told.with_hint("Leave front out."),
        _ => told,
    }
}

impl Bus {
    /// Makes a device, and has the kernel have it; `passed` are the descriptors that were to come with the request. Called with the
    /// list of devices locked.
    ///
    /// # Errors
    /// As [`Backend::add`](crate::control::Backend::add). Nothing is left behind.
    pub(super) fn make_vduse(
        &self,
        mgmt: &dyn MgmtDevice,
        request: &AddRequest,
        asked: AddRequest,
        bind: Bind,
        passed: Option<Vec<OwnedFd>>,
    ) -> Result<Entry, CtlError> {
        let name = request.name.as_str();
        let no_memory = |errno| no_memory(name, errno);
        vdpa_bus::load("vduse");
        let survival = self.survival.as_deref();
        let kept = survival.map(|_| Kept::new()).transpose().map_err(no_memory)?.unwrap_or_default();
        let mut lasting = Lasting { logs: None, kept: kept.with_passed(passed), held: None };
        if let Some(survival) = survival {
            let (memory, logs, dirty) = make_logs().map_err(no_memory)?;
            let held = survival.new_device();
            hold(survival, held, &memory, &dirty).map_err(no_memory)?;
            (lasting.logs, lasting.held) = (Some(logs), Some(held));
        }
        let made = self.vduse_entry(mgmt, request, asked, bind, &lasting);
        made.inspect_err(|_| {
            if let (Some(survival), Some(held)) = (survival, lasting.held) {
                release(survival, held);
            }
        })
    }

    fn vduse_entry(
        &self,
        mgmt: &dyn MgmtDevice,
        request: &AddRequest,
        asked: AddRequest,
        bind: Bind,
        lasting: &Lasting,
    ) -> Result<Entry, CtlError> {
        let name = request.name.as_str();
        let Lasting { logs, kept, held } = lasting;
        let logged = logs.as_ref().map(|logs| self.pool.with_logs(logs.clone()));
        let parent = mgmt.create(name, &request.attrs, logged.as_ref().unwrap_or(&self.pool), kept)?;
        let device: SharedDevice = Arc::new(Mutex::new(Device::new(parent)));
        let state = state(logs.as_ref()).map_err(|errno| no_memory(name, errno))?;
        let front = VduseFront::create(name, Arc::clone(&device), state).map_err(|error| refused(&error))?;
        let entry = self.entry_of(device, asked, kept, *held, front);
        let mut done = Ok(());
        if let (Some(survival), &Some(held)) = (&self.survival, held) {
            let identity = Identity::new(NO_NUMBER, request, kept, &self.files).with_vduse(bind);
            done = survival
                .hold_kept(held, kept)
                .and_then(|()| survival.hold_identity(held, &identity))
                .map_err(|errno| not_held(errno, &"the holder refuses it"));
        }
        // Last: from here on there may be a driver, which is not to lose it.
        done = done.and_then(|()| vdpa_bus::attach(name, bind));
        match done {
            Ok(()) => {
                tracing::info!(device = %name, mgmtdev = %request.mgmtdev, ?bind, "device added, by VDUSE");
                Ok(entry)
            }
            Err(error) => {
                entry.vduse.iter().for_each(|vduse| vduse.end(name));
                Err(error)
            }
        }
    }

    fn entry_of(
        &self,
        device: SharedDevice,
        request: AddRequest,
        kept: &Kept,
        held: Option<u32>,
        front: VduseFront,
    ) -> Entry {
        let (name, mgmtdev) = (request.name.clone(), request.mgmtdev.clone());
        let profile = device.lock().profile().clone();
        // Nobody opens it: what administrators ask of a device they ask of its file.
        let file = VhostVdpaFile::new(name.clone(), Arc::clone(&device), self.spaces.clone());
        Entry {
            path: VduseFront::path(&name),
            name,
            number: NO_NUMBER,
            mgmtdev,
            profile,
            device,
            file: Arc::new(file),
            front: "vduse",
            held,
            controls: kept.controls(),
            request,
            vduse: Some(Vduse { front }),
        }
    }

    /// Deletes a device that the kernel has. One in use is taken from a driver of the kernel with `force`.
    pub(super) fn delete_vduse(
        &self,
        entry: &Arc<Entry>,
        vduse: &Vduse,
        force: bool,
    ) -> Result<(), CtlError> {
        let name = entry.name.as_str();
        if !force && vdpa_bus::in_use(name) {
            return Err(CtlError::new(Errno::BUSY, format!("device {name} is in use"))
                .with_hint("Unmount it, set its interface down, or close its client. \"vdpactl dev del DEV --force\" takes it from a driver of the kernel."));
        }
        vdpa_bus::detach(name)?;
        vduse.front.destroy().map_err(|error| refused(&error))?;
        if let Err(errno) = entry.file.release_now(BUSY_TIMEOUT) {
            return Err(CtlError::new(errno, format!("device {name} is busy with a request of its driver")));
        }
        if let (Some(survival), Some(held)) = (&self.survival, entry.held) {
            release(survival, held);
        }
        self.devices.lock().retain(|other| !Arc::ptr_eq(other, entry));
        tracing::info!(device = %name, force, "device deleted");
        Ok(())
    }

    /// Answers no message of the kernel, so that another process can.
    pub(super) fn pause_vduse(&self) {
        self.devices
            .lock()
            .iter()
            .filter_map(|entry| entry.vduse.as_ref())
            .for_each(|vduse| vduse.front.pause());
    }

    /// Answers again.
    pub(super) fn unpause_vduse(&self) {
        for entry in &*self.devices.lock() {
            if let Some(Err(error)) = entry.vduse.as_ref().map(|vduse| vduse.front.unpause()) {
                tracing::error!(device = %entry.name, "the kernel's messages are not answered any more: {}", chain(&error));
            }
        }
    }

    /// Serves the devices that a predecessor has left with the kernel.
    pub(super) fn restore_vduse(&self, devices: HeldDevices) {
        for (held, (identity, items)) in devices {
            let name = identity.request.name.clone();
            match self.restored_vduse(held, identity, items) {
                Ok(entry) => {
                    let mut devices = self.devices.lock();
                    devices.push(Arc::new(entry));
                    devices.sort_by_key(|entry| entry.held);
                    tracing::info!(device = %name, "device restored");
                }
                Err(error) => {
                    tracing::error!(device = %name, "the device cannot be restored: {}", chain(&*error));
                    if let Some(survival) = &self.survival {
                        release(survival, held);
                    }
                }
            }
        }
    }

    fn restored_vduse(&self, held: u32, identity: Identity, mut items: Vec<Held>) -> Result<Entry, Error> {
        let AddRequest { name, mgmtdev, attrs } = &identity.request;
        let mgmt = self.mgmt.iter().find(|mgmt| mgmt.describe().handle() == *mgmtdev);
        let mgmt = mgmt.ok_or_else(|| format!("there is no management device {mgmtdev}"))?;
        let bind = identity.vduse().ok_or("it is no device of VDUSE")?;
        let mut parts = LegacyParts::take(&mut items);
        let mut take = |item| {
            let at = items.iter().position(|held| split_key(held.key).1 == item);
            at.map(|at| items.swap_remove(at).fd)
        };
        let (logs, dirty) = (take(LOGS), take(DIRTY));
        let logs = QueueLogs::reopen(logs.ok_or("its in-flight logs are not held")?)?;
        let dirty = DirtyMemory::reopen(dirty.ok_or("its memory of dirty pages is not held")?)?;
        let logs = logs.with_dirty(Arc::new(dirty));
        // Before its file is opened.
        let kept = kept_again(&identity, &mut parts, self.pool.settle(&logs));
        let state = state(Some(&logs))?;
        let parent = create_again(&**mgmt, name, attrs, &self.pool.with_logs(logs.clone()), &kept)?;
        if !state.status().contains(Status::DRIVER_OK) {
            // A queue that starts for another driver begins where that one says.
            (0..parent.profile().queues).for_each(|index| logs.forget(QueueIndex(index), None));
        }
        let device: SharedDevice = Arc::new(Mutex::new(Device::new(parent)));
        let front = VduseFront::adopt(name, Arc::clone(&device), state)?;
        if !vdpa_bus::has(name) {
            // The predecessor had not come that far.
            vdpa_bus::attach(name, bind)?;
        }
        Ok(self.entry_of(device, asked_for(identity.request.clone(), bind), &kept, Some(held), front))
    }
}

impl Entry {
    /// Refuses what its client would not expect of a device whose client is the kernel.
    ///
    /// # Errors
    /// `EOPNOTSUPP`.
    pub(super) fn check_client(&self) -> Result<(), CtlError> {
        match &self.vduse {
            None => Ok(()),
            Some(_) => {
                Err(CtlError::new(Errno::OPNOTSUPP, format!("the driver of {} is the kernel", self.name))
                    .with_hint("A device with front vduse cannot take the state of another one."))
            }
        }
    }

    /// Refuses a change that the next daemon would not know of.
    ///
    /// # Errors
    /// `EOPNOTSUPP`.
    pub(super) fn check_change(&self) -> Result<(), CtlError> {
        if self.vduse.is_none() || self.held.is_none() {
            return Ok(());
        }
        let text = format!("the size and the limits of {} would not survive this daemon", self.name);
        Err(CtlError::new(Errno::OPNOTSUPP, text)
            .with_hint("With --holder those of a device with front vduse cannot be changed."))
    }
}

impl Vduse {
    /// Takes the device from the kernel, whoever uses it, and says in the log if that does not work.
    pub(super) fn end(&self, name: &str) {
        if let Err(error) = vdpa_bus::detach(name) {
            tracing::error!(device = name, "the device is left on the bus, and nobody serves it: {error}");
        }
        if let Err(error) = self.front.destroy() {
            tracing::error!(device = name, "the device is left in the kernel: {}", chain(&error));
        }
    }
}

fn state(logs: Option<&QueueLogs>) -> Result<KeptState, Errno> {
    let words = match logs {
        Some(logs) => logs.front().ok_or(Errno::INVAL)?,
        None => SharedWords::create(c"vdpa-vduse", WORDS)?.1,
    };
    KeptState::new(&words).ok_or(Errno::INVAL)
}

fn hold(survival: &Survival, device: u32, logs: &impl AsFd, dirty: &DirtyMemory) -> Result<(), Errno> {
    let store = survival.store();
    store.hold(key(device, LOGS), Kind::Memory, logs.as_fd(), &[])?;
    store.hold(key(device, DIRTY), Kind::Memory, dirty.as_fd(), &[])
}

fn release(survival: &Survival, device: u32) {
    survival.release_device(device);
    for item in [LOGS, DIRTY] {
        // It may not be held yet.
        let _ = survival.store().release(key(device, item));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(attrs: &[(&str, &str)]) -> AddRequest {
        let mut request = AddRequest { name: "a".into(), mgmtdev: "blk".into(), attrs: Default::default() };
        attrs.iter().for_each(|(name, value)| request.attrs.insert(*name, *value).unwrap());
        request
    }

    #[test]
    fn the_attributes_of_a_device_of_vduse_are_checked() {
        let parse = |attrs: &[(&str, &str)]| taken(&mut request(attrs), false, false, false);
        assert_eq!(parse(&[]).unwrap(), None);
        assert_eq!(parse(&[("front", "vduse")]).unwrap(), Some(Bind::None));
        assert_eq!(
            parse(&[("front", "vduse"), ("bind", "virtio"), ("pin", "off")]).unwrap(),
            Some(Bind::Virtio)
        );
        assert_eq!(parse(&[("front", "vduse"), ("bind", "vhost")]).unwrap(), Some(Bind::Vhost));
        for (wrong, text) in [
            (&[("front", "fuse")][..], "front is \"fuse\""),
            (&[("bind", "vhost")], "bind is for a device with front vduse"),
            (&[("front", "vduse"), ("bind", "vfio")], "bind is \"vfio\""),
            (&[("front", "vduse"), ("pin", "on")], "pin is \"on\", and with front vduse it is \"off\""),
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!((error.errno, error.message.as_str()), (Errno::INVAL, text));
            assert!(error.hint.is_some());
        }
        assert!(taken(&mut request(&[("front", "vduse")]), true, false, true).is_err(), "a path of its own");
        assert!(taken(&mut request(&[("front", "vduse")]), false, true, true).is_err(), "a successor");
    }

    #[test]
    fn vduse_can_be_the_default_for_what_the_kernel_can_have() {
        let parse = |own_path, handover| taken(&mut request(&[]), own_path, handover, true).unwrap();
        assert_eq!(parse(false, false), Some(Bind::None));
        assert_eq!((parse(true, false), parse(false, true)), (None, None));
        let mut broker = AddRequest { mgmtdev: "vhost-vdpa".into(), ..request(&[]) };
        assert_eq!(taken(&mut broker, false, false, true).unwrap(), None);
        let bound = taken(&mut request(&[("bind", "virtio")]), false, false, true).unwrap();
        assert_eq!(bound, Some(Bind::Virtio));
    }

    #[test]
    fn what_was_asked_for_is_found_again_without_what_was_added() {
        let mut added = request(&[("front", "vduse"), ("bind", "vhost"), ("path", "/a")]);
        let bind = taken(&mut added, false, false, false).unwrap().unwrap();
        assert_eq!(added.attrs.get("pin"), Some("off"));
        let again = asked_for(added, bind);
        assert_eq!((again.attrs.get("front"), again.attrs.get("bind")), (Some("vduse"), Some("vhost")));
    }
}
