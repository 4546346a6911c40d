//! Packets with descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use vdpa_core::Errno;

use crate::protocol::{ITEMS_MAX, MESSAGE_MAX, Message};

/// A pair of connected sockets that keep packets apart, closed on exec.
pub(crate) fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(errno)
}

/// Sends a message. Does not wait for room: `EAGAIN` means that the other side reads nothing.
pub(crate) fn send(
    socket: impl AsFd,
    number: u32,
    message: &Message,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    let bytes = message.encode(number);
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(ITEMS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(errno(error)),
        }
    }
}

/// What came.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) number: u32,
    pub(crate) message: Message,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Receives a message; with `wait` blocks until one is there. `Ok(None)` when the other side has closed its end.
///
/// # Errors
/// `EAGAIN`; `EBADMSG` for what is no message. Descriptors beyond the limit of this process are missing: whoever needs
/// them finds that, and can answer.
pub(crate) fn receive(socket: impl AsFd, wait: bool) -> Result<Option<Received>, Errno> {
    let mut bytes = [0; MESSAGE_MAX];
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
    let packet = bytes.get(..came.bytes).unwrap_or_default();
    let (number, message) = Message::decode(packet).map_err(|error| error.errno())?;
    Ok(Some(Received { number, message, fds }))
}

pub(crate) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// The other side has ended.
pub(crate) const PIPE: Errno = Errno::from_raw(32);
