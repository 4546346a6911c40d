//! [`Passing`]: a connection over which descriptors come with requests.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// Most descriptors of a request: a network card has as many pairs of queues.
const PASSED_MAX: usize = 8;

/// The descriptors that have come over a connection and were not used. Closed with it.
#[derive(Clone, Debug, Default)]
pub(super) struct Passed(Arc<Mutex<Vec<OwnedFd>>>);

impl Passed {
    /// What came with this request, or before it.
    pub(super) fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// A connection whose [`Passed`] descriptors are kept, and those beyond [`PASSED_MAX`] closed.
#[derive(Debug)]
pub(super) struct Passing {
    stream: UnixStream,
    /// `None`: all are closed. Whoever may not use them must not fill the table of this process.
    passed: Option<Passed>,
}

impl Passing {
    pub(super) const fn new(stream: UnixStream, passed: Option<Passed>) -> Self {
        Self { stream, passed }
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(PASSED_MAX))];
        let mut control = match self.passed {
            Some(_) => RecvAncillaryBuffer::new(&mut space),
            // The kernel closes what has no room.
            None => RecvAncillaryBuffer::default(),
        };
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let came = recvmsg(&self.stream, &mut [IoSliceMut::new(into)], &mut control, flags)?;
        let Some(passed) = &self.passed else { return Ok(came.bytes) };
        let mut passed = passed.0.lock();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                let room = PASSED_MAX.saturating_sub(passed.len());
                passed.extend(some.take(room));
            }
        }
        Ok(came.bytes)
    }
}

impl AsyncRead for Passing {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            let bytes = into.initialize_unfilled();
            match self.stream.try_io(Interest::READABLE, || self.receive(bytes)) {
                Ok(read) => {
                    into.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Passing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
