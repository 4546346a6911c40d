//! The floor: the smallest server for these requests, as a measure of what the hardware and the kernel allow.
//!
//! It trusts its client, which is the same program. It checks no index and no length, requires three descriptors per request, and
//! supports only reads, writes and one queue. Like the other servers it is a process of its own. Reads use io_uring with
//! registered buffers and a registered file; writes use `pwrite`, since io_uring hands writes to buffered files to a thread.
//! Without a file it answers requests without carrying them out.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use io_uring::{IoUring, opcode, types};
use rustix::event::{PollFd, PollFlags, poll};
use vdpa_sys::mmap::SharedMap;
use virtio_driver::VirtioFeatureFlags;

use crate::client::Result;
use crate::trusting::{Memory, Message, Ring};

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
        let Some(mut message) = Message::receive(&mut self.stream)? else { return Ok(false) };
        let mut value = None;
        match message.request {
            1 => value = Some(FEATURES),
            // REPLY_ACK, CONFIG, CONFIGURE_MEM_SLOTS.
            15 => value = Some(1 << 3 | 1 << 9 | 1 << 15),
            36 => value = Some(32),
            8 => self.ring.size = usize::try_from(message.word(0) >> 32)?,
            9 => self.ring.set_areas([1, 3, 2].map(|at| self.memory.local(message.word(at)))),
            12 => self.kick = message.fd(),
            13 => self.call = message.fd(),
            // Padding, guest address, size, address in the client, offset.
            37 => {
                let fd = message.fd().ok_or("memory without a descriptor")?;
                self.memory.add(&fd, message.word(4), message.word(2), message.word(3))?;
            }
            _ => {}
        }
        message.answer(&mut self.stream, value)?;
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
            while let Some(request) = self.next() {
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
                        self.complete(head, status.get(head).copied().unwrap_or(0), failed);
                    }
                }
            }
            self.ring.publish(&call)?;
        }
    }

    /// Takes the next request: its header, its data and its status have a descriptor each.
    fn next(&mut self) -> Option<Request> {
        let head = self.ring.pop()?;
        let (header, _, next) = self.ring.descriptor(head);
        let (data, len, next) = self.ring.descriptor(next?);
        let (status, ..) = self.ring.descriptor(next?);
        let header = self.memory.local(header);
        let (region, data) = self.memory.find(data);
        Some(Request {
            head,
            // The header need not be aligned.
            sector: u64::from_le_bytes(Ring::read(header + 8)),
            write: Ring::read::<u8>(header) == 1,
            data,
            region,
            len,
            status: self.memory.local(status),
        })
    }

    /// Answers a request.
    fn complete(&mut self, head: usize, status: usize, failed: bool) {
        Ring::write(status, u8::from(failed));
        self.ring.complete(head, 0);
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
            self.complete(request.head, request.status, false);
            return Ok(false);
        };
        let offset = request.sector * 512;
        if request.write {
            let data = std::ptr::with_exposed_provenance::<u8>(request.data);
            // SAFETY: in a mapping of this session; the client does not touch the bytes until the request is answered.
            let bytes = unsafe { std::slice::from_raw_parts(data, request.len as usize) };
            let written = rustix::io::pwrite(disk, bytes, offset);
            self.complete(request.head, request.status, written != Ok(bytes.len()));
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

fn iovec(map: &SharedMap) -> libc::iovec {
    libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(map.addr()), iov_len: map.len() }
}
