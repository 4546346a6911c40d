//! [`Device`]: an open device, with raw access to its requests.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{IotlbMsg, Perm, VringAddr, iotlb_type};
use vdpa_sys::uapi::live;
use vdpa_sys::vhost_vdpa::{RawArg, VhostVdpaFd};

use crate::case::Stop;
use crate::inprocess::{LocalDevice, LocalFile};
use crate::memory::Region;
use crate::request::Request;
use crate::vduse::Bus;

/// Size of an IOTLB message in bytes. A successful write returns it, whatever the length of the write (uapi-spec 2.2).
pub(crate) const MESSAGE_SIZE: usize = 72;
/// A message of version 1, `VHOST_IOTLB_MSG`.
pub(crate) const V1: u32 = 1;
/// A message of version 2, `VHOST_IOTLB_MSG_V2`.
pub(crate) const V2: u32 = 2;

/// The device under test.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A device file.
    File(&'a Path),
    /// A device in this process.
    InProcess(&'a LocalDevice),
    /// No device: each case makes one by VDUSE and puts it on the bus.
    Vduse(&'a Bus),
}

impl<'a> From<&'a Path> for Target<'a> {
    fn from(path: &'a Path) -> Self {
        Self::File(path)
    }
}

impl<'a> From<&'a LocalDevice> for Target<'a> {
    fn from(device: &'a LocalDevice) -> Self {
        Self::InProcess(device)
    }
}

/// An open device. It checks no arguments and keeps no state, so the device receives exactly the requests that a case makes.
#[derive(Debug)]
pub struct Device {
    transport: Transport,
}

/// How requests reach the device.
#[derive(Debug)]
enum Transport {
    File(VhostVdpaFd),
    InProcess(LocalFile),
}

/// Converts the error number of a system call made through rustix.
pub(crate) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

impl Device {
    /// Opens a device for reading and writing.
    ///
    /// # Errors
    /// Errors of open(2).
    pub fn open<'a>(target: impl Into<Target<'a>>) -> Result<Self, Errno> {
        match target.into() {
            Target::File(path) => Self::open_as(path, OFlags::RDWR),
            Target::InProcess(device) => device.open().map(Self::from_local),
            Target::Vduse(_) => Err(Errno::NODEV),
        }
    }

    const fn from_local(local: LocalFile) -> Self {
        Self { transport: Transport::InProcess(local) }
    }

    pub(crate) fn open_as(path: &Path, mode: OFlags) -> Result<Self, Errno> {
        rustix::fs::open(path, mode | OFlags::CLOEXEC, Mode::empty()).map(Self::from_fd).map_err(errno)
    }

    /// Makes a device of the descriptor of its open file.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { transport: Transport::File(VhostVdpaFd::from_fd(fd)) }
    }

    /// The device file, for its system calls.
    pub(crate) fn file(&self) -> Result<&VhostVdpaFd, Stop> {
        match &self.transport {
            Transport::File(fd) => Ok(fd),
            Transport::InProcess(_) => Err(Stop::CannotRun("there is no device file".to_owned())),
        }
    }

    /// The device in this process, unless the device is a file.
    pub(crate) const fn local(&self) -> Option<&LocalFile> {
        match &self.transport {
            Transport::File(_) => None,
            Transport::InProcess(local) => Some(local),
        }
    }

    /// Another descriptor of the same open file.
    pub(crate) fn duplicate(&self) -> Result<Self, Stop> {
        match &self.transport {
            Transport::File(fd) => {
                let copy = fd.as_fd().try_clone_to_owned();
                copy.map(Self::from_fd).map_err(|error| Stop::CannotRun(error.to_string()))
            }
            Transport::InProcess(local) => Ok(Self::from_local(local.clone())),
        }
    }

    /// Makes a device in this process serve its queues. It must be called after a kick, since such a device has no thread
    /// that waits for the eventfd.
    pub(crate) fn process_kick(&self) {
        if let Some(local) = self.local() {
            local.process_kick();
        }
    }

    /// Makes an ioctl with any number and any argument.
    pub(crate) fn raw(&self, number: u32, argument: RawArg<'_>) -> Result<(), Errno> {
        match &self.transport {
            Transport::File(fd) => fd.raw_ioctl(number, argument).map(drop),
            // A device in this process has no ioctl numbers.
            Transport::InProcess(_) => Err(Errno::NOSYS),
        }
    }

    /// Makes a request with any argument.
    pub(crate) fn request(&self, request: Request, argument: RawArg<'_>) -> Result<(), Errno> {
        if let Some(local) = self.local() {
            return local.request(request, argument);
        }
        // A request that is no ioctl has no number. A case that makes it here is wrong and fails with `INVAL`.
        let number = request.wire_number().ok_or(Errno::INVAL)?;
        match (request, argument) {
            (Request::GET_BACKEND_FEATURES, RawArg::Bytes(bytes)) => {
                self.raw(number, RawArg::Bytes(bytes))?;
                translate(bytes, |word| live::configured().features_from_wire(word).0);
                Ok(())
            }
            (Request::SET_BACKEND_FEATURES, RawArg::Bytes(bytes)) => {
                translate(bytes, |word| live::configured().features_to_wire(BackendFeatures(word)));
                self.raw(number, RawArg::Bytes(bytes))
            }
            (_, argument) => self.raw(number, argument),
        }
    }

    /// Makes a request without an argument.
    pub(crate) fn call(&self, request: Request) -> Result<(), Errno> {
        self.request(request, RawArg::Null)
    }

    /// Makes a request whose argument is an invalid pointer.
    pub(crate) fn bad_pointer(&self, request: Request) -> Result<(), Errno> {
        self.request(request, RawArg::BadPointer)
    }

    /// Makes a request that returns `N` bytes. Bytes that the device does not write are 0.
    pub(crate) fn get<const N: usize>(&self, request: Request) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.request(request, RawArg::Bytes(&mut bytes)).map(|()| bytes)
    }

    /// Makes a request whose argument is `bytes`.
    pub(crate) fn set(&self, request: Request, bytes: &[u8]) -> Result<(), Errno> {
        self.request(request, RawArg::Bytes(&mut bytes.to_vec()))
    }

    /// Makes a request whose argument is a u64.
    pub(crate) fn set_u64(&self, request: Request, value: u64) -> Result<(), Errno> {
        self.set(request, &value.to_ne_bytes())
    }

    /// Makes a request with a `struct vhost_vring_state` and returns the struct's `num` after it.
    pub(crate) fn vring(&self, request: Request, index: u32, num: u32) -> Result<u32, Errno> {
        let mut bytes = pair(index, num);
        self.request(request, RawArg::Bytes(&mut bytes))?;
        let [.., a, b, c, d] = bytes;
        Ok(u32::from_ne_bytes([a, b, c, d]))
    }

    /// As [`vring`](Self::vring), for a request that returns nothing.
    pub(crate) fn set_vring(&self, request: Request, index: u32, num: u32) -> Result<(), Errno> {
        self.vring(request, index, num).map(drop)
    }

    /// Makes a request with a `struct vhost_vring_file`. `None` is -1, which removes the descriptor.
    pub(crate) fn set_fd(
        &self,
        request: Request,
        index: u32,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Errno> {
        self.set(request, &vring_file(index, fd.map_or(-1, |fd| fd.as_raw_fd())))
    }

    /// `VHOST_SET_VRING_ADDR`.
    pub(crate) fn set_addr(&self, index: u32, addr: &VringAddr) -> Result<(), Errno> {
        let mut bytes = pair(index, addr.flags).to_vec();
        for word in [addr.desc, addr.used, addr.avail, addr.log] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        self.set(Request::SET_VRING_ADDR, &bytes)
    }

    /// `VHOST_VDPA_GET_STATUS`.
    pub(crate) fn status(&self) -> Result<u8, Errno> {
        self.get(Request::GET_STATUS).map(u8::from_ne_bytes)
    }

    /// `VHOST_VDPA_SET_STATUS`.
    pub(crate) fn set_status(&self, status: Status) -> Result<(), Errno> {
        self.set(Request::SET_STATUS, &[status.0])
    }

    /// `VHOST_SET_FEATURES`.
    pub(crate) fn set_features(&self, features: Features) -> Result<(), Errno> {
        self.set_u64(Request::SET_FEATURES, features.0)
    }

    /// `VHOST_SET_BACKEND_FEATURES`.
    pub(crate) fn set_backend(&self, features: BackendFeatures) -> Result<(), Errno> {
        self.set_u64(Request::SET_BACKEND_FEATURES, features.0)
    }

    /// `VHOST_VDPA_GET_CONFIG` with `len` both in the header and as the length of the buffer.
    pub(crate) fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>, Errno> {
        let mut bytes = pair(offset, len).to_vec();
        bytes.resize(8 + usize::try_from(len).unwrap_or(0), 0);
        self.request(Request::GET_CONFIG, RawArg::Bytes(&mut bytes))?;
        Ok(bytes.split_off(8))
    }

    /// `VHOST_VDPA_SET_CONFIG`.
    pub(crate) fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), Errno> {
        let mut bytes = pair(offset, u32::try_from(data.len()).unwrap_or(u32::MAX)).to_vec();
        bytes.extend_from_slice(data);
        self.set(Request::SET_CONFIG, &bytes)
    }

    /// Writes bytes to the device.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match &self.transport {
            Transport::File(fd) => fd.raw_write(bytes),
            Transport::InProcess(local) => local.write(bytes),
        }
    }

    /// Writes a version-2 message.
    pub(crate) fn message(&self, asid: u32, message: IotlbMsg) -> Result<usize, Errno> {
        self.write(&encode(V2, asid, &message))
    }

    /// Writes a message of this type whose other fields are 0.
    pub(crate) fn message_of_type(&self, asid: u32, kind: u8) -> Result<usize, Errno> {
        self.message(asid, IotlbMsg { kind, ..IotlbMsg::default() })
    }

    /// `UPDATE` of all of `region`, in address space 0.
    pub(crate) fn map(&self, iova: u64, region: &Region, perm: Perm) -> Result<usize, Errno> {
        let (size, uaddr) = (region.size(), region.uaddr());
        self.message(0, IotlbMsg { iova, size, uaddr, perm, kind: iotlb_type::UPDATE })
    }

    /// `INVALIDATE`, in address space 0.
    pub(crate) fn unmap(&self, iova: u64, size: u64) -> Result<usize, Errno> {
        self.message(0, IotlbMsg { iova, size, kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() })
    }
}

/// Replaces the u64 at the start of `bytes`.
fn translate(bytes: &mut [u8], change: impl FnOnce(u64) -> u64) {
    if let Some(word) = bytes.first_chunk_mut() {
        *word = change(u64::from_ne_bytes(*word)).to_ne_bytes();
    }
}

/// Encodes two u32, with which most arguments begin.
pub(crate) fn pair(first: u32, second: u32) -> [u8; 8] {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d, e, f, g, h]
}

/// Encodes a `struct vhost_vring_file` with any number as descriptor.
pub(crate) fn vring_file(index: u32, fd: i32) -> [u8; 8] {
    pair(index, u32::from_ne_bytes(fd.to_ne_bytes()))
}

/// Encodes a message as `struct vhost_msg` or `struct vhost_msg_v2`, 72 bytes (uapi-spec 2.1).
pub(crate) fn encode(version: u32, asid: u32, message: &IotlbMsg) -> Vec<u8> {
    let mut bytes = pair(version, asid).to_vec();
    for word in [message.iova, message.size, message.uaddr] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(&[message.perm.0, live::configured().message_to_wire(message.kind)]);
    bytes.resize(MESSAGE_SIZE, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_kernels_layout() {
        let message = IotlbMsg { iova: 1, size: 2, uaddr: 3, perm: Perm::RW, kind: iotlb_type::UPDATE };
        let bytes = encode(V2, 7, &message);
        assert_eq!(bytes.len(), 72);
        assert_eq!(bytes[..16], [2, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!((bytes[24], bytes[32], bytes[33]), (3, 3, 2));
    }

    #[test]
    fn a_missing_descriptor_is_minus_one() {
        assert_eq!(vring_file(1, -1), [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }
}
