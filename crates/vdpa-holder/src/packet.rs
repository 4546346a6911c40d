//! Packets with descriptors, between processes of one service.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vdpa_core::Errno;

use crate::protocol::ITEMS_MAX;

/// The bytes of a packet, and the descriptors that came with it.
pub type Packet = (Vec<u8>, Vec<OwnedFd>);

/// A pair of connected sockets that keep packets apart, closed on exec.
///
/// # Errors
/// `EMFILE`, `ENFILE`, `ENOMEM`.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(errno)
}

/// Sends a packet, with at most [`ITEMS_MAX`] descriptors. Does not wait for room.
///
/// # Errors
/// `EAGAIN`: the other side reads nothing; `EPIPE` when it has ended; `EMSGSIZE`.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(ITEMS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(errno(error)),
        }
    }
}

/// Receives a packet of at most `MAX` bytes with its descriptors; with `wait` blocks until one is there. `Ok(None)` when the other
/// side has closed its end. The rest of a longer packet is lost.
///
/// # Errors
/// `EAGAIN`. Descriptors beyond the limit of this process are missing: whoever needs them finds that, and can answer.
pub fn receive<const MAX: usize>(socket: impl AsFd, wait: bool) -> Result<Option<Packet>, Errno> {
    let mut bytes = [0; MAX];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(ITEMS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    flags.set(RecvFlags::DONTWAIT, !wait);
    let came = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            result => break result.map_err(errno)?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            fds.extend(some);
        }
    }
    if came.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((bytes.get(..came.bytes).unwrap_or_default().to_vec(), fds)))
}

pub(crate) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}
