//! [`VhostVdpaFile`]: the vhost-vdpa interface. It decodes ioctls and IOTLB messages and calls a [`Device`].
//!
//! It implements [`DeviceFile`], and so works with files by FUSE and by CUSE alike. "uapi-spec" is the specification of
//! vhost-vdpa's behaviour in Linux.

mod dirty;
#[cfg(fuzzing)]
pub mod fuzzing;
mod memory;
mod noted;
mod opens;
mod saved;
mod state;
mod update_history;
mod vring;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use vdpa_core::device::Device;
use vdpa_core::faults::{self, Fault};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::host::Caller as _;
use vdpa_core::parent::Parent;
use vdpa_core::types::{Asid, QueueIndex, Result, VringAddr, iotlb_type};
use vdpa_core::{Errno, device::IotlbError};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::process::{Caller, OwnerSpace, ProcessCaller, Spaces};
use vdpa_sys::uapi::dirty as uapi_dirty;
use vdpa_sys::uapi::live::{self, Numbers};
use vdpa_sys::uapi::report::UpdateReport;
use vdpa_sys::uapi::vhost as uapi;
use zerocopy::IntoBytes;

use crate::front::fuse::{Completed, DeviceFile, IoctlCall, IoctlReply, Opener};
use crate::rate::RateLimit;

use self::noted::Noted;
use self::opens::Opens;
pub use self::opens::{PendingSuccessor, SharedParent};
use self::saved::Saved;
pub use self::update_history::UpdateHistory;

/// The parent of a device, of any type.
pub type AnyParent = Box<dyn Parent<Host = LinuxHost>>;

/// A device as its file and the control side of a program share it. The lock is held during each request; hold it briefly.
pub type SharedDevice = Arc<Mutex<Device<AnyParent>>>;

/// Maximum length of a configuration request in bytes, more than any device has.
const CONFIG_MAX: u32 = 1 << 16;

/// A vhost-vdpa device file: the [`DeviceFile`] of a [`Device`].
///
/// A program makes one for each device and passes it to [`DeviceFiles::add`](crate::front::fuse::DeviceFiles::add). The
/// device's thread calls the `DeviceFile` methods. The control side of the program calls the others, on any thread; they do
/// not block, unless they have a `timeout`.
///
/// ```no_run
/// use std::sync::Arc;
/// use parking_lot::Mutex;
/// use vdpa_backend::front::fuse::{AddError, DeviceFiles};
/// use vdpa_backend::front::vhost::{AnyParent, VhostVdpaFile};
/// use vdpa_core::device::Device;
/// use vdpa_sys::process::Spaces;
///
/// fn add(files: &DeviceFiles, parent: AnyParent, spaces: &Spaces) -> Result<(), AddError> {
///     let device = Arc::new(Mutex::new(Device::new(parent)));
///     let file = VhostVdpaFile::new("vdpa0".into(), device, spaces.clone());
///     files.add("vdpa0", Arc::new(file)).map(drop)
/// }
/// ```
pub struct VhostVdpaFile {
    name: String,
    /// `None` when the device was revoked: requests fail with `ENODEV`, and its resources are free although a client may have
    /// the file open.
    device: Mutex<Option<SharedDevice>>,
    opens: Mutex<Opens>,
    spaces: Spaces,
    refusals: RateLimit,
    /// When the present owner became the owner.
    owned_since: Mutex<Option<SystemTime>>,
    updates: Mutex<UpdateHistory>,
    numbers: Numbers,
    /// The device was revoked while a client had it open; it is released when that client closes it.
    deleted: AtomicBool,
    /// The log has the warning that memory of the present owner is private.
    private_memory_logged: AtomicBool,
    /// Address space of the last process that was refused because it is not the owner. Such a process may be about to become
    /// the owner: its address space is looked up before, because the change of owner must be fast.
    last_refused: Mutex<Option<OwnerSpace>>,
    /// The previous owner, which is dropped after the reply to NEW_OWNER was sent, so that the client does not wait for it.
    previous_owner: Mutex<Option<OwnerSpace>>,
    saved: Saved,
    noted: Noted,
}

impl fmt::Debug for VhostVdpaFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostVdpaFile").field("name", &self.name).finish_non_exhaustive()
    }
}

impl VhostVdpaFile {
    /// A file for `device`, which is called `name` in the log. All files of a program share clones of `spaces`.
    #[must_use]
    pub fn new(name: String, device: SharedDevice, spaces: Spaces) -> Self {
        Self {
            name,
            device: Mutex::new(Some(device)),
            opens: Mutex::default(),
            spaces,
            refusals: RateLimit::per_second(5),
            owned_since: Mutex::new(None),
            updates: Mutex::default(),
            numbers: live::configured(),
            deleted: AtomicBool::new(false),
            private_memory_logged: AtomicBool::new(false),
            last_refused: Mutex::default(),
            previous_owner: Mutex::default(),
            saved: Saved::default(),
            noted: Noted::default(),
        }
    }

    /// Allows a successor to open the device while its predecessor has it open. The parent of the device must be the handle
    /// that `shared` names.
    #[must_use]
    pub fn with_handover(self, shared: Option<SharedParent>) -> Self {
        Self { opens: Mutex::new(Opens::new(shared)), ..self }
    }

    /// When the present owner became the owner; `None` without an owner.
    pub fn owned_since(&self) -> Option<SystemTime> {
        *self.owned_since.lock()
    }

    /// The history of the device's owners and updates since the file was made.
    pub fn updates(&self) -> UpdateHistory {
        self.updates.lock().clone()
    }

    /// `VDPA_LIVE_REPORT`: records the owner's report of an update. The device does not depend on it.
    fn report(&self, call: &IoctlCall<'_>) -> Result<IoctlReply> {
        let report: UpdateReport = wire::argument(call.input)?;
        report.check()?;
        tracing::info!(
            device = %self.name,
            tid = call.tid,
            outcome = report.outcome,
            total_us = report.total / 1000,
            "update reported"
        );
        self.change_history(|history| history.reported(report));
        Ok(IoctlReply::default())
    }

    fn log_owner(&self, space: Option<&OwnerSpace>, how: &str) {
        *self.owned_since.lock() = Some(SystemTime::now());
        self.private_memory_logged.store(false, Ordering::Relaxed);
        let pid = space.map(OwnerSpace::pid);
        tracing::info!(device = %self.name, pid, "{how}");
    }

    /// Looks up the address space of a process that was refused because it is not the owner.
    fn remember_refused(&self, device: &Device<AnyParent>, last_refused: &ProcessCaller<'_>) {
        if device.owner().is_some() && device.backend_features().has(BackendFeatures::NEW_OWNER) {
            // A process whose address space cannot be read gets its error from a later request.
            *self.last_refused.lock() = last_refused.address_space().ok();
        }
    }

    fn log_refusal(&self, tid: u32, asid: Asid, error: &IotlbError) {
        if let Some(suppressed) = self.refusals.allow() {
            tracing::warn!(device = %self.name, tid, %asid, suppressed, "IOTLB message refused: {error}");
        }
    }

    /// Duplicates an eventfd of the caller (`pidfd_getfd(2)`); `None` for -1.
    fn event(caller: &Caller, fd: i32) -> Result<Option<EventFd>> {
        if fd == uapi::VHOST_FILE_UNBIND && !faults::is(Fault::UnbindRefused) {
            return Ok(None);
        }
        if fd < 0 {
            return Err(Errno::BADF);
        }
        EventFd::from_peer(caller.get_fd(fd)?).map(Some).map_err(|_| Errno::INVAL)
    }

    fn get_config(&self, device: &mut Device<AnyParent>, call: &IoctlCall<'_>) -> Result<IoctlReply> {
        // The request is _IOR, so the kernel copies nothing in and the header is read from the caller's memory. The reply is
        // empty, to leave the caller's header unchanged.
        let caller = process(call.tid)?;
        let mut header = uapi::ConfigHeader::default();
        caller.read_mem(call.arg, header.as_mut_bytes())?;
        let len = self.config_len(device, header)?;
        let mut data = vec![0; len];
        device.config(header.off, &mut data)?;
        caller.write_mem(call.arg.checked_add(8).ok_or(Errno::FAULT)?, &data)?;
        Ok(IoctlReply::default())
    }

    fn set_config(&self, device: &mut Device<AnyParent>, call: &IoctlCall<'_>) -> Result<IoctlReply> {
        let header: uapi::ConfigHeader = wire::argument(call.input)?;
        let mut data = vec![0; self.config_len(device, header)?];
        process(call.tid)?.read_mem(call.arg.checked_add(8).ok_or(Errno::FAULT)?, &mut data)?;
        device.set_config(header.off, &data)?;
        Ok(IoctlReply::default())
    }

    /// Checks a configuration request before anything of its size is allocated.
    fn config_len(&self, device: &Device<AnyParent>, header: uapi::ConfigHeader) -> Result<usize> {
        let len = usize::try_from(header.len.min(CONFIG_MAX)).map_err(|_| Errno::INVAL)?;
        device.check_config(header.off, len)?;
        Ok(len)
    }

    /// Requests that need no owner (uapi-spec 1.1, step 2).
    fn handle_ownerless(
        &self,
        device: &mut Device<AnyParent>,
        call: &IoctlCall<'_>,
    ) -> Option<Result<IoctlReply>> {
        let profile = device.profile();
        let word = || wire::argument::<u64>(call.input);
        Some(match call.cmd {
            uapi::VHOST_GET_FEATURES => reply(&profile.offered_features().0),
            uapi::VHOST_SET_FEATURES => match word() {
                // The kernel checks the state before the argument. FUSE does not pass on such a request.
                Err(_) if device.status().contains(Status::FEATURES_OK) => Err(Errno::BUSY),
                word => word.and_then(|word| done(device.set_features(Features(word)))),
            },
            uapi::VHOST_GET_BACKEND_FEATURES => {
                reply(&self.numbers.features_to_wire(device.backend_features()))
            }
            uapi::VHOST_SET_BACKEND_FEATURES => {
                let features = word().map(|word| self.numbers.features_from_wire(word));
                features.and_then(|features| done(device.set_backend_features(features)))
            }
            uapi::VHOST_SET_LOG_BASE | uapi::VHOST_SET_LOG_FD if !profile.vhost_log => Err(Errno::NOTTY),
            uapi::VHOST_VDPA_GET_DEVICE_ID => reply(&profile.device_id),
            uapi::VHOST_VDPA_GET_STATUS => reply(&device.status().0),
            uapi::VHOST_VDPA_SET_STATUS => {
                wire::argument::<u8>(call.input).and_then(|status| done(device.set_status(Status(status))))
            }
            uapi::VHOST_VDPA_GET_CONFIG => self.get_config(device, call),
            uapi::VHOST_VDPA_SET_CONFIG => self.set_config(device, call),
            uapi::VHOST_VDPA_SET_CONFIG_CALL => wire::argument::<i32>(call.input)
                .and_then(|fd| Self::event(&process(call.tid)?, fd))
                .map(|event| {
                    device.set_config_call(event);
                    IoctlReply::default()
                }),
            uapi::VHOST_VDPA_GET_VRING_NUM => reply(&profile.queue_size_max),
            uapi::VHOST_VDPA_GET_IOVA_RANGE => {
                let range = profile.iova_range;
                reply(&uapi::IovaRange { first: range.first(), last: range.last() })
            }
            uapi::VHOST_VDPA_GET_CONFIG_SIZE => reply(&profile.config_size),
            uapi::VHOST_VDPA_GET_VQS_COUNT => reply(&u32::from(profile.queues)),
            uapi::VHOST_VDPA_GET_GROUP_NUM => reply(&profile.groups),
            uapi::VHOST_VDPA_GET_AS_NUM => reply(&profile.address_spaces),
            uapi::VHOST_SET_FORK_FROM_OWNER => {
                wire::argument::<u8>(call.input).and_then(|value| done(device.set_fork_from_owner(value)))
            }
            uapi::VHOST_GET_FORK_FROM_OWNER => reply(&device.fork_from_owner()),
            uapi::VHOST_VDPA_SUSPEND if faults::is(Fault::DeadlySuspend) => std::process::abort(),
            uapi::VHOST_VDPA_SUSPEND => done(device.suspend()),
            uapi::VHOST_VDPA_RESUME => done(device.resume()),
            request => match dirty::request(device, self.numbers.dirty_request(request)) {
                Some(uapi_dirty::Request::Info) => {
                    process(call.tid).and_then(|process| dirty::info(device, call, &process))
                }
                _ => return None,
            },
        })
    }

    /// The generic vhost requests, then the owner check, then the vring requests (uapi-spec 1.1, steps 3 and 4).
    fn handle_owned(&self, device: &mut Device<AnyParent>, call: &IoctlCall<'_>) -> Result<IoctlReply> {
        let process = process(call.tid)?;
        let caller = ProcessCaller { caller: &process, spaces: &self.spaces };
        match call.cmd {
            uapi::VHOST_SET_OWNER => {
                device.set_owner(&caller)?;
                self.log_owner(device.owner(), "owner set");
                return Ok(IoctlReply::default());
            }
            request if request == self.numbers.new_owner => {
                let before = device.owner().cloned();
                device.new_owner(&caller)?;
                *self.previous_owner.lock() = before;
                self.last_refused.lock().take();
                self.log_owner(device.owner(), "owner changed");
                self.change_history(UpdateHistory::owner_changed);
                return Ok(IoctlReply::default());
            }
            // Where it is not supported it is handled like an unknown request, as in the kernel.
            uapi::VHOST_RESET_OWNER if device.profile().reset_owner => {
                device.reset_owner(&caller)?;
                device.dirty_forget();
                *self.owned_since.lock() = None;
                tracing::info!(device = %self.name, tid = call.tid, "owner reset");
                return Ok(IoctlReply::default());
            }
            _ if faults::is(Fault::IndexBeforeOwner) => drop(self.vring_index(device, call, &caller)?),
            _ => device.check_owner(&caller).inspect_err(|_| self.remember_refused(device, &caller))?,
        }
        if call.cmd == self.numbers.report_request() {
            return self.report(call);
        }
        if let Some(request) = dirty::request(device, self.numbers.dirty_request(call.cmd)) {
            return dirty::owned(device, call, &caller, request, self.saved.unique());
        }
        if let Some(request) = state::request(device, self.numbers.state_request(call.cmd)) {
            return state::owned(device, call, &caller, (&self.name, request));
        }
        match call.cmd {
            uapi::VHOST_SET_MEM_TABLE => return self.set_mem_table(device, call, &caller),
            uapi::VHOST_SET_LOG_BASE if device.profile().vhost_log => {
                return self.set_log_base(device, call, &caller);
            }
            uapi::VHOST_SET_LOG_FD if device.profile().vhost_log => {
                let fd: i32 = wire::argument(call.input)?;
                let event = Self::event(caller.caller, fd)?;
                return done(device.set_log_event(&caller, event));
            }
            _ => {}
        }
        let index = self.vring_index(device, call, &caller)?;
        match call.cmd {
            uapi::VHOST_SET_VRING_ADDR => {
                let addr: uapi::VringAddr = wire::argument(call.input)?;
                let addr = VringAddr {
                    flags: addr.flags,
                    desc: addr.desc_user_addr,
                    used: addr.used_user_addr,
                    avail: addr.avail_user_addr,
                    log: addr.log_guest_addr,
                };
                done(device.set_vring_addr(&caller, index, &addr))
            }
            uapi::VHOST_SET_VRING_KICK | uapi::VHOST_SET_VRING_CALL | uapi::VHOST_SET_VRING_ERR => {
                let file: uapi::VringFile = wire::argument(call.input)?;
                let event = Self::event(caller.caller, file.fd)?;
                done(match call.cmd {
                    uapi::VHOST_SET_VRING_KICK => device.set_vring_kick(&caller, index, event),
                    uapi::VHOST_SET_VRING_CALL => device.set_vring_call(&caller, index, event),
                    _ => device.set_vring_err(&caller, index, event),
                })
            }
            _ => vring::state(device, call, &caller, index),
        }
    }

    /// The first word of the argument as a queue index, for every request that gets here, known or not: `EFAULT` when it cannot
    /// be read, then `ENOBUFS` when there is no such queue.
    fn vring_index(
        &self,
        device: &Device<AnyParent>,
        call: &IoctlCall<'_>,
        caller: &ProcessCaller<'_>,
    ) -> Result<QueueIndex> {
        let index = match call.input.first_chunk::<4>() {
            Some(word) => u32::from_ne_bytes(*word),
            None => {
                let mut word = [0; 4];
                caller.caller.read_mem(call.arg, &mut word)?;
                u32::from_ne_bytes(word)
            }
        };
        u16::try_from(index)
            .ok()
            .filter(|index| *index < device.profile().queues)
            .map(QueueIndex)
            .ok_or(Errno::NOBUFS)
    }
}

fn reply(value: &(impl IntoBytes + zerocopy::Immutable)) -> Result<IoctlReply> {
    Ok(IoctlReply::data(value.as_bytes()))
}

fn done(result: Result<()>) -> Result<IoctlReply> {
    result.map(|()| IoctlReply::default())
}

/// The thread that has made a request.
fn process(tid: u32) -> Result<Caller> {
    Caller::new(i32::try_from(tid).unwrap_or(0))
}

impl DeviceFile for VhostVdpaFile {
    fn open(&self, opener: &Opener) -> Result<()> {
        let result = self.open_as(opener);
        self.save(result.is_ok().then_some(Completed::Open { handle: opener.handle }));
        result
    }

    fn release(&self, handle: u64) {
        self.close(handle);
        self.save(Some(Completed::Release));
    }

    fn begin_request(&self, unique: u64, resent: bool) -> Option<Completed> {
        self.saved.begin(unique, resent)
    }

    fn may_begin(&self, unique: u64, resent: bool) -> bool {
        self.noted.begin(unique, resent)
    }

    fn request_ended(&self) {
        self.noted.end();
    }

    fn ioctl(&self, call: &IoctlCall<'_>) -> Result<IoctlReply> {
        let result = self.with_open(call.handle, |device| match self.handle_ownerless(device, call) {
            Some(result) => result,
            None => self.handle_owned(device, call),
        });
        tracing::trace!(
            device = %self.name,
            tid = call.tid,
            request = uapi::request_name(call.cmd).unwrap_or("?"),
            number = format_args!("{:#x}", call.cmd),
            ?result,
        );
        self.save(result.as_ref().ok().cloned().map(Completed::Ioctl));
        result
    }

    fn after_reply(&self) {
        drop(self.previous_owner.lock().take());
    }

    fn write(&self, handle: u64, tid: u32, data: &[u8]) -> Result<u32> {
        let result = self.with_open(handle, |device| {
            let (asid, mut msg) = wire::iotlb_message(data, device.acked_backend_features())?;
            msg.kind = self.numbers.message_from_wire(msg.kind);
            let process = process(tid)?;
            let caller = ProcessCaller { caller: &process, spaces: &self.spaces };
            let result = device.iotlb(&caller, asid, &msg);
            tracing::trace!(device = %self.name, tid, %asid, ?msg, ?result, "IOTLB");
            if result.is_ok() && msg.kind == iotlb_type::UPDATE {
                self.warn_private_memory(device, tid, asid, &msg);
            }
            result.map(|()| wire::MESSAGE_SIZE).map_err(|error| {
                self.log_refusal(tid, asid, &error);
                error.errno()
            })
        });
        self.save(result.ok().map(Completed::Write));
        result
    }
}
