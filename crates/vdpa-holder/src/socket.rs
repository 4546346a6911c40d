//! Messages of the holder as [packets](crate::packet).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vdpa_core::Errno;

use crate::packet;
pub(crate) use crate::packet::{errno, pair};
use crate::protocol::{MESSAGE_MAX, Message};

/// Sends a message. Does not wait for room: `EAGAIN` means that the other side reads nothing.
pub(crate) fn send(
    socket: impl AsFd,
    number: u32,
    message: &Message,
    fds: &[BorrowedFd<'_>],
) -> Result<(), Errno> {
    packet::send(socket, &message.encode(number), fds)
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
/// `EAGAIN`; `EBADMSG` for what is no message.
pub(crate) fn receive(socket: impl AsFd, wait: bool) -> Result<Option<Received>, Errno> {
    let Some((bytes, fds)) = packet::receive::<MESSAGE_MAX>(socket, wait)? else { return Ok(None) };
    let (number, message) = Message::decode(&bytes).map_err(|error| error.errno())?;
    Ok(Some(Received { number, message, fds }))
}

/// The other side has ended.
pub(crate) const PIPE: Errno = Errno::from_raw(32);
