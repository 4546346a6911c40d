//! A device with its memory and its queues.
#![expect(unsafe_code, reason = "functions are exported by their names, and strings are those of C programs")]

use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use vdpa_client::Session;
use vdpa_client::device::{Device, Offered, Present};
use vdpa_client::features::{BackendFeatures, Features};
use vdpa_client::types::QueueIndex;
use vdpa_client::vhost_vdpa::VhostVdpaFd;

use crate::border::{Out, answer, array, descriptor, fill, lock, needed, optional_text, quietly, text};
use crate::failure::Failure;
use crate::failure::errno::{EBUSY, ENODEV, ERANGE};
use crate::log::{self, VDPA_LIVE_LOG_INFO};
use crate::memory::{specs, vdpa_live_region};
use crate::queue::{Given, event, vdpa_live_queue};

/// A device that this process drives. Calls on one session wait for each other.
#[derive(Debug)]
pub struct vdpa_live_session(pub(crate) Arc<Mutex<Place>>);

/// Where the device of a session is.
#[derive(Debug)]
pub(crate) enum Place {
    Here(Box<Session<VhostVdpaFd>>),
    /// With an update that has stopped it.
    Stopped,
    /// Not in this process any more, with the reason.
    Gone(String),
}

impl vdpa_live_session {
    pub(crate) fn new(session: Session<VhostVdpaFd>) -> Self {
        Self(Arc::new(Mutex::new(Place::Here(Box::new(session)))))
    }

    pub(crate) fn with<R>(
        &self,
        body: impl FnOnce(&mut Session<VhostVdpaFd>) -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        body(here(&mut lock(&self.0)?)?)
    }
}

/// The session at a place.
pub(crate) fn here<'a>(
    place: &'a mut MutexGuard<'_, Place>,
) -> Result<&'a mut Session<VhostVdpaFd>, Failure> {
    match &mut **place {
        Place::Here(session) => Ok(session),
        Place::Stopped => Err(Failure::new(
            EBUSY,
            "the device is stopped for an update: roll that back or release it first",
        )),
        Place::Gone(reason) => {
            Err(Failure::new(ENODEV, format!("the session has no device any more: {reason}")))
        }
    }
}

/// What a device offers, and what is in use.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_device_info {
    /// Virtio device id: 1 network, 2 block.
    pub device_id: u32,
    /// Number of virtqueues.
    pub queues: u32,
    /// Entries of the largest ring.
    pub queue_size_max: u32,
    /// Device features that it offers.
    pub offered_features: u64,
    /// Device features in use; 0 before negotiation.
    pub features: u64,
    /// Backend features (VHOST_BACKEND_F_) that it offers.
    pub offered_backend_features: u64,
    /// Backend features in use; 0 before negotiation.
    pub backend_features: u64,
    /// First I/O virtual address that it can use.
    pub iova_first: u64,
    /// Last I/O virtual address that it can use.
    pub iova_last: u64,
}

/// What somebody else has set up on a device.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_present {
    /// Device features that were negotiated.
    pub features: u64,
    /// Backend features that were acknowledged.
    pub backend_features: u64,
    /// Mappings that the device has.
    pub regions: *const vdpa_live_region,
    /// Number of regions.
    pub region_count: usize,
    /// Rings that the device has, with the events that it has for them. base and VDPA_LIVE_QUEUE_AT_BASE are ignored.
    pub queues: *const vdpa_live_queue,
    /// Number of queues.
    pub queue_count: usize,
}

fn info(offered: &Offered) -> vdpa_live_device_info {
    vdpa_live_device_info {
        device_id: offered.device_id,
        queues: offered.queues,
        queue_size_max: offered.queue_size_max.into(),
        offered_features: offered.features.0,
        features: 0,
        offered_backend_features: offered.backend_features.0,
        backend_features: 0,
        iova_first: offered.iova_range.first(),
        iova_last: offered.iova_range.last(),
    }
}

/// Tells what the device that is open as fd offers. Changes nothing; its owner may be another process.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_offered(
    fd: c_int,
    info: Option<&mut MaybeUninit<vdpa_live_device_info>>,
) -> c_int {
    answer(|| {
        let device = Device::<VhostVdpaFd>::from_fd(descriptor(fd, "fd")?)?;
        needed(info, "info")?.write(self::info(&device.offered()?));
        Ok(0)
    })
}

/// Opens a device file, becomes the owner and negotiates features: those of required, or -EOPNOTSUPP; those of wanted that the
/// device offers; and always VIRTIO_F_VERSION_1 and VIRTIO_F_ACCESS_PLATFORM. The device is reset. Then map memory, add queues and
/// call vdpa_live_start().
///
/// Close it with vdpa_live_close(). -EBUSY: another process, or this one, has the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_open(
    path: *const c_char,
    required: u64,
    wanted: u64,
    session: Option<&mut MaybeUninit<*mut vdpa_live_session>>,
) -> c_int {
    answer(|| {
        let out = Out::new(session, "session")?;
        // SAFETY: the caller gives a string or NULL.
        let path = unsafe { text(path, "path") }?;
        let session = Device::open(path)?.negotiate_required(Features(required), Features(wanted))?;
        tell("opened", &session);
        out.put(vdpa_live_session::new(session));
        Ok(0)
    })
}

/// As vdpa_live_open(), for a device that is open as fd. The library copies the descriptor; close the own one, since the device is
/// in use until all of them are closed. path may be NULL; then strategy VDPA_LIVE_REOPEN is not possible.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_from_fd(
    fd: c_int,
    path: *const c_char,
    required: u64,
    wanted: u64,
    session: Option<&mut MaybeUninit<*mut vdpa_live_session>>,
) -> c_int {
    answer(|| {
        let out = Out::new(session, "session")?;
        // SAFETY: the caller gives a string or NULL.
        let device = device(descriptor(fd, "fd")?, unsafe { optional_text(path, "path") }?)?;
        let session = device.negotiate_required(Features(required), Features(wanted))?;
        tell("opened", &session);
        out.put(vdpa_live_session::new(session));
        Ok(0)
    })
}

fn device(fd: OwnedFd, path: Option<&str>) -> Result<Device<VhostVdpaFd>, Failure> {
    let device = Device::from_fd(fd)?;
    Ok(match path {
        Some(path) => device.at(path),
        None => device,
    })
}

/// Makes a session of a device that this program has set up by other means, which runs or does not: for programs that keep their
/// code and want updates. Makes only requests that change nothing. fd and path as for vdpa_live_from_fd().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_assume(
    fd: c_int,
    path: *const c_char,
    present: Option<&vdpa_live_present>,
    session: Option<&mut MaybeUninit<*mut vdpa_live_session>>,
) -> c_int {
    answer(|| {
        let out = Out::new(session, "session")?;
        // SAFETY: the caller gives a string or NULL.
        let device = device(descriptor(fd, "fd")?, unsafe { optional_text(path, "path") }?)?;
        let present = needed(present, "present")?;
        let mut all = Present::new(Features(present.features), BackendFeatures(present.backend_features));
        // SAFETY: the caller gives as many regions as it says.
        for spec in unsafe { specs(present.regions, present.region_count) }? {
            all = all.region(spec);
        }
        // SAFETY: the caller gives as many queues as it says.
        for queue in unsafe { array(present.queues, present.queue_count, "queues") }? {
            let Given { index, ring, kick, call, enabled, .. } = Given::new(queue)?;
            all = all.guest_queue(index, ring, kick, call, enabled);
        }
        let session = device.assume(all)?;
        tell("assumed", &session);
        out.put(vdpa_live_session::new(session));
        Ok(0)
    })
}

fn tell(what: &str, session: &Session<VhostVdpaFd>) {
    let path = session.path().map_or_else(|| "of a descriptor".to_owned(), |path| path.display().to_string());
    let (features, backend) = (session.features().0, session.backend_features().0);
    log::write(
        VDPA_LIVE_LOG_INFO,
        &format!("device {path} {what}: features {features:#x}, backend features {backend:#x}"),
    );
}

/// Closes the device, which resets it and unmaps everything, and frees the session. After an update by which another process has
/// got the device it frees the session only. NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_close(session: Option<Box<vdpa_live_session>>) {
    quietly(|| {
        if let Some(session) = session {
            let mut place = session.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // A plan that has this session as well must not keep the device open.
            *place = Place::Gone("it was closed".to_owned());
        }
    });
}

/// Tells what the device offers and what is in use.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_session_info(
    session: Option<&vdpa_live_session>,
    info: Option<&mut MaybeUninit<vdpa_live_device_info>>,
) -> c_int {
    answer(|| {
        let info = needed(info, "info")?;
        let all = needed(session, "session")?.with(|session| {
            let copy = descriptor(session.as_raw_fd(), "the device")?;
            let mut all = self::info(&Device::<VhostVdpaFd>::from_fd(copy)?.offered()?);
            (all.features, all.backend_features) = (session.features().0, session.backend_features().0);
            Ok(all)
        })?;
        info.write(all);
        Ok(0)
    })
}

/// The descriptor of the device, for requests that this library does not have. It belongs to the session. What such requests
/// change is not carried over by an update.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_session_fd(session: Option<&vdpa_live_session>) -> c_int {
    answer(|| needed(session, "session")?.with(|session| Ok(session.as_raw_fd())))
}

/// Starts the device (DRIVER_OK).
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_start(session: Option<&vdpa_live_session>) -> c_int {
    answer(|| needed(session, "session")?.with(|session| Ok(session.start()?)).map(|()| 0))
}

/// Stops the device: when it returns, no request is in flight in it, and the vring bases stay. Blocks until requests in flight have
/// ended. -EOPNOTSUPP where the device does not offer it.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_suspend(session: Option<&vdpa_live_session>) -> c_int {
    answer(|| needed(session, "session")?.with(|session| Ok(session.suspend()?)).map(|()| 0))
}

/// Starts a suspended device again where it has stopped. -EOPNOTSUPP where the device does not offer it.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_resume(session: Option<&vdpa_live_session>) -> c_int {
    answer(|| needed(session, "session")?.with(|session| Ok(session.resume()?)).map(|()| 0))
}

/// Resets the device, as a guest does, and negotiates again: of wanted those features that the device offers. All queues are
/// removed, memory stays mapped, requests in flight are lost. Blocks while the device resets.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_reset(session: Option<&vdpa_live_session>, wanted: u64) -> c_int {
    answer(|| {
        let reset = |session: &mut Session<VhostVdpaFd>| {
            session.reset()?;
            Ok(session.renegotiate(Features(wanted))?)
        };
        needed(session, "session")?.with(reset).map(|()| 0)
    })
}

/// The status register of the device, 0 to 255.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_status(session: Option<&vdpa_live_session>) -> c_int {
    answer(|| needed(session, "session")?.with(|session| Ok(session.status()?.0.into())))
}

/// Sets *base to where the device goes on in a ring, as VHOST_GET_VRING_BASE gives it; exact while the device is suspended.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_vring_base(
    session: Option<&vdpa_live_session>,
    queue: u32,
    base: Option<&mut MaybeUninit<u32>>,
) -> c_int {
    answer(|| {
        let base = needed(base, "base")?;
        let index = index(queue)?;
        let state = needed(session, "session")?.with(|session| Ok(session.vring_base(index)?))?;
        base.write(state.encode());
        Ok(0)
    })
}

pub(crate) fn index(queue: u32) -> Result<QueueIndex, Failure> {
    u16::try_from(queue).map(QueueIndex).map_err(|_| {
        Failure::invalid(format!("queue {queue} cannot exist: queues are numbered from 0 to 65535"))
    })
}

/// Reads size bytes of the configuration space from offset on. -ERANGE beyond its end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_read_config(
    session: Option<&vdpa_live_session>,
    offset: u32,
    data: *mut c_void,
    size: usize,
) -> c_int {
    answer(|| {
        let config = needed(session, "session")?.with(|session| Ok(session.config()?))?;
        let begin = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = begin.checked_add(size).and_then(|end| config.get(begin..end)).ok_or_else(|| {
            let text = format!("the configuration space has {} bytes", config.len());
            Failure::new(ERANGE, format!("{text}; {size} from byte {offset} on are not among them"))
        })?;
        // SAFETY: the caller has room for `size` bytes, which is the length of the part.
        unsafe { fill(data.cast(), part, "data") }?;
        Ok(0)
    })
}

/// Writes size bytes to the configuration space from offset on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_write_config(
    session: Option<&vdpa_live_session>,
    offset: u32,
    data: *const c_void,
    size: usize,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives `size` bytes.
        let data = unsafe { array(data.cast(), size, "data") }?;
        needed(session, "session")?.with(|session| Ok(session.write_config(offset, data)?)).map(|()| 0)
    })
}

/// Has the device signal the eventfd when its configuration changes or it needs a reset; -1 ends that. The library copies the
/// descriptor. Call it again after an update.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_set_config_event(session: Option<&vdpa_live_session>, eventfd: c_int) -> c_int {
    answer(|| {
        let event = if eventfd == -1 { None } else { Some(event(eventfd, "eventfd")?) };
        needed(session, "session")?.with(|session| Ok(session.set_config_event(event.as_ref())?)).map(|()| 0)
    })
}
