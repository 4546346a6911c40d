//! The floor: the smallest server for these requests, as a measure of what the hardware and the kernel allow.
//!
//! It trusts its client, which is the same program. It checks no index and no length, requires three descriptors per request, and
//! supports only reads, writes and one queue. Like the other servers it is a process of its own. Reads use io_uring with
//! registered buffers and a registered file; writes use `pwrite`, since io_uring hands writes to buffered files to a thread.
//! Without a file it answers requests without carrying them out.

use std::fs::File;
use std::io::{IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use io_uring::{IoUring, opcode, types};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vdpa_sys::mmap::{Prot, SharedMap};
use virtio_driver::VirtioFeatureFlags;

use crate::client::Result;

/// The last bit is VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 =
    VirtioFeatureFlags::VERSION_1.bits() | VirtioFeatureFlags::RING_EVENT_IDX.bits() | 1 << 30;
const ENTRIES: u32 = 256;
const KICK: u64 = u64::MAX;
const DISCONNECTED: u64 = u64::MAX - 1;

/// Serves one client after the other, for ever.
pub(crate) fn serve(socket: &Path, disk: Option<&File>) -> Result<()> {
    for stream in UnixListener::bind(socket)?.incoming() {
        let served = stream.map_err(Into::into).and_then(|stream| Session::new(stream).run(disk));
        if let Err(error) = served {
            eprintln!("bench-io: floor: {error}");
        }
    }
    Ok(())
}

/// One client: its vhost-user connection, its memory and its ring.
struct Session {
    stream: UnixStream,
    memory: Memory,
    ring: Ring,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
}

impl Session {
    fn new(stream: UnixStream) -> Self {
        Self { stream, memory: Memory::default(), ring: Ring::default(), kick: None, call: None }
    }

    /// Answers vhost-user messages until the first kick, and then serves the ring.
    fn run(mut self, disk: Option<&File>) -> Result<()> {
        loop {
            let mut fds = vec![PollFd::new(&self.stream, PollFlags::IN)];
            fds.extend(self.kick.as_ref().map(|kick| PollFd::new(kick, PollFlags::IN)));
            poll(&mut fds, None)?;
            let kicked = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            if kicked {
                return self.serve(disk);
            }
            if !self.message()? {
                return Ok(());
            }
        }
    }

    /// Handles one message; `false` when the client has disconnected. Supports the messages that virtio-driver sends, in any order.
    fn message(&mut self) -> Result<bool> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        if got.bytes == 0 {
            return Ok(false);
        }
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let field =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, size) = (field(0), field(4), field(8));
        let mut payload = vec![0; usize::try_from(size)?];
        std::io::Read::read_exact(&mut self.stream, &mut payload)?;
        let word = |index: usize| {
            let bytes = payload.get(index * 8..).and_then(|bytes| bytes.first_chunk::<8>());
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let mut value = None;
        match request {
            1 => value = Some(FEATURES),
            // REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS.
            15 => value = Some(1 << 3 | 1 << 9 | 1 << 15),
            36 => value = Some(32),
            8 => self.ring.size = usize::try_from(word(0) >> 32)?,
            9 => self.ring.set_areas([1, 3, 2].map(|at| self.memory.local(word(at)))),
            12 => self.kick = fd,
            13 => self.call = fd,
            // Padding, guest address, size, address in the client, offset.
            37 => {
                let fd = fd.ok_or("memory without a descriptor")?;
                let map = SharedMap::map(&fd, word(4), usize::try_from(word(2))?, Prot::RW, true)?;
                self.memory.regions.push((word(3), map));
            }
            _ => {}
        }
        const NEED_REPLY: u32 = 1 << 3;
        if value.is_some() || flags & NEED_REPLY != 0 {
            let head = [request, 1 | 1 << 2, 8].map(u32::to_le_bytes).concat();
            self.stream.write_all(&[head, value.unwrap_or(0).to_le_bytes().to_vec()].concat())?;
        }
        Ok(true)
    }

    fn serve(mut self, disk: Option<&File>) -> Result<()> {
        let mut builder = IoUring::builder();

        builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun();
        let mut uring = builder.build(ENTRIES)?;
        if let Some(disk) = disk {
            uring.submitter().register_files(&[disk.as_raw_fd()])?;
            let regions: Vec<_> = self.memory.regions.iter().map(|(_, map)| iovec(map)).collect();
            // SAFETY: the regions are mappings of this session, which outlive the ring, and no reference to their bytes
            // is made.
            unsafe { uring.submitter().register_buffers(&regions) }?;
        }
        let kick = self.kick.take().ok_or("no kick eventfd")?;
        let call = self.call.take().ok_or("no call eventfd")?;
        for (fd, token) in [(kick.as_raw_fd(), KICK), (self.stream.as_raw_fd(), DISCONNECTED)] {
            let entry = opcode::PollAdd::new(types::Fd(fd), 1).multi(true).build().user_data(token);
            // SAFETY: a poll uses no memory.
            unsafe { uring.submission().push(&entry) }?;
        }
        let mut status = vec![0; self.ring.size];
        let mut in_flight = 0usize;
        loop {
            while let Some(request) = self.ring.pop(&self.memory) {
                in_flight += usize::from(self.start(&mut uring, disk, &request, &mut status)?);
            }
            self.ring.publish(&call)?;
            let idle = in_flight == 0 && self.ring.enable_kick();
            uring.submit_and_wait(usize::from(idle || in_flight > 0))?;
            for completion in uring.completion() {
                match completion.user_data() {
                    KICK => {}
                    DISCONNECTED => return Ok(()),
                    head => {
                        in_flight -= 1;
                        let head = usize::try_from(head)?;
                        let failed = completion.result() <= 0;
                        self.ring.complete(head, status.get(head).copied().unwrap_or(0), failed);
                    }
                }
            }
            self.ring.publish(&call)?;
        }
    }

    /// Starts or completes a request. Returns whether it is in flight.
    fn start(
        &mut self,
        uring: &mut IoUring,
        disk: Option<&File>,
        request: &Request,
        status: &mut [usize],
    ) -> Result<bool> {
        let Some(disk) = disk else {
            self.ring.complete(request.head, request.status, false);
            return Ok(false);
        };
        let offset = request.sector * 512;
        if request.write {
            let data = std::ptr::with_exposed_provenance::<u8>(request.data);
            // SAFETY: in a mapping of this session; the client does not touch the bytes until the request is answered.
            let bytes = unsafe { std::slice::from_raw_parts(data, request.len as usize) };
            let written = rustix::io::pwrite(disk, bytes, offset);
            self.ring.complete(request.head, request.status, written != Ok(bytes.len()));
            return Ok(false);
        }
        let to = std::ptr::with_exposed_provenance_mut(request.data);
        let buffer = u16::try_from(request.region)?;
        let entry = opcode::ReadFixed::new(types::Fixed(0), to, request.len, buffer)
            .offset(offset)
            .build()
            .user_data(request.head as u64);
        status[request.head] = request.status;
        // SAFETY: the bytes are in a mapping of this session that is registered with this ring; see `serve`.
        if unsafe { uring.submission().push(&entry) }.is_err() {
            uring.submit()?;
            // SAFETY: as before.
            unsafe { uring.submission().push(&entry) }?;
        }
        Ok(true)
    }
}

struct Request {
    head: usize,
    sector: u64,
    write: bool,
    data: usize,
    /// Index of the region with the data.
    region: usize,
    len: u32,
    status: usize,
}

/// The client's memory, mapped into this process.
#[derive(Default)]
struct Memory {
    /// The address in the client, and the mapping.
    regions: Vec<(u64, SharedMap)>,
}

impl Memory {
    fn find(&self, addr: u64) -> (usize, usize) {
        for (index, (theirs, map)) in self.regions.iter().enumerate() {
            let offset = usize::try_from(addr.wrapping_sub(*theirs)).unwrap_or(usize::MAX);
            if offset < map.len() {
                return (index, map.addr() + offset);
            }
        }
        // Unchecked by design: an invalid address of the client crashes this process.
        (0, 0)
    }

    fn local(&self, addr: u64) -> usize {
        self.find(addr).1
    }
}

fn iovec(map: &SharedMap) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(map.addr()), iov_len: map.len() }
}

/// A split ring by address, without any check.
#[derive(Default)]
struct Ring {
    size: usize,
    desc: usize,
    avail: usize,
    used: usize,
    last: u16,
    next: u16,
    published: u16,
}

impl Ring {
    fn set_areas(&mut self, areas: [usize; 3]) {
        [self.desc, self.avail, self.used] = areas;
    }

    /// Reads a value that the client has written.
    fn read<T: Copy>(addr: usize) -> T {
        // SAFETY: the client, which is this program, gave the addresses of its rings and headers; they are in mappings
        // of the session, and it wrote these bytes before it published the index that led here.
        unsafe { std::ptr::with_exposed_provenance::<T>(addr).read_volatile() }
    }

    fn write<T>(addr: usize, value: T) {
        // SAFETY: as for `read`; the bytes are the device's to write.
        unsafe { std::ptr::with_exposed_provenance_mut::<T>(addr).write_volatile(value) }
    }

    fn index(addr: usize) -> &'static AtomicU16 {
        // SAFETY: an aligned index of the client's rings, see `read`; not used after the session.
        unsafe { AtomicU16::from_ptr(std::ptr::with_exposed_provenance_mut(addr)) }
    }

    fn pop(&mut self, memory: &Memory) -> Option<Request> {
        if Self::index(self.avail + 2).load(Ordering::Acquire) == self.last {
            return None;
        }
        let slot = usize::from(self.last) % self.size;
        let head = usize::from(Self::read::<u16>(self.avail + 4 + slot * 2));
        self.last = self.last.wrapping_add(1);
        let descriptor = |index: usize| {
            let at = self.desc + index * 16;
            (Self::read::<u64>(at), Self::read::<u32>(at + 8), usize::from(Self::read::<u16>(at + 14)))
        };
        let (header, _, next) = descriptor(head);
        let (data, len, next) = descriptor(next);
        let (status, ..) = descriptor(next);
        let header = memory.local(header);
        let (region, data) = memory.find(data);
        Some(Request {
            head,
            // The header need not be aligned.
            sector: u64::from_le_bytes(Self::read(header + 8)),
            write: Self::read::<u8>(header) == 1,
            data,
            region,
            len,
            status: memory.local(status),
        })
    }

    fn complete(&mut self, head: usize, status: usize, failed: bool) {
        Self::write(status, u8::from(failed));
        let at = self.used + 4 + usize::from(self.next) % self.size * 8;
        Self::write(at, u32::try_from(head).unwrap_or(0));
        self.next = self.next.wrapping_add(1);
    }

    /// Publishes the completed requests, and signals the client if it requested that.
    fn publish(&mut self, call: &OwnedFd) -> Result<()> {
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
    fn enable_kick(&self) -> bool {
        Self::index(self.used + 4 + self.size * 8).store(self.last, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Self::index(self.avail + 2).load(Ordering::Acquire) == self.last
    }
}
