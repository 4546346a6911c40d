//! VDUSE: a device that the kernel has on its vdpa bus, for its own drivers (`virtio_vdpa`: a real `/dev/vdX`) and for `vhost_vdpa` (uapi-spec
//! 6.4).
//!
//! A [`VduseFront`] makes the device, and answers what the kernel wants of it on a thread of its own, which is the only client of the
//! [`Device`]. Requests on rings do not pass that thread: kicks are eventfds that the kernel signals, and
//! interrupts are raised by the worker that serves the queue. To put the device on the bus is netlink, and not here.
//!
//! | The kernel's message | What the device does |
//! |---|---|
//! | `SET_STATUS` | negotiation; with DRIVER_OK it reads rings and mappings and starts; with 0 it is reset and forgets the mappings |
//! | `UPDATE_IOTLB` | forgets the mappings of the address space, then reads them anew if it runs |
//! | `GET_VQ_STATE`, `SET_VQ_READY`, `SET_VQ_GROUP_ASID`, `SUSPEND` | as the request of vhost-vdpa |
//!
//! # After this process
//!
//! The kernel keeps the device when this process ends, with what the driver has set, and has the messages that were not answered
//! read again by the next process. [`VduseFront::adopt`] goes on from there, with the in-flight logs of the queues and a [`KeptState`]. The open
//! file must not be held by anybody else: messages that were read come again when it is closed, and only then.

mod memory;
mod serve;
mod shape;
mod state;

use std::io;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::parent::Profile;
use vdpa_core::types::QueueIndex;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uapi::vduse::{DevConfig, VqConfig, feature};
use vdpa_sys::vduse::{Control, VduseDevice};

use self::serve::Server;
use self::shape::Shape;
use crate::front::vhost::{AnyParent, SharedDevice};

pub use self::state::KeptState;

/// How long the device may still be open by a process that ends.
const OPEN_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a device is not one of VDUSE.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VduseError {
    /// The kernel has no VDUSE.
    #[error("/dev/vduse/control cannot be opened: {errno}")]
    Control {
        /// The reason; `ENOENT` without the module.
        errno: Errno,
    },
    /// A device of that kind cannot be served in this way.
    #[error("{what}")]
    Unsuitable {
        /// Why not.
        what: &'static str,
    },
    /// There is one of that name in the kernel.
    #[error("the kernel has a VDUSE device {name} already, which a program has left or serves")]
    Exists {
        /// The name.
        name: String,
    },
    /// The kernel refuses a request.
    #[error("{request}: {errno}")]
    Request {
        /// What was asked.
        request: &'static str,
        /// The reason.
        errno: Errno,
    },
    /// The thread did not start.
    #[error("no thread for the kernel's messages: {0}")]
    Thread(#[source] io::Error),
}

impl VduseError {
    /// Its error number.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Control { errno } | Self::Request { errno, .. } => *errno,
            Self::Unsuitable { .. } => Errno::OPNOTSUPP,
            Self::Exists { .. } => Errno::EXIST,
            Self::Thread(error) => Errno::from_raw(error.raw_os_error().unwrap_or(5)),
        }
    }
}

/// The file that all devices are made with, and the newest version of the interface that the kernel and this program have.
fn control() -> Result<(Control, u64), VduseError> {
    let control = Control::open().map_err(|errno| VduseError::Control { errno })?;
    let version = control.api_version().map_err(asked("VDUSE_GET_API_VERSION"))?;
    Ok((control, version.min(1)))
}

fn asked(request: &'static str) -> impl Fn(Errno) -> VduseError {
    move |errno| VduseError::Request { request, errno }
}

/// A device of VDUSE that this process serves. Dropping it ends the service; the kernel keeps the device until it is
/// [destroyed](Self::destroy).
#[derive(Debug)]
pub struct VduseFront {
    name: String,
    device: SharedDevice,
    shape: Shape,
    state: KeptState,
    /// `None` while it is not served.
    service: Mutex<Option<Service>>,
}

/// The thread that answers.
#[derive(Debug)]
struct Service {
    stop: EventFd,
    thread: JoinHandle<()>,
}

impl VduseFront {
    /// Makes a VDUSE device called `name` for `device`, which nobody has open, and serves it. It is not on the bus. A device of that
    /// name that nobody has open and that is not on the bus is a former program's, and is replaced. `state` is where the next
    /// process finds what this one knows, and is zero.
    ///
    /// # Errors
    /// [`VduseError`].
    pub fn create(name: &str, device: SharedDevice, state: KeptState) -> Result<Self, VduseError> {
        let profile = device.lock().profile().clone();
        let shape = Shape::of(&profile)?;
        let (control, version) = control()?;
        control.set_api_version(version).map_err(asked("VDUSE_SET_API_VERSION"))?;
        if let Ok(known) = control.features() {
            let suspend = if profile.suspend { feature::SUSPEND } else { 0 };
            let wanted = known & (feature::QUEUE_READY | suspend);
            control.set_features(wanted).map_err(asked("VDUSE_SET_FEATURES"))?;
        }
        let mut space = vec![0; profile.config_size as usize];
        device.lock().peek_config(0, &mut space).map_err(asked("the configuration space"))?;
        let config = config(name, &profile, &shape, version);
        let mut created = control.create(config, &space);
        if created == Err(Errno::EXIST) && control.destroy(name).is_ok() {
            tracing::warn!(device = name, "a VDUSE device of that name was left behind, and is replaced");
            created = control.create(config, &space);
        }
        created.map_err(|errno| match errno {
            Errno::EXIST => VduseError::Exists { name: name.into() },
            errno => VduseError::Request { request: "VDUSE_CREATE_DEV", errno },
        })?;
        let served = set_up(name, &profile, &shape, version).and_then(|vduse| {
            let front = Self { name: name.into(), device, shape, state, service: Mutex::default() };
            front.serve(vduse, version, true).map(|()| front)
        });
        served.inspect_err(|_| {
            let _ = control.destroy(name);
        })
    }

    /// Serves the VDUSE device that another process has made and does not serve any more, from where that was: `device` is the same
    /// device, which nobody has open, on in-flight logs of that process. Blocks while that process ends.
    ///
    /// # Errors
    /// [`VduseError`]; with `EBUSY` when another process has it open.
    pub fn adopt(name: &str, device: SharedDevice, state: KeptState) -> Result<Self, VduseError> {
        let shape = Shape::of(device.lock().profile())?;
        let front = Self { name: name.into(), device, shape, state, service: Mutex::default() };
        front.reopen(true)?;
        Ok(front)
    }

    /// Ends the service for now: no message is answered, and the open file is closed, so that another process can go on. Queues run
    /// on, without interrupts. Blocks for a message in progress.
    pub fn pause(&self) {
        let Some(Service { stop, thread }) = self.service.lock().take() else { return };
        stop.signal();
        if thread.join().is_err() {
            tracing::error!(device = %self.name, "the thread for the kernel's messages had panicked");
        }
    }

    /// Goes on after [`pause`](Self::pause), when no other process has.
    ///
    /// # Errors
    /// [`VduseError`].
    pub fn unpause(&self) -> Result<(), VduseError> {
        if self.service.lock().is_some() {
            return Ok(());
        }
        self.reopen(false)
    }

    /// Ends the service and the device. It must not be on the bus.
    ///
    /// # Errors
    /// [`VduseError`]; with `EBUSY` for a device on the bus, which nobody serves then.
    pub fn destroy(&self) -> Result<(), VduseError> {
        self.pause();
        self.device.lock().release();
        let control = Control::open().map_err(|errno| VduseError::Control { errno })?;
        control.destroy(&self.name).map_err(asked("VDUSE_DESTROY_DEV"))
    }

    /// The file by which a program serves it.
    #[must_use]
    pub fn path(name: &str) -> PathBuf {
        PathBuf::from("/dev/vduse").join(name)
    }

    fn reopen(&self, fresh: bool) -> Result<(), VduseError> {
        let (_, version) = control()?;
        let vduse = open(&self.name)?;
        self.serve(vduse, version, fresh)
    }

    /// Starts the thread. `fresh`: the device in this process has not been told anything.
    fn serve(&self, vduse: VduseDevice, version: u64, fresh: bool) -> Result<(), VduseError> {
        let stop = EventFd::new().map_err(asked("an eventfd"))?;
        let server = Server::new(&self.name, vduse, version, &self.device, self.shape, self.state.clone());
        let mut server = server.map_err(asked("the device"))?;
        server.take_up(fresh).map_err(asked("to go on"))?;
        let end = stop.clone();
        let thread = std::thread::Builder::new().name("vduse".into()).spawn(move || server.run(&end));
        *self.service.lock() = Some(Service { stop, thread: thread.map_err(VduseError::Thread)? });
        Ok(())
    }
}

impl Drop for VduseFront {
    fn drop(&mut self) {
        self.pause();
    }
}

/// The device as the kernel is told.
fn config(name: &str, profile: &Profile, shape: &Shape, version: u64) -> DevConfig {
    let Shape { features, queues, groups, address_spaces } = *shape;
    let config = DevConfig::new(name, profile.device_id, features.0, queues.into(), version);
    let (ngroups, nas) = if version == 0 { (0, 0) } else { (groups, address_spaces) };
    DevConfig { vendor_id: profile.vendor_id, ngroups, nas, ..config }
}

fn set_up(name: &str, profile: &Profile, shape: &Shape, version: u64) -> Result<VduseDevice, VduseError> {
    let vduse = open(name)?;
    for index in 0..shape.queues {
        let group = if version == 0 { 0 } else { profile.group_of(QueueIndex(index)).0 };
        let queue =
            VqConfig { index: index.into(), max_size: profile.queue_size_max, group, ..VqConfig::default() };
        vduse.setup_queue(&queue).map_err(asked("VDUSE_VQ_SETUP"))?;
    }
    Ok(vduse)
}

/// Opens the device when it is there (udev may be slow) and nobody has it open any more.
fn open(name: &str) -> Result<VduseDevice, VduseError> {
    let end = Instant::now() + OPEN_TIMEOUT;
    loop {
        match VduseDevice::open(name) {
            Err(Errno::BUSY | Errno::NOENT) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result.map_err(asked("open")),
        }
    }
}

/// The device behind a front end, with the lock held.
type Locked<'a> = parking_lot::MutexGuard<'a, Device<AnyParent>>;
