//! [`Passing`]: a connection that sends descriptors with its first bytes.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::UnixStream;

/// Most descriptors of one message: more than a request can have.
const PASSED_MAX: usize = 16;

/// A connection, and what goes with its first bytes.
#[derive(Debug)]
pub(super) struct Passing {
    stream: UnixStream,
    passed: Vec<OwnedFd>,
}

impl Passing {
    pub(super) const fn new(stream: UnixStream, passed: Vec<OwnedFd>) -> Self {
        Self { stream, passed }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let fds: Vec<BorrowedFd<'_>> = self.passed.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(PASSED_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags)?)
    }
}

impl AsyncRead for Passing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Passing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.passed.is_empty() || bytes.is_empty() {
            return Pin::new(&mut self.stream).poll_write(context, bytes);
        }
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            match self.stream.try_io(Interest::WRITABLE, || self.send(bytes)) {
                Ok(sent) => {
                    self.passed.clear();
                    return Poll::Ready(Ok(sent));
                }
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
