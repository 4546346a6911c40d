//! What the floors have in common: the messages of vhost-user, and a ring without any check. They trust their client, which is the same
//! program.

use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vdpa_sys::mmap::{Prot, SharedMap};

use crate::client::Result;

/// A message of the client.
pub(crate) struct Message {
    pub(crate) request: u32,
    flags: u32,
    payload: Vec<u8>,
    fd: Option<OwnedFd>,
}

impl Message {
    /// The next one; `None` when the client has disconnected.
    pub(crate) fn receive(stream: &mut UnixStream) -> Result<Option<Self>> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got =
            recvmsg(&*stream, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        if got.bytes == 0 {
            return Ok(None);
        }
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let field =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, size) = (field(0), field(4), field(8));
        let mut payload = vec![0; usize::try_from(size)?];
        std::io::Read::read_exact(stream, &mut payload)?;
        Ok(Some(Self { request, flags, payload, fd }))
    }

    /// A number of its payload, in units of 8 bytes.
    pub(crate) fn word(&self, index: usize) -> u64 {
        let bytes = self.payload.get(index * 8..).and_then(|bytes| bytes.first_chunk::<8>());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// The descriptor that came with it.
    pub(crate) const fn fd(&mut self) -> Option<OwnedFd> {
        self.fd.take()
    }

    /// Answers with a value, or with success where the client wants an answer.
    pub(crate) fn answer(&self, stream: &mut UnixStream, value: Option<u64>) -> Result<()> {
        const NEED_REPLY: u32 = 1 << 3;
        if value.is_some() || self.flags & NEED_REPLY != 0 {
            let head = [self.request, 1 | 1 << 2, 8].map(u32::to_le_bytes).concat();
            stream.write_all(&[head, value.unwrap_or(0).to_le_bytes().to_vec()].concat())?;
        }
        Ok(())
    }
}

/// The client's memory, mapped into this process.
#[derive(Default)]
pub(crate) struct Memory {
    /// The address in the client, and the mapping.
    pub(crate) regions: Vec<(u64, SharedMap)>,
}

impl Memory {
    /// Maps a region that has the address `theirs` in the client.
    pub(crate) fn add(&mut self, fd: &OwnedFd, offset: u64, len: u64, theirs: u64) -> Result<()> {
        let map = SharedMap::map(fd, offset, usize::try_from(len)?, Prot::RW, true)?;
        self.regions.push((theirs, map));
        Ok(())
    }

    pub(crate) fn find(&self, addr: u64) -> (usize, usize) {
        for (index, (theirs, map)) in self.regions.iter().enumerate() {
            let offset = usize::try_from(addr.wrapping_sub(*theirs)).unwrap_or(usize::MAX);
            if offset < map.len() {
                return (index, map.addr() + offset);
            }
        }
        // Unchecked by design: an invalid address of the client crashes this process.
        (0, 0)
    }

    pub(crate) fn local(&self, addr: u64) -> usize {
        self.find(addr).1
    }
}

/// A split ring by address, without any check.
#[derive(Default)]
pub(crate) struct Ring {
    pub(crate) size: usize,
    desc: usize,
    avail: usize,
    used: usize,
    last: u16,
    next: u16,
    published: u16,
}

impl Ring {
    pub(crate) fn set_areas(&mut self, areas: [usize; 3]) {
        [self.desc, self.avail, self.used] = areas;
    }

    /// Reads a value that the client has written.
    pub(crate) fn read<T: Copy>(addr: usize) -> T {
        // SAFETY: the client, which is this program, gave the addresses of its rings and headers; they are in mappings
        // of the session, and it wrote these bytes before it published the index that led here.
        unsafe { std::ptr::with_exposed_provenance::<T>(addr).read_volatile() }
    }

    pub(crate) fn write<T>(addr: usize, value: T) {
        // SAFETY: as for `read`; the bytes are the device's to write.
        unsafe { std::ptr::with_exposed_provenance_mut::<T>(addr).write_volatile(value) }
    }

    fn index(addr: usize) -> &'static AtomicU16 {
        // SAFETY: an aligned index of the client's rings, see `read`; not used after the session.
        unsafe { AtomicU16::from_ptr(std::ptr::with_exposed_provenance_mut(addr)) }
    }

    /// Takes the next chain: the index of its first descriptor.
    pub(crate) fn pop(&mut self) -> Option<usize> {
        if Self::index(self.avail + 2).load(Ordering::Acquire) == self.last {
            return None;
        }
        let slot = usize::from(self.last) % self.size;
        self.last = self.last.wrapping_add(1);
        Some(usize::from(Self::read::<u16>(self.avail + 4 + slot * 2)))
    }

    /// Gives the chain back that was taken last.
    pub(crate) const fn unpop(&mut self) {
        self.last = self.last.wrapping_sub(1);
    }

    /// Address and length of a descriptor, and the index of the next one if it has one.
    pub(crate) fn descriptor(&self, index: usize) -> (u64, u32, Option<usize>) {
        let at = self.desc + index * 16;
        let next = Self::read::<u16>(at + 12) & 1 != 0;
        (Self::read(at), Self::read(at + 8), next.then(|| usize::from(Self::read::<u16>(at + 14))))
    }

    /// Completes a chain, of which `written` bytes were written.
    pub(crate) fn complete(&mut self, head: usize, written: u32) {
        let at = self.used + 4 + usize::from(self.next) % self.size * 8;
        Self::write(at, u32::try_from(head).unwrap_or(0));
        Self::write(at + 4, written);
        self.next = self.next.wrapping_add(1);
    }

    /// Publishes the completed requests, and signals the client if it requested that.
    pub(crate) fn publish(&mut self, call: &OwnedFd) -> Result<()> {
        if self.next == self.published {
            return Ok(());
        }
        Self::index(self.used + 2).store(self.next, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = Self::index(self.avail + 4 + self.size * 2).load(Ordering::Relaxed);
        let since = self.next.wrapping_sub(self.published);
        if self.next.wrapping_sub(event).wrapping_sub(1) < since {
            rustix::io::write(call, &1u64.to_ne_bytes())?;
        }
        self.published = self.next;
        Ok(())
    }

    /// Enables kicks. Returns whether the ring is still empty.
    pub(crate) fn enable_kick(&self) -> bool {
        Self::index(self.used + 4 + self.size * 8).store(self.last, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Self::index(self.avail + 2).load(Ordering::Acquire) == self.last
    }
}
