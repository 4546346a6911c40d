//! A vhost-vdpa device file, of the kernel or of this project, as [`VdpaOps`].
//!
//! A device reads and writes mapped memory outside the rules of the language, as a debugger does. So only memory that was made to
//! be shared with a device can be mapped writable: [`SharedMap`](crate::mmap::SharedMap). UPDATE and REMAP of other memory are
//! refused with `EFAULT` before the device sees them. What is mapped is kept until the device does not have it any more.
#![expect(
    unsafe_code,
    reason = "binds ioctl numbers to their arguments; raw requests for the conformance suite"
)]

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyInfo, DirtyRange};
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, IovaRange, QueueIndex, Result, VringAddr};
use zerocopy::IntoBytes;

use crate::dma::{self, Kept, Permission};
use crate::errno;
use crate::eventfd::EventFd;
use crate::fence::Fence;
use crate::ioctl::{self, Getter, NoArg, Setter, Updater};
use crate::uapi::live::{self, Numbers};
use crate::uapi::report::UpdateReport;
use crate::uapi::vhost as uapi;

mod dirty;
mod message;
mod named;
mod open_error;
mod state;

use self::message::{decode_iotlb, encode_iotlb, is_other_vhost};
pub use self::open_error::OpenError;

macro_rules! requests {
    ($($name:ident: $kind:ident $(<$argument:ty>)? = $number:ident;)*) => {
        $(
            // SAFETY: the vhost core and vhost-vdpa access exactly the argument of this number (uapi-spec 1.3);
            // a descriptor of another kind of file rejects the number, whose type byte is vhost's.
            const $name: $kind$(<$argument>)? = unsafe { $kind::new(uapi::$number) };
        )*
    };
}

requests! {
    GET_FEATURES: Getter<u64> = VHOST_GET_FEATURES;
    SET_FEATURES: Setter<u64> = VHOST_SET_FEATURES;
    GET_BACKEND_FEATURES: Getter<u64> = VHOST_GET_BACKEND_FEATURES;
    SET_BACKEND_FEATURES: Setter<u64> = VHOST_SET_BACKEND_FEATURES;
    SET_OWNER: NoArg = VHOST_SET_OWNER;
    RESET_OWNER: NoArg = VHOST_RESET_OWNER;
    SET_VRING_NUM: Setter<uapi::VringState> = VHOST_SET_VRING_NUM;
    SET_VRING_ADDR: Setter<uapi::VringAddr> = VHOST_SET_VRING_ADDR;
    SET_VRING_BASE: Setter<uapi::VringState> = VHOST_SET_VRING_BASE;
    GET_VRING_BASE: Updater<uapi::VringState> = VHOST_GET_VRING_BASE;
    SET_VRING_KICK: Setter<uapi::VringFile> = VHOST_SET_VRING_KICK;
    SET_VRING_CALL: Setter<uapi::VringFile> = VHOST_SET_VRING_CALL;
    SET_VRING_ERR: Setter<uapi::VringFile> = VHOST_SET_VRING_ERR;
    GET_DEVICE_ID: Getter<u32> = VHOST_VDPA_GET_DEVICE_ID;
    GET_STATUS: Getter<u8> = VHOST_VDPA_GET_STATUS;
    SET_STATUS: Setter<u8> = VHOST_VDPA_SET_STATUS;
    SET_VRING_ENABLE: Setter<uapi::VringState> = VHOST_VDPA_SET_VRING_ENABLE;
    GET_VRING_NUM: Getter<u16> = VHOST_VDPA_GET_VRING_NUM;
    SET_CONFIG_CALL: Setter<i32> = VHOST_VDPA_SET_CONFIG_CALL;
    GET_IOVA_RANGE: Getter<uapi::IovaRange> = VHOST_VDPA_GET_IOVA_RANGE;
    GET_CONFIG_SIZE: Getter<u32> = VHOST_VDPA_GET_CONFIG_SIZE;
    GET_AS_NUM: Getter<u32> = VHOST_VDPA_GET_AS_NUM;
    GET_VRING_GROUP: Updater<uapi::VringState> = VHOST_VDPA_GET_VRING_GROUP;
    SET_GROUP_ASID: Setter<uapi::VringState> = VHOST_VDPA_SET_GROUP_ASID;
    SUSPEND: NoArg = VHOST_VDPA_SUSPEND;
    RESUME: NoArg = VHOST_VDPA_RESUME;
    GET_VQS_COUNT: Getter<u32> = VHOST_VDPA_GET_VQS_COUNT;
    GET_GROUP_NUM: Getter<u32> = VHOST_VDPA_GET_GROUP_NUM;
    GET_VRING_SIZE: Updater<uapi::VringState> = VHOST_VDPA_GET_VRING_SIZE;
    GET_VRING_DESC_GROUP: Updater<uapi::VringState> = VHOST_VDPA_GET_VRING_DESC_GROUP;
}

/// What a successful write of an IOTLB message returns (uapi-spec 2.2).
const MSG_SIZE: usize = size_of::<uapi::MsgV2>();
const CONFIG_HEADER: usize = size_of::<uapi::ConfigHeader>();
/// The last page of the address space, which belongs to the kernel.
const BAD_POINTER: usize = usize::MAX & !0xfff;

/// The argument of a raw request.
#[derive(Debug)]
pub enum RawArg<'a> {
    /// A null pointer.
    Null,
    /// An integer in place of a pointer. Below 64 KiB, where nothing can be mapped; larger ones are cut to that.
    Int(usize),
    /// A buffer of any length, passed as a copy with nothing mapped after it.
    Bytes(&'a mut [u8]),
    /// An address at which nothing is mapped.
    BadPointer,
}

/// An open vhost-vdpa device.
#[derive(Debug)]
pub struct VhostVdpaFd {
    fd: OwnedFd,
    /// Backend features acknowledged through this value: decides the version of IOTLB messages.
    acknowledged: AtomicU64,
    numbers: Numbers,
    /// Memory that was mapped through this value.
    kept: Mutex<Kept>,
    /// Whether it is a vhost device of another kind, which takes addresses of this process where vhost-vdpa does not.
    other_vhost: bool,
}

impl VhostVdpaFd {
    /// Opens a device file for reading and writing, closed on exec. May block while the device is busy.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
        opened.map(|file| Self::from_fd(file.into())).map_err(|error| {
            let path = path.to_path_buf();
            match errno::from_io(error) {
                Errno::NOENT => OpenError::NotFound { path },
                Errno::BUSY => OpenError::Busy { path },
                Errno::ACCESS | Errno::PERM => OpenError::Denied { path },
                errno @ (errno::NXIO | Errno::NODEV) => OpenError::Gone { path, errno },
                errno if errno.raw() == libc::ENOTCONN => OpenError::Gone { path, errno },
                errno => OpenError::Other { path, errno },
            }
        })
    }

    /// Adopts a descriptor, inherited or received. No backend feature counts as acknowledged:
    /// see [`set_acknowledged`](Self::set_acknowledged). Requests to a file of another kind fail, those to another vhost device
    /// (`/dev/vhost-net`) too.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        let other_vhost = is_other_vhost(&fd);
        let kept = Mutex::default();
        Self { fd, acknowledged: AtomicU64::new(0), numbers: live::configured(), kept, other_vhost }
    }

    /// Uses other live-update numbers than [`live::configured`].
    ///
    /// # Errors
    /// [`live::NumbersError::Taken`].
    pub fn with_live_numbers(self, numbers: Numbers) -> Result<Self, live::NumbersError> {
        Ok(Self { numbers: numbers.check()?, ..self })
    }

    /// Backend features acknowledged through this value, or declared to be.
    #[must_use]
    pub fn acknowledged(&self) -> BackendFeatures {
        BackendFeatures(self.acknowledged.load(Ordering::Relaxed))
    }

    /// Sets the backend features that were acknowledged on the descriptor before it was adopted. No request can query them.
    pub fn set_acknowledged(&self, features: BackendFeatures) {
        self.acknowledged.store(features.0, Ordering::Relaxed);
    }

    /// Any request with any argument; returns the value of ioctl(2). For tests of devices.
    ///
    /// A buffer is passed as a copy at the end of mapped memory, so a device that reads or writes beyond it, for example because
    /// of a length in it, gets `EFAULT`.
    ///
    /// # Errors
    /// What the device reports; `ENOMEM` when there is no memory for the copy; `EFAULT` for a bitmap, a log or a region of a memory
    /// table that is not in memory of a [`SharedMap`](crate::mmap::SharedMap).
    pub fn raw_ioctl(&self, cmd: u32, arg: RawArg<'_>) -> Result<i32> {
        self.check_kind()?;
        let address = match arg {
            RawArg::Null => 0,
            RawArg::Int(value) => value & 0xffff,
            RawArg::BadPointer => BAD_POINTER,
            RawArg::Bytes(bytes) => {
                let named = named::named(cmd, self.numbers.dirty_request(cmd), bytes).ok_or(Errno::FAULT)?;
                if !state::is_harmless(self.numbers.state_request(cmd), bytes) {
                    return Err(Errno::FAULT);
                }
                let fence = Fence::new(bytes)?;
                // SAFETY: a vhost-vdpa device accesses only memory from its argument upward, and that is the
                // copy in `fence` and nothing after it. Memory that the argument names was checked, and is kept.
                let result = unsafe { ioctl::call(&self.fd, cmd, fence.start()) };
                fence.copy_out(bytes);
                if result.is_ok() {
                    self.kept.lock().accepted_named(named);
                }
                return result;
            }
        };
        // SAFETY: at this address nothing can be mapped, so the device can access nothing.
        unsafe { ioctl::call(&self.fd, cmd, address) }
    }

    /// Writes any bytes to the device; returns how many it took. For tests of devices.
    ///
    /// # Errors
    /// What the device reports; `EFAULT` for a message that lets it write memory other than that of a
    /// [`SharedMap`](crate::mmap::SharedMap).
    pub fn raw_write(&self, bytes: &[u8]) -> Result<usize> {
        let (asid, message) = decode_iotlb(bytes);
        let message = IotlbMsg { kind: self.numbers.message_from_wire(message.kind), ..message };
        let mut kept = self.kept.lock();
        let permission = match dma::check(&message) {
            Permission::Refused => return Err(Errno::FAULT),
            permission => permission,
        };
        let written = loop {
            match rustix::io::write(&self.fd, bytes) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result.map_err(errno::from_rustix)?,
            }
        };
        kept.accepted(asid, &message, permission);
        Ok(written)
    }

    fn check_kind(&self) -> Result<()> {
        if self.other_vhost { Err(Errno::NOTTY) } else { Ok(()) }
    }

    /// Reports the times of an update to the server of the device. May block, like every request.
    ///
    /// # Errors
    /// `ENOTTY` from a server without this request, such as the kernel; `EPERM` unless this process is the owner;
    /// `EINVAL` for an invalid report.
    pub fn report_update(&self, report: &UpdateReport) -> Result<()> {
        let address = std::ptr::from_ref(report).expose_provenance();
        // SAFETY: the request reads exactly the bytes of the report (its size is in the number), which is borrowed here;
        // a server that does not know the request reads at most a 4-byte index from its start.
        unsafe { ioctl::call(&self.fd, self.numbers.report_request(), address) }.map(drop)
    }

    fn state(index: QueueIndex, num: u32) -> uapi::VringState {
        uapi::VringState { index: index.0.into(), num }
    }

    fn file(index: QueueIndex, event: Option<&EventFd>) -> uapi::VringFile {
        uapi::VringFile { index: index.0.into(), fd: descriptor(event) }
    }

    fn updated(&self, request: &Updater<uapi::VringState>, index: QueueIndex) -> Result<u32> {
        let mut state = Self::state(index, 0);
        request.update(&self.fd, &mut state)?;
        Ok(state.num)
    }

    /// `GET_CONFIG` or `SET_CONFIG` with a buffer that begins with the header.
    fn config_request(&self, cmd: u32, offset: u32, buffer: &mut [u8], len: usize) -> Result<()> {
        let header = uapi::ConfigHeader { off: offset, len: u32::try_from(len).map_err(|_| Errno::INVAL)? };
        header.write_to_prefix(buffer).map_err(|_| Errno::INVAL)?;
        if buffer.len() - CONFIG_HEADER != len {
            return Err(Errno::INVAL);
        }
        // SAFETY: both requests access the 8 bytes of the header and the `len` bytes after it; the buffer has
        // exactly those, as checked above, and is exclusively borrowed.
        unsafe { ioctl::call(&self.fd, cmd, buffer.as_mut_ptr().expose_provenance()) }.map(drop)
    }
}

fn descriptor(event: Option<&EventFd>) -> i32 {
    event.map_or(uapi::VHOST_FILE_UNBIND, |event| event.as_fd().as_raw_fd())
}

impl AsFd for VhostVdpaFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for VhostVdpaFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<OwnedFd> for VhostVdpaFd {
    /// As [`from_fd`](Self::from_fd).
    fn from(fd: OwnedFd) -> Self {
        Self::from_fd(fd)
    }
}

impl From<VhostVdpaFd> for OwnedFd {
    fn from(device: VhostVdpaFd) -> Self {
        device.fd
    }
}

impl VdpaOps for VhostVdpaFd {
    type Event = EventFd;

    fn device_id(&self) -> Result<u32> {
        GET_DEVICE_ID.get(&self.fd)
    }

    fn status(&self) -> Result<Status> {
        GET_STATUS.get(&self.fd).map(Status)
    }

    fn set_status(&self, status: Status) -> Result<()> {
        SET_STATUS.set(&self.fd, &status.0)
    }

    fn features(&self) -> Result<Features> {
        GET_FEATURES.get(&self.fd).map(Features)
    }

    fn set_features(&self, features: Features) -> Result<()> {
        SET_FEATURES.set(&self.fd, &features.0)
    }

    fn backend_features(&self) -> Result<BackendFeatures> {
        GET_BACKEND_FEATURES.get(&self.fd).map(|word| self.numbers.features_from_wire(word))
    }

    fn set_backend_features(&self, features: BackendFeatures) -> Result<()> {
        SET_BACKEND_FEATURES.set(&self.fd, &self.numbers.features_to_wire(features))?;
        self.set_acknowledged(features);
        Ok(())
    }

    fn vqs_count(&self) -> Result<u32> {
        GET_VQS_COUNT.get(&self.fd)
    }

    fn group_num(&self) -> Result<u32> {
        GET_GROUP_NUM.get(&self.fd)
    }

    fn as_num(&self) -> Result<u32> {
        GET_AS_NUM.get(&self.fd)
    }

    fn iova_range(&self) -> Result<IovaRange> {
        let range = GET_IOVA_RANGE.get(&self.fd)?;
        IovaRange::new(range.first, range.last).ok_or(Errno::IO)
    }

    fn config_size(&self) -> Result<u32> {
        GET_CONFIG_SIZE.get(&self.fd)
    }

    fn config(&self, offset: u32, out: &mut [u8]) -> Result<()> {
        let mut buffer = vec![0; CONFIG_HEADER + out.len()];
        self.config_request(uapi::VHOST_VDPA_GET_CONFIG, offset, &mut buffer, out.len())?;
        out.copy_from_slice(buffer.get(CONFIG_HEADER..).unwrap_or_default());
        Ok(())
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> Result<()> {
        let mut buffer = vec![0; CONFIG_HEADER];
        buffer.extend_from_slice(data);
        self.config_request(uapi::VHOST_VDPA_SET_CONFIG, offset, &mut buffer, data.len())
    }

    fn set_config_call(&self, event: Option<&EventFd>) -> Result<()> {
        SET_CONFIG_CALL.set(&self.fd, &descriptor(event))
    }

    fn vring_num(&self) -> Result<u16> {
        GET_VRING_NUM.get(&self.fd)
    }

    fn set_owner(&self) -> Result<()> {
        SET_OWNER.call(&self.fd)
    }

    fn new_owner(&self) -> Result<()> {
        // SAFETY: the number encodes that there is no argument, which `Numbers::check` has seen to; a driver that
        // takes it for something else looks at address 0, where nothing can be mapped.
        unsafe { NoArg::new(self.numbers.new_owner) }.call(&self.fd)
    }

    fn reset_owner(&self) -> Result<()> {
        RESET_OWNER.call(&self.fd)?;
        self.kept.lock().forget();
        Ok(())
    }

    fn set_vring_num(&self, index: QueueIndex, num: u32) -> Result<()> {
        SET_VRING_NUM.set(&self.fd, &Self::state(index, num))
    }

    fn set_vring_addr(&self, index: QueueIndex, addr: &VringAddr) -> Result<()> {
        self.check_kind()?;
        SET_VRING_ADDR.set(
            &self.fd,
            &uapi::VringAddr {
                index: index.0.into(),
                flags: addr.flags,
                desc_user_addr: addr.desc,
                used_user_addr: addr.used,
                avail_user_addr: addr.avail,
                log_guest_addr: addr.log,
            },
        )
    }

    fn set_vring_base(&self, index: QueueIndex, num: u32) -> Result<()> {
        SET_VRING_BASE.set(&self.fd, &Self::state(index, num))
    }

    fn vring_base(&self, index: QueueIndex) -> Result<u32> {
        self.updated(&GET_VRING_BASE, index)
    }

    fn set_vring_enable(&self, index: QueueIndex, enable: bool) -> Result<()> {
        SET_VRING_ENABLE.set(&self.fd, &Self::state(index, enable.into()))
    }

    fn set_vring_kick(&self, index: QueueIndex, event: Option<&EventFd>) -> Result<()> {
        SET_VRING_KICK.set(&self.fd, &Self::file(index, event))
    }

    fn set_vring_call(&self, index: QueueIndex, event: Option<&EventFd>) -> Result<()> {
        SET_VRING_CALL.set(&self.fd, &Self::file(index, event))
    }

    fn set_vring_err(&self, index: QueueIndex, event: Option<&EventFd>) -> Result<()> {
        SET_VRING_ERR.set(&self.fd, &Self::file(index, event))
    }

    fn vring_group(&self, index: QueueIndex) -> Result<GroupIndex> {
        self.updated(&GET_VRING_GROUP, index).map(GroupIndex)
    }

    fn vring_desc_group(&self, index: QueueIndex) -> Result<GroupIndex> {
        self.updated(&GET_VRING_DESC_GROUP, index).map(GroupIndex)
    }

    fn set_group_asid(&self, group: GroupIndex, asid: Asid) -> Result<()> {
        SET_GROUP_ASID.set(&self.fd, &uapi::VringState { index: group.0, num: asid.0 })
    }

    fn vring_size(&self, index: QueueIndex) -> Result<u32> {
        self.updated(&GET_VRING_SIZE, index)
    }

    fn suspend(&self) -> Result<()> {
        SUSPEND.call(&self.fd)
    }

    fn resume(&self) -> Result<()> {
        RESUME.call(&self.fd)
    }

    fn iotlb(&self, asid: Asid, msg: &IotlbMsg) -> Result<()> {
        let msg = IotlbMsg { kind: self.numbers.message_to_wire(msg.kind), ..*msg };
        let written = self.raw_write(&encode_iotlb(self.acknowledged(), asid, &msg)?)?;
        if written == MSG_SIZE { Ok(()) } else { Err(Errno::IO) }
    }

    fn dirty_info(&self) -> Result<DirtyInfo> {
        self.get_dirty_info()
    }

    fn dirty_start(&self, page_size: u64, ranges: &[DirtyRange]) -> Result<()> {
        self.start_dirty(page_size, ranges)
    }

    fn dirty_stop(&self) -> Result<()> {
        self.stop_dirty()
    }

    fn dirty_get(&self, of: DirtyRange, page_size: u64, keep: bool, bitmap: &mut [u64]) -> Result<()> {
        self.get_dirty(of, page_size, keep, bitmap)
    }

    fn dirty_unmap(&self, of: DirtyRange, page_size: u64, bitmap: &mut [u64]) -> Result<u64> {
        self.unmap_dirty(of, page_size, bitmap)
    }

    fn state_save(&self) -> Result<Vec<u8>> {
        self.save_state()
    }

    fn state_load(&self, state: &[u8]) -> Result<()> {
        self.load_state(state)
    }
}

#[cfg(test)]
mod tests {
    use vdpa_core::types::{Perm, iotlb_type};
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn messages_have_the_version_that_was_acknowledged() {
        let msg = IotlbMsg { iova: 1, size: 2, uaddr: 3, perm: Perm::RW, kind: iotlb_type::UPDATE };
        let v1 = encode_iotlb(BackendFeatures::NONE, Asid(0), &msg).unwrap();
        let v2_plain =
            encode_iotlb(BackendFeatures::of(&[BackendFeatures::IOTLB_MSG_V2]), Asid(0), &msg).unwrap();
        let with_asid = BackendFeatures::of(&[BackendFeatures::IOTLB_MSG_V2, BackendFeatures::IOTLB_ASID]);
        let v2 = uapi::MsgV2::read_from_bytes(&encode_iotlb(with_asid, Asid(7), &msg).unwrap()).unwrap();
        assert_eq!((v1[0], v2_plain[0], v2.kind, v2.asid), (1, 2, 2, 7));
        assert_eq!(v1[8..], v2_plain[8..]);
        let iotlb = v2.iotlb;
        assert_eq!((iotlb.iova, iotlb.size, iotlb.uaddr, iotlb.perm, iotlb.kind), (1, 2, 3, 3, 2));
        assert_eq!(encode_iotlb(BackendFeatures::NONE, Asid(1), &msg), Err(Errno::INVAL));
    }

    #[test]
    fn a_short_write_is_an_error() {
        // A file that may not grow accepts only the bytes that fit in its last page.
        let file = crate::memfd::create(c"full", 4096, None).unwrap();
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::GROW).unwrap();
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(4096 - 40)).unwrap();
        let device = VhostVdpaFd::from_fd(file);
        assert_eq!(device.batch_begin(Asid(0)), Err(Errno::IO));
        assert_eq!(rustix::fs::tell(&device), Ok(4096), "a part of the message was written");
    }

    #[test]
    fn requests_on_other_files_fail() {
        let device = VhostVdpaFd::from_fd(crate::memfd::create(c"no-device", 0, None).unwrap());
        assert_eq!(device.device_id(), Err(Errno::NOTTY));
        assert_eq!(device.config(0, &mut [0; 8]), Err(Errno::NOTTY));
        assert_eq!(device.set_owner(), Err(Errno::NOTTY));
        assert_eq!(device.raw_ioctl(uapi::VHOST_SET_OWNER, RawArg::Null), Err(Errno::NOTTY));
    }

    #[test]
    fn a_failed_open_gives_the_reason() {
        let missing = VhostVdpaFd::open("/dev/no-such-device").unwrap_err();
        assert!(matches!(missing, OpenError::NotFound { .. }));
        assert!(missing.to_string().starts_with("/dev/no-such-device: no such device"), "{missing}");
    }

    #[test]
    fn the_kernel_cannot_write_past_a_raw_buffer() {
        const FIONREAD: u32 = 0x541b;
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, &[0; 5]).unwrap();
        let device = VhostVdpaFd::from_fd(reader);
        let mut bytes = [0; 4];
        assert_eq!(device.raw_ioctl(FIONREAD, RawArg::Bytes(&mut bytes)), Ok(0));
        assert_eq!(i32::from_ne_bytes(bytes), 5);
        for arg in [RawArg::Bytes(&mut bytes[..3]), RawArg::Bytes(&mut []), RawArg::Null, RawArg::BadPointer]
        {
            assert_eq!(device.raw_ioctl(FIONREAD, arg), Err(Errno::FAULT));
        }
    }

    #[test]
    fn the_number_of_remap_is_the_configured_one() {
        let file = crate::memfd::create(c"messages", 0, None).unwrap();
        let numbers = Numbers { remap: 9, ..Numbers::POSTED };
        let device = VhostVdpaFd::from_fd(file).with_live_numbers(numbers).unwrap();
        device.dma_remap(Asid(0), 0, 1, 0).unwrap();
        let mut bytes = [0; MSG_SIZE];
        rustix::io::pread(&device, &mut bytes, 0).unwrap();
        assert_eq!(bytes[33], 9);
        let taken = Numbers { new_owner: uapi::VHOST_SET_OWNER, ..Numbers::POSTED };
        assert!(device.with_live_numbers(taken).is_err());
    }

    #[test]
    fn acknowledged_features_can_be_declared() {
        let device = VhostVdpaFd::from_fd(crate::memfd::create(c"adopted", 0, None).unwrap());
        assert_eq!(device.acknowledged(), BackendFeatures::NONE);
        device.set_acknowledged(BackendFeatures(0x77e));
        assert_eq!(device.acknowledged(), BackendFeatures(0x77e));
    }
}
