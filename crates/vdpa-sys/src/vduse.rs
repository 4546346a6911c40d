//! VDUSE: devices of the kernel's vdpa bus that a program implements (uapi-spec 6.4).
//!
//! A [`Control`] makes devices, a [`VduseDevice`] is the program's side of one: it reads what the kernel wants, answers, looks
//! memory up and raises interrupts. Attaching a device to the bus is netlink, and not here.
#![expect(
    unsafe_code,
    reason = "binds ioctl numbers to their arguments; raw requests for the conformance suite"
)]

mod interrupt;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

pub use interrupt::Interrupt;

use rustix::fs::{Mode, OFlags};
use vdpa_core::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::errno::from_rustix;
use crate::ioctl::{self, Getter, NoArg, Setter, Updater, io};
use crate::uapi::vduse as uapi;

macro_rules! requests {
    ($($name:ident: $kind:ident $(<$argument:ty>)? = $number:ident;)*) => {
        $(
            // SAFETY: VDUSE accesses exactly the argument of this number (uapi-spec 6.4.1, 6.4.2); a descriptor of another kind of
            // file rejects the number, whose type byte is VDUSE's.
            const $name: $kind$(<$argument>)? = unsafe { $kind::new(uapi::$number) };
        )*
    };
}

requests! {
    GET_API_VERSION: Getter<u64> = GET_API_VERSION;
    SET_API_VERSION: Setter<u64> = SET_API_VERSION;
    DESTROY_DEV: Setter<[u8; uapi::NAME_MAX]> = DESTROY_DEV;
    GET_FEATURES: Getter<u64> = GET_FEATURES;
    SET_FEATURES: Setter<u64> = SET_FEATURES;
    DEV_GET_FEATURES: Getter<u64> = DEV_GET_FEATURES;
    DEV_INJECT_CONFIG_IRQ: NoArg = DEV_INJECT_CONFIG_IRQ;
    VQ_SETUP: Setter<uapi::VqConfig> = VQ_SETUP;
    VQ_GET_INFO: Updater<uapi::VqInfo> = VQ_GET_INFO;
    VQ_SETUP_KICKFD: Setter<uapi::VqEventfd> = VQ_SETUP_KICKFD;
    VQ_INJECT_IRQ: Setter<u32> = VQ_INJECT_IRQ;
}

/// An unused number of VDUSE's, with which a driver can be asked how it answers what it does not know.
// SAFETY: no driver knows the number.
const UNKNOWN: NoArg = unsafe { NoArg::new(io(uapi::VDUSE_BASE, 0x7f)) };

fn open(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(from_rustix)
}

/// The name as the interface has it: 256 bytes, the last of them zero. A longer one is cut.
fn name_bytes(name: &str) -> [u8; uapi::NAME_MAX] {
    let mut bytes = [0; uapi::NAME_MAX];
    bytes.iter_mut().zip(name.bytes().take(uapi::NAME_MAX - 1)).for_each(|(to, from)| *to = from);
    bytes
}

/// An open `/dev/vduse/control`, which makes and destroys devices. Each open has an API version and features of its own.
#[derive(Debug)]
pub struct Control(OwnedFd);

impl Control {
    /// Opens `/dev/vduse/control`.
    ///
    /// # Errors
    /// Errors of open(2): `ENOENT` without the module `vduse`, `EACCES` without the right.
    pub fn open() -> Result<Self, Errno> {
        open(Path::new("/dev/vduse/control")).map(Self)
    }

    /// `VDUSE_GET_API_VERSION`. A program that asks gets the newest version of the kernel, one that does not gets 0.
    ///
    /// # Errors
    /// None are known.
    pub fn api_version(&self) -> Result<u64, Errno> {
        GET_API_VERSION.get(&self.0)
    }

    /// `VDUSE_SET_API_VERSION`.
    ///
    /// # Errors
    /// `EINVAL` for a version that the kernel does not have.
    pub fn set_api_version(&self, version: u64) -> Result<(), Errno> {
        SET_API_VERSION.set(&self.0, &version)
    }

    /// `VDUSE_GET_FEATURES`: the [`feature`](uapi::feature)s of the kernel.
    ///
    /// # Errors
    /// `EINVAL` before Linux 7.3, which does not know the request.
    pub fn features(&self) -> Result<u64, Errno> {
        GET_FEATURES.get(&self.0)
    }

    /// `VDUSE_SET_FEATURES`: of the devices that are made through this open from now on.
    ///
    /// # Errors
    /// `EINVAL` for a feature that the kernel does not have, and before Linux 7.3.
    pub fn set_features(&self, features: u64) -> Result<(), Errno> {
        SET_FEATURES.set(&self.0, &features)
    }

    /// `VDUSE_CREATE_DEV`. `config.config_size` is replaced by the length of `space`, its configuration space.
    ///
    /// # Errors
    /// `EINVAL` for what the kernel refuses (uapi-spec 6.4.1), `EEXIST`, `EPERM` for a network device without `CAP_NET_ADMIN`.
    pub fn create(&self, mut config: uapi::DevConfig, space: &[u8]) -> Result<(), Errno> {
        config.config_size = u32::try_from(space.len()).map_err(|_| Errno::INVAL)?;
        self.create_raw(&config, space)
    }

    /// As [`create`](Self::create), with any `config_size` of at most the length of `space`.
    ///
    /// # Errors
    /// As [`create`](Self::create); `EFAULT` for a `config_size` beyond `space`.
    pub fn create_raw(&self, config: &uapi::DevConfig, space: &[u8]) -> Result<(), Errno> {
        // A size that the kernel takes is read from the argument, so it must be there.
        let size = usize::try_from(config.config_size).map_err(|_| Errno::INVAL)?;
        if size > space.len() && size <= CONFIG_MAX {
            return Err(Errno::FAULT);
        }
        let mut bytes = config.as_bytes().to_vec();
        bytes.extend_from_slice(space);
        // SAFETY: the kernel reads the structure and `config_size` bytes behind it, of which there are as many, or refuses a size
        // above CONFIG_MAX before it reads any.
        unsafe { ioctl::call(&self.0, uapi::CREATE_DEV, bytes.as_ptr() as usize) }.map(drop)
    }

    /// `VDUSE_DESTROY_DEV`.
    ///
    /// # Errors
    /// `EINVAL` for a name that does not exist, `EBUSY` while the device is open or on the bus.
    pub fn destroy(&self, name: &str) -> Result<(), Errno> {
        DESTROY_DEV.set(&self.0, &name_bytes(name))
    }

    /// A request that VDUSE does not have.
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn unknown(&self) -> Result<(), Errno> {
        UNKNOWN.call(&self.0)
    }
}

/// Bytes of the largest configuration space that the kernel takes: a page.
const CONFIG_MAX: usize = 4096;

impl uapi::DevConfig {
    /// A device of this name and virtio id, with `queues` queues and rings aligned to a page; one group and address space if
    /// `version` is 1 or later.
    #[must_use]
    pub fn new(name: &str, device_id: u32, features: u64, queues: u32, version: u64) -> Self {
        let one = u32::from(version > 0);
        Self {
            name: name_bytes(name),
            vendor_id: 0,
            device_id,
            features,
            vq_num: queues,
            vq_align: 4096,
            ngroups: one,
            nas: one,
            reserved: [0; 11],
            config_size: 0,
        }
    }
}

/// An open `/dev/vduse/NAME`: the program's side of a device. Requests are read without blocking.
#[derive(Debug)]
pub struct VduseDevice(OwnedFd);

impl AsFd for VduseDevice {
    /// Readable when the kernel has a request, writable while one was read and not answered; an error when the device is broken.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl VduseDevice {
    /// Opens the device of this name.
    ///
    /// # Errors
    /// Errors of open(2): `ENOENT` for a name that does not exist, `EBUSY` while another program has it open.
    pub fn open(name: &str) -> Result<Self, Errno> {
        let device = open(&Path::new("/dev/vduse").join(name))?;
        rustix::io::ioctl_fionbio(&device, true).map_err(from_rustix)?;
        Ok(Self(device))
    }

    /// `VDUSE_VQ_SETUP`: the largest ring of a queue, and its group. Before the device is put on the bus.
    ///
    /// # Errors
    /// `EINVAL` for an index or a group that does not exist, and for reserved fields that are not 0.
    pub fn setup_queue(&self, config: &uapi::VqConfig) -> Result<(), Errno> {
        VQ_SETUP.set(&self.0, config)
    }

    /// `VDUSE_VQ_GET_INFO`: what the driver has set.
    ///
    /// # Errors
    /// `EINVAL` for an index that does not exist.
    pub fn queue(&self, index: u32) -> Result<uapi::VqInfo, Errno> {
        let mut info = uapi::VqInfo { index, ..uapi::VqInfo::default() };
        VQ_GET_INFO.update(&self.0, &mut info).map(|()| info)
    }

    /// `VDUSE_VQ_SETUP_KICKFD`: the eventfd that the kernel signals when the driver notifies the queue; `None` removes it.
    ///
    /// # Errors
    /// `EINVAL` for an index that does not exist or a file that is no eventfd.
    pub fn set_kick(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let fd = fd.map_or(-1, |fd| fd.as_raw_fd());
        VQ_SETUP_KICKFD.set(&self.0, &uapi::VqEventfd { index, fd })
    }

    /// `VDUSE_VQ_INJECT_IRQ`: tells the driver that its queue has news.
    ///
    /// # Errors
    /// `EINVAL` for an index that does not exist; and, unless the queue is enabled and has an eventfd, while the device is suspended or
    /// without `DRIVER_OK`.
    pub fn interrupt(&self, index: u32) -> Result<(), Errno> {
        VQ_INJECT_IRQ.set(&self.0, &index)
    }

    /// `VDUSE_DEV_INJECT_CONFIG_IRQ`: tells the driver that configuration space has changed.
    ///
    /// # Errors
    /// `EINVAL` while the device is suspended or without `DRIVER_OK`.
    pub fn config_interrupt(&self) -> Result<(), Errno> {
        DEV_INJECT_CONFIG_IRQ.call(&self.0)
    }

    /// `VDUSE_DEV_SET_CONFIG`: replaces bytes of configuration space. Interrupts nobody.
    ///
    /// # Errors
    /// `EINVAL` for no bytes, and beyond the end.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), Errno> {
        let length = u32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
        let mut argument = uapi::ConfigHeader { offset, length }.as_bytes().to_vec();
        argument.extend_from_slice(bytes);
        // SAFETY: the kernel reads the header and the `length` bytes behind it, which are there.
        unsafe { ioctl::call(&self.0, uapi::DEV_SET_CONFIG, argument.as_ptr() as usize) }.map(drop)
    }

    /// `VDUSE_DEV_GET_FEATURES`: what the driver has written, also before `FEATURES_OK`.
    ///
    /// # Errors
    /// None but `EPERM` of a broken device.
    pub fn driver_features(&self) -> Result<u64, Errno> {
        DEV_GET_FEATURES.get(&self.0)
    }

    /// `VDUSE_IOTLB_GET_FD`: the first mapping of address space 0 that overlaps `start..=last`, and a descriptor of its file. The
    /// descriptor shares the open file with the driver's. Close-on-exec is set.
    ///
    /// # Errors
    /// `EINVAL` where nothing is mapped.
    pub fn mapping(&self, start: u64, last: u64) -> Result<(uapi::IotlbEntry, OwnedFd), Errno> {
        let mut entry = uapi::IotlbEntry { start, last, ..uapi::IotlbEntry::default() };
        // SAFETY: the kernel reads and writes one such structure, which lives.
        let fd = unsafe { ioctl::call(&self.0, uapi::IOTLB_GET_FD, (&raw mut entry) as usize) }?;
        // SAFETY: the kernel has made this descriptor for the caller, and nobody else knows it.
        Ok((entry, close_on_exec(unsafe { OwnedFd::from_raw_fd(fd) })?))
    }

    /// `VDUSE_IOTLB_GET_FD2`: the same in address space `asid`.
    ///
    /// # Errors
    /// `ENOTTY` for a device of API version 0; `EINVAL` where nothing is mapped, and for an address space that does not exist.
    pub fn mapping_in(&self, asid: u32, start: u64, last: u64) -> Result<(uapi::IotlbEntry, OwnedFd), Errno> {
        let entry = uapi::IotlbEntry { start, last, ..uapi::IotlbEntry::default() };
        let mut entry = uapi::IotlbEntryV2 { entry, asid, reserved: [0; 11] };
        // SAFETY: the kernel reads and writes one such structure, which lives.
        let fd = unsafe { ioctl::call(&self.0, uapi::IOTLB_GET_FD2, (&raw mut entry) as usize) }?;
        // SAFETY: the kernel has made this descriptor for the caller, and nobody else knows it.
        Ok((entry.entry, close_on_exec(unsafe { OwnedFd::from_raw_fd(fd) })?))
    }

    /// A request that VDUSE does not have.
    ///
    /// # Errors
    /// `ENOTTY`.
    pub fn unknown(&self) -> Result<(), Errno> {
        UNKNOWN.call(&self.0)
    }

    /// Reads the next request of the kernel.
    ///
    /// # Errors
    /// `EAGAIN` when there is none.
    pub fn read(&self) -> Result<uapi::DevRequest, Errno> {
        let mut bytes = [0; size_of::<uapi::DevRequest>()];
        let count = rustix::io::read(&self.0, &mut bytes).map_err(from_rustix)?;
        let request = bytes.get(..count).and_then(|read| uapi::DevRequest::read_from_bytes(read).ok());
        request.ok_or(Errno::IO)
    }

    /// Answers a request that was read.
    ///
    /// # Errors
    /// `ENOENT` for a number that is not open.
    pub fn answer(&self, response: &uapi::DevResponse) -> Result<(), Errno> {
        self.write(response.as_bytes()).map(drop)
    }

    /// Writes any bytes in place of an answer.
    ///
    /// # Errors
    /// `EINVAL` for fewer than an answer has.
    pub fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::io::write(&self.0, bytes).map_err(from_rustix)
    }
}

/// Sets close-on-exec, which the kernel does not.
fn close_on_exec(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC).map_err(from_rustix)?;
    Ok(fd)
}

impl uapi::DevRequest {
    /// The answer "done" to this request.
    #[must_use]
    pub fn done(&self) -> uapi::DevResponse {
        uapi::DevResponse { request_id: self.request_id, result: 0, reserved: [0; 4], payload: [0; 32] }
    }

    /// A 64-bit word of the arguments, by its index in 64-bit words.
    #[must_use]
    pub fn word(&self, index: usize) -> u64 {
        let half = |at: usize| self.payload.get(at).copied().unwrap_or(0).to_ne_bytes();
        let ([a, b, c, d], [e, f, g, h]) = (half(2 * index), half(2 * index + 1));
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_header() {
        // uapi-spec 6.4.1 and 6.4.2.
        let numbers = [
            (uapi::GET_API_VERSION, 0x8008_8100),
            (uapi::SET_API_VERSION, 0x4008_8101),
            (uapi::CREATE_DEV, 0x4150_8102),
            (uapi::DESTROY_DEV, 0x4100_8103),
            (uapi::GET_FEATURES, 0x8008_8104),
            (uapi::SET_FEATURES, 0x4008_8105),
            (uapi::IOTLB_GET_FD, 0xc020_8110),
            (uapi::IOTLB_GET_FD2, 0xc050_811b),
            (uapi::DEV_GET_FEATURES, 0x8008_8111),
            (uapi::DEV_SET_CONFIG, 0x4008_8112),
            (uapi::DEV_INJECT_CONFIG_IRQ, 0x0000_8113),
            (uapi::VQ_SETUP, 0x4020_8114),
            (uapi::VQ_GET_INFO, 0xc030_8115),
            (uapi::VQ_SETUP_KICKFD, 0x4008_8116),
            (uapi::VQ_INJECT_IRQ, 0x4004_8117),
        ];
        for (got, want) in numbers {
            assert_eq!(got, want, "{got:#x}");
        }
    }

    #[test]
    fn a_name_that_is_too_long_is_cut_before_its_zero() {
        assert_eq!(name_bytes("ab")[..3], [b'a', b'b', 0]);
        assert_eq!(name_bytes(&"x".repeat(300))[254..], [b'x', 0]);
    }

    #[test]
    fn words_of_a_request_are_in_the_machines_order() {
        let mut request = uapi::DevRequest { kind: 2, request_id: 7, reserved: [0; 4], payload: [0; 32] };
        request.payload.as_mut_bytes()[8..16].copy_from_slice(&0x1122_3344_5566_7788_u64.to_ne_bytes());
        assert_eq!((request.word(0), request.word(1), request.word(99)), (0, 0x1122_3344_5566_7788, 0));
        assert_eq!(request.done().request_id, 7);
    }
}
