//! TAP interfaces: one descriptor for each queue, with a virtio header before each packet (`drivers/net/tun.c`,
//! Documentation/networking/tuntap.rst).
#![expect(
    unsafe_code,
    reason = "requests whose numbers do not tell the type of their argument, and transfers by address"
)]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use vdpa_core::Errno;

use crate::errno;
use crate::ioctl::{self, Setter, ior, iow};
use crate::uring::{IoVec, MAX_IOVECS, MemorySet};

const KIND: u8 = b'T';
const TUNSETIFF: u32 = iow::<i32>(KIND, 202);
const TUNSETOFFLOAD: u32 = iow::<u32>(KIND, 208);
const TUNGETIFF: u32 = ior::<u32>(KIND, 210);
const TUNSETQUEUE: u32 = iow::<i32>(KIND, 217);
// SAFETY: the driver reads an int at the argument (`tun_chr_ioctl`).
const SET_HEADER_SIZE: Setter<i32> = unsafe { Setter::new(iow::<i32>(KIND, 216)) };
// SAFETY: as above.
const SET_LITTLE_ENDIAN: Setter<i32> = unsafe { Setter::new(iow::<i32>(KIND, 220)) };
// SAFETY: as above.
const SET_CARRIER: Setter<i32> = unsafe { Setter::new(iow::<i32>(KIND, 226)) };

/// Offloads of [`set_offloads`]: `TUN_F_*`. What the reader of the packets takes.
pub mod offload {
    /// Packets without a checksum.
    pub const CSUM: u32 = 1;
    /// TCP over IPv4 that is not segmented.
    pub const TSO4: u32 = 2;
    /// TCP over IPv6 that is not segmented.
    pub const TSO6: u32 = 4;
    /// The same with ECN.
    pub const TSO_ECN: u32 = 8;
    /// UDP over IPv4 that is not segmented (Linux 6.2).
    pub const USO4: u32 = 0x20;
    /// UDP over IPv6 that is not segmented (Linux 6.2).
    pub const USO6: u32 = 0x40;
}

/// How to open a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// The interface has several queues, each of which has a descriptor of its own.
    pub multi_queue: bool,
    /// Make the interface, which ends with its last descriptor. Otherwise it must be there.
    pub create: bool,
}

/// Opens a queue of the interface `name`, which is not blocking, and whose packets have a virtio header of 12 bytes in little-endian
/// order before them.
///
/// # Errors
/// `ENODEV` when there is no such interface, `EEXIST` when one is to be made and is there; `EPERM` for an interface of another user,
/// and to make one, without `CAP_NET_ADMIN`; `EINVAL` for an interface that is no TAP, or has several queues where `open` says one, or
/// the other way round; `EBUSY` for one that is in use, `E2BIG` when all its queues are; those of opening `/dev/net/tun`.
pub fn open(name: &str, open: Open) -> Result<OwnedFd, Errno> {
    let exists = exists(name)?;
    if !open.create && !exists {
        return Err(Errno::NODEV);
    }
    if open.create && exists {
        return Err(Errno::EXIST);
    }
    open_queue(name, open)
}

/// Opens a further queue of an interface that has one open.
///
/// # Errors
/// As [`open`].
pub fn open_more(name: &str) -> Result<OwnedFd, Errno> {
    open_queue(name, Open { multi_queue: true, create: false })
}

/// Opens a queue of the macvtap or ipvtap interface whose character device is `path` (`/dev/tapN`, N the index of the interface), with
/// headers as those of [`open`]. Each further call opens a further queue.
///
/// # Errors
/// `ENOTTY`, `EINVAL` for another file; `EBUSY` when all its queues are open; those of opening it.
pub fn open_device(path: &Path, multi_queue: bool) -> Result<OwnedFd, Errno> {
    attach(path, "", Open { multi_queue, create: false })
}

/// Opens queue `number` of a device with `pairs` pairs of queues, on an interface that has a name, or the path of its character device.
/// The queues of one interface are opened in their order. The first one of an interface that can have several may be alone; with `create`
/// it makes the interface.
///
/// # Errors
/// As [`open`] and [`open_device`]; `ENODEV` also for an interface that would end with another process.
pub fn open_one(interface: &str, number: u16, pairs: u16, create: bool) -> Result<OwnedFd, Errno> {
    if is_device(interface) {
        return open_device(Path::new(interface), pairs > 1);
    }
    if number > 0 {
        return open_more(interface);
    }
    let tap = match open(interface, Open { multi_queue: pairs > 1, create }) {
        Err(Errno::INVAL) if pairs == 1 && !create => open(interface, Open { multi_queue: true, create }),
        result => result,
    }?;
    // One that is not persistent would have been made just now, or would end with another process.
    if create || is_persistent(&tap)? { Ok(tap) } else { Err(Errno::NODEV) }
}

/// Whether this is the character device of an interface, and not its name.
#[must_use]
pub fn is_device(interface: &str) -> bool {
    interface.starts_with('/')
}

fn open_queue(name: &str, open: Open) -> Result<OwnedFd, Errno> {
    attach(Path::new("/dev/net/tun"), name, open)
}

fn attach(path: &Path, name: &str, open: Open) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = rustix::fs::open(path, flags, Mode::empty()).map_err(from)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if open.multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if open.create {
        flags |= libc::IFF_TUN_EXCL;
    }
    let mut request = interface(name)?;
    set_flags(&mut request, flags);
    // SAFETY: the argument is a `struct ifreq`, which the driver reads and writes, and which lives during the call.
    unsafe { ioctl::call(&tap, TUNSETIFF, (&raw mut request).expose_provenance()) }?;
    set_headers(&tap)?;
    Ok(tap)
}

/// Has a queue that another process has opened be as those of [`open`]: it does not block, and its headers have 12 bytes.
///
/// # Errors
/// `ENOTTY`, `EINVAL` for another file; `EBADFD` for a queue whose interface is gone.
pub fn adopt(tap: impl AsFd) -> Result<(), Errno> {
    let flags = rustix::fs::fcntl_getfl(&tap).map_err(from)?;
    rustix::fs::fcntl_setfl(&tap, flags | OFlags::NONBLOCK).map_err(from)?;
    set_headers(tap)
}

fn set_headers(tap: impl AsFd) -> Result<(), Errno> {
    const HEADER: i32 = 12;
    SET_HEADER_SIZE.set(&tap, &HEADER)?;
    // The order of the host, where it is little-endian, which some architectures' kernels have no request for.
    match SET_LITTLE_ENDIAN.set(&tap, &1) {
        Err(_) if cfg!(target_endian = "little") => Ok(()),
        result => result,
    }
}

/// Whether there is an interface `name` in the network namespace of this thread.
///
/// # Errors
/// `EINVAL` for what is no name of an interface; those of making a socket.
pub fn exists(name: &str) -> Result<bool, Errno> {
    interface(name)?;
    match netdevice::name_to_index(&socket()?, name) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::NODEV) => Ok(false),
        Err(error) => Err(from(error)),
    }
}

/// Whether the descriptor is a queue of the interface `name` that has headers.
///
/// # Errors
/// `EBADFD` for a queue whose interface is gone; `ENOTTY`, `EINVAL` for another file.
pub fn is_queue_of(tap: impl AsFd, name: &str) -> Result<bool, Errno> {
    let mut request = interface("")?;
    // SAFETY: the argument is a `struct ifreq`, which the driver writes, and which lives during the call.
    unsafe { ioctl::call(tap, TUNGETIFF, (&raw mut request).expose_provenance()) }?;
    // SAFETY: the driver has written the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR;
    Ok(request.ifr_name == interface(name)?.ifr_name && flags & wanted == wanted)
}

/// Whether the descriptor is a queue that has headers, of an interface that exists.
///
/// # Errors
/// As [`is_queue_of`]; `ENOLINK` for a queue of macvtap whose interface is gone.
pub fn is_queue(tap: impl AsFd) -> Result<bool, Errno> {
    let mut request = interface("")?;
    // SAFETY: the argument is a `struct ifreq`, which the driver writes, and which lives during the call.
    unsafe { ioctl::call(tap, TUNGETIFF, (&raw mut request).expose_provenance()) }?;
    // SAFETY: the driver has written the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    let wanted = libc::IFF_TAP | libc::IFF_VNET_HDR;
    Ok(flags & wanted == wanted)
}

/// Whether the interface of this queue outlives its descriptors.
///
/// # Errors
/// As [`is_queue_of`].
pub fn is_persistent(tap: impl AsFd) -> Result<bool, Errno> {
    let mut request = interface("")?;
    // SAFETY: the argument is a `struct ifreq`, which the driver writes, and which lives during the call.
    unsafe { ioctl::call(tap, TUNGETIFF, (&raw mut request).expose_provenance()) }?;
    // SAFETY: the driver has written the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    Ok(flags & libc::IFF_PERSIST != 0)
}

/// Sets which packets the interface may hand to its reader: [`offload`].
///
/// # Errors
/// `EINVAL` for offloads that the kernel does not have, and for segments without checksums.
pub fn set_offloads(tap: impl AsFd, offloads: u32) -> Result<(), Errno> {
    // SAFETY: the argument is a number, and no memory is accessed.
    unsafe { ioctl::call(tap, TUNSETOFFLOAD, offloads as usize) }.map(drop)
}

/// Attaches a queue to its interface, or detaches it: packets are spread over attached queues only, and those in a queue that is
/// detached are dropped. Blocks for one grace period of RCU.
///
/// # Errors
/// `EINVAL` for a queue that is in this state already, and for an interface with one queue.
pub fn set_attached(tap: impl AsFd, attached: bool) -> Result<(), Errno> {
    let mut request = interface("")?;
    set_flags(&mut request, if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
    // SAFETY: the argument is a `struct ifreq`, which the driver reads, and which lives during the call.
    unsafe { ioctl::call(tap, TUNSETQUEUE, (&raw mut request).expose_provenance()) }.map(drop)
}

/// Sets the carrier of the interface, as its host sees it.
///
/// # Errors
/// `EINVAL` before Linux 5.0.
pub fn set_carrier(tap: impl AsFd, carrier: bool) -> Result<(), Errno> {
    SET_CARRIER.set(tap, &i32::from(carrier))
}

/// Sets the MTU of an interface, and has it up.
///
/// # Errors
/// `ENODEV`; `EPERM` without `CAP_NET_ADMIN`; `EINVAL` for an MTU that it cannot have.
pub fn bring_up(name: &str, mtu: u16) -> Result<(), Errno> {
    const SIOCGIFFLAGS: u32 = 0x8913;
    const SIOCSIFFLAGS: u32 = 0x8914;
    const SIOCSIFMTU: u32 = 0x8922;
    let socket = socket()?;
    let mut request = interface(name)?;
    request.ifr_ifru.ifru_mtu = mtu.into();
    // SAFETY: the argument is a `struct ifreq`, which the kernel reads, and which lives during the call.
    unsafe { ioctl::call(&socket, SIOCSIFMTU, (&raw mut request).expose_provenance()) }?;
    // SAFETY: as above; the kernel writes it.
    unsafe { ioctl::call(&socket, SIOCGIFFLAGS, (&raw mut request).expose_provenance()) }?;
    // SAFETY: the kernel has written the flags.
    let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
    set_flags(&mut request, flags | libc::IFF_UP);
    // SAFETY: as the first one.
    unsafe { ioctl::call(&socket, SIOCSIFFLAGS, (&raw mut request).expose_provenance()) }.map(drop)
}

/// Reads one packet with its header, first into `guest`, ranges of mappings in `memory`, and what is left of it into `own`. Returns its
/// length, which is that of all the memory for one that is longer. Does not block. `guest` is as before when this returns.
///
/// # Errors
/// `EAGAIN` when there is no packet; `EFAULT` for a range outside of `memory`; `EINVAL` for more than [`MAX_IOVECS`] ranges;
/// `EBADFD` for a queue whose interface is gone, or that is detached.
pub fn read(
    tap: impl AsFd,
    guest: &mut Vec<IoVec>,
    memory: &MemorySet,
    own: &mut [u8],
) -> Result<usize, Errno> {
    check(guest, memory)?;
    guest.push(IoVec { addr: own.as_mut_ptr().expose_provenance(), len: own.len() });
    let (iov, count) = list(guest);
    // SAFETY: `guest` is laid out as an array of `count` iovecs; each but the last lies inside a `StableMemory`, which allows the kernel
    // to access it at any time and which exists during this call, and the last one is `own`, which is borrowed for it.
    let moved = unsafe { libc::readv(tap.as_fd().as_raw_fd(), iov, count) };
    let result = usize::try_from(moved).map_err(|_| errno::last());
    guest.pop();
    result
}

/// Writes one packet: `header`, then the bytes of `guest`, ranges of mappings in `memory`. Does not block. `guest` is as before when this
/// returns.
///
/// # Errors
/// As [`read`]; `EAGAIN` when the interface has too many packets; `EINVAL` for a header that does not fit the packet; `EIO` when the
/// interface is down.
pub fn write(tap: impl AsFd, header: &[u8], guest: &mut Vec<IoVec>, memory: &MemorySet) -> Result<(), Errno> {
    check(guest, memory)?;
    guest.insert(0, IoVec { addr: header.as_ptr().expose_provenance(), len: header.len() });
    let (iov, count) = list(guest);
    // SAFETY: as in `read`; the first range is `header`, which the kernel only reads.
    let moved = unsafe { libc::writev(tap.as_fd().as_raw_fd(), iov, count) };
    let result = if moved < 0 { Err(errno::last()) } else { Ok(()) };
    guest.remove(0);
    result
}

fn check(guest: &[IoVec], memory: &MemorySet) -> Result<(), Errno> {
    if guest.len() >= MAX_IOVECS {
        return Err(Errno::INVAL);
    }
    if guest.iter().all(|&iovec| memory.covers(iovec)) { Ok(()) } else { Err(Errno::FAULT) }
}

/// A list of less than 2^31 ranges for the kernel.
fn list(iovecs: &[IoVec]) -> (*const libc::iovec, libc::c_int) {
    (iovecs.as_ptr().cast(), libc::c_int::try_from(iovecs.len()).unwrap_or(0))
}

/// A request about the interface `name`.
fn interface(name: &str) -> Result<libc::ifreq, Errno> {
    // SAFETY: a structure of numbers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte ends the name.
    if name.len() >= request.ifr_name.len()
        || name.bytes().any(|byte| byte == 0 || byte == b'/' || byte == b'%')
    {
        return Err(Errno::INVAL);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed() as libc::c_char;
    }
    Ok(request)
}

/// Flags of an interface, whose field is a short.
fn set_flags(request: &mut libc::ifreq, flags: i32) {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "all flags are in 16 bits, the highest one is the sign"
    )]
    let short = flags as libc::c_short;
    request.ifr_ifru.ifru_flags = short;
}

fn socket() -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(from)
}

fn from(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(
            (TUNSETIFF, TUNSETOFFLOAD, TUNGETIFF, TUNSETQUEUE),
            (0x4004_54ca, 0x4004_54d0, 0x8004_54d2, 0x4004_54d9)
        );
    }

    #[test]
    fn names_are_checked() {
        assert!(interface("tap0").is_ok() && interface("123456789012345").is_ok());
        for wrong in ["1234567890123456", "a/b", "tap%d", "a\0"] {
            assert_eq!(interface(wrong).err(), Some(Errno::INVAL), "{wrong}");
        }
        let open_it = Open { multi_queue: false, create: false };
        assert_eq!(open("no-such-tap", open_it).err(), Some(Errno::NODEV));
    }
}
