//! Children without exec: with a copy of memory and descriptors (fork), or with the memory itself (vfork). For tests of how
//! a device recognises its owner.
//!
//! In a forked child of a multi-threaded program, a lock that another thread held at the fork stays locked for ever. So the
//! child runs no closure. It serves requests in a fixed loop that makes system calls on memory allocated before the fork,
//! and neither allocates nor locks.
#![expect(unsafe_code, reason = "fork(2), clone(2) and what their children may do")]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, WaitOptions, waitpid};
use vdpa_core::Errno;

use crate::errno;
use crate::fence::Fence;
use crate::ioctl::request;
use crate::vhost_vdpa::VhostVdpaFd;

/// Longest argument of a request, in bytes.
pub const ARGUMENT_MAX: usize = 512;
/// Bytes before the argument: operation and ioctl number in a request, the result in an answer.
const HEADER: usize = 8;
const PACKET: usize = HEADER + ARGUMENT_MAX;
const OP_CALL: u32 = 0;
const OP_IOCTL: u32 = 1;
const OP_WRITE: u32 = 2;
/// How long the parent waits for the answer to one request.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Stack of a vforked child in bytes; it makes one system call.
const STACK: usize = 64 * 1024;

/// The result of a request: the inner one is the device's; the outer error says why the child could not make the request.
pub type Answer = Result<Result<i32, Errno>, Errno>;

/// A forked child that makes requests of a device through the descriptor it inherited. Dropping it ends the child and waits
/// for it.
#[derive(Debug)]
pub struct Forked {
    pid: Pid,
    socket: Option<OwnedFd>,
}

impl Forked {
    /// Forks. The child keeps copies of all descriptors of this process until it is dropped. Without a device
    /// all requests fail with `EBADF`, for tests that need only another address space.
    ///
    /// # Errors
    /// `EAGAIN`, `ENOMEM`, `EMFILE`.
    pub fn start(device: Option<&VhostVdpaFd>) -> Result<Self, Errno> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(errno::from_rustix)?;
        set_socket_timeout(&ours, Timeout::Recv, Some(TIMEOUT)).map_err(errno::from_rustix)?;
        let fence = Fence::with_room(ARGUMENT_MAX)?;
        let device = device.map_or(-1, |device| device.as_fd().as_raw_fd());
        let (others, socket) = (ours.as_raw_fd(), theirs.as_raw_fd());
        // SAFETY: the child runs `serve` and nothing else, which keeps to what is allowed there and never returns.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            serve(device, others, socket, &fence);
        }
        let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0).ok_or_else(errno::last)?;
        Ok(Self { pid, socket: Some(ours) })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// An ioctl without an argument.
    ///
    /// # Errors
    /// The outer error: those of send(2) and recv(2), `EAGAIN` when the child does not answer within 20 s.
    pub fn call(&self, cmd: u32) -> Answer {
        self.ask(OP_CALL, cmd, &mut [])
    }

    /// An ioctl with `bytes`, at most [`ARGUMENT_MAX`], as its argument; they are updated.
    ///
    /// # Errors
    /// The outer error: those of send(2) and recv(2), `EAGAIN` when the child does not answer within 20 s; `EMSGSIZE` for a longer argument.
    pub fn ioctl(&self, cmd: u32, bytes: &mut [u8]) -> Answer {
        self.ask(OP_IOCTL, cmd, bytes)
    }

    /// Writes these bytes, at most [`ARGUMENT_MAX`], to the device.
    ///
    /// # Errors
    /// The outer error: those of send(2) and recv(2), `EAGAIN` when the child does not answer within 20 s; `EMSGSIZE` for more bytes.
    pub fn write(&self, bytes: &[u8]) -> Answer {
        let mut copy = [0; ARGUMENT_MAX];
        let copy = copy.get_mut(..bytes.len()).ok_or(Errno::MSGSIZE)?;
        copy.copy_from_slice(bytes);
        self.ask(OP_WRITE, 0, copy)
    }

    fn ask(&self, op: u32, cmd: u32, bytes: &mut [u8]) -> Answer {
        let socket = self.socket.as_ref().ok_or(Errno::BADF)?;
        let mut packet = [0; PACKET];
        let len = HEADER + bytes.len();
        let request = packet.get_mut(..len).ok_or(Errno::MSGSIZE)?;
        put_header(request, op, cmd);
        request.get_mut(HEADER..).unwrap_or_default().copy_from_slice(bytes);
        send(socket, request, SendFlags::NOSIGNAL).map_err(errno::from_rustix)?;
        let (got, _) = recv(socket, packet.as_mut_slice(), RecvFlags::empty()).map_err(errno::from_rustix)?;
        if got != len {
            return Err(Errno::IO);
        }
        bytes.copy_from_slice(packet.get(HEADER..len).unwrap_or_default());
        let (failed, value) = header(&packet);
        let value = value.cast_signed();
        Ok(if failed == 0 { Ok(value) } else { Err(Errno::from_raw(value)) })
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        // The child ends when its socket is closed.
        drop(self.socket.take());
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
    }
}

fn put_header(packet: &mut [u8], first: u32, second: u32) {
    let (low, high) = (first.to_ne_bytes(), second.to_ne_bytes());
    packet.iter_mut().zip(low.into_iter().chain(high)).for_each(|(to, from)| *to = from);
}

fn header(packet: &[u8; PACKET]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h, ..] = *packet;
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// The forked child: serves requests until the socket is closed. It makes system calls only. A panic aborts it (`extern "C"`),
/// since it must not unwind into the code that forked.
extern "C" fn serve(device: c_int, others: c_int, socket: c_int, fence: &Fence) -> ! {
    let mut packet = [0_u8; PACKET];
    // SAFETY: the number is the copy of the parent's end in this process, where nothing else runs that could use
    // it. It must go, or the child would keep its own input open.
    unsafe { libc::close(others) };
    loop {
        // SAFETY: `packet` is writable for its length.
        let got = unsafe { libc::recv(socket, packet.as_mut_ptr().cast(), PACKET, 0) };
        let got = usize::try_from(got).unwrap_or(0);
        let (op, cmd) = header(&packet);
        let Some(bytes) = packet.get_mut(HEADER..got) else {
            // SAFETY: ends this process at once, without the clean-up that belongs to the parent.
            unsafe { libc::_exit(0) };
        };
        let argument = fence.copy_in(bytes);
        // SAFETY: a vhost-vdpa device accesses only memory from its argument upward (none for OP_CALL), which is
        // in `fence`, of this process alone; `write` reads as many bytes as were copied there.
        let value = unsafe {
            match op {
                OP_IOCTL => i64::from(libc::ioctl(device, request(cmd), argument)),
                OP_WRITE => {
                    libc::write(device, std::ptr::with_exposed_provenance(argument), bytes.len()) as i64
                }
                _ => i64::from(libc::ioctl(device, request(cmd), 0)),
            }
        };
        fence.copy_out(bytes);
        // SAFETY: the address of this thread's errno is always valid.
        let failure = unsafe { *libc::__errno_location() };
        match i32::try_from(value) {
            Ok(value) if value >= 0 => put_header(&mut packet, 0, value.cast_unsigned()),
            _ => put_header(&mut packet, 1, failure.cast_unsigned()),
        }
        // SAFETY: `got` bytes of `packet` are readable: so many were received into it.
        let sent = unsafe { libc::send(socket, packet.as_ptr().cast(), got, libc::MSG_NOSIGNAL) };
        if sent < 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(1) };
        }
    }
}

/// The request of a vforked child, and its result.
struct Job {
    device: c_int,
    cmd: u32,
    argument: usize,
    result: i32,
    errno: c_int,
}

/// Makes one ioctl in a child that shares the memory of this process, as after vfork(2). Blocks until the child has ended.
///
/// # Errors
/// The outer error, when the child cannot be created: `EAGAIN`, `ENOMEM`.
pub fn vfork_ioctl(device: &VhostVdpaFd, cmd: u32, bytes: &mut [u8]) -> Answer {
    let fence = Fence::new(bytes)?;
    let mut job =
        Job { device: device.as_fd().as_raw_fd(), cmd, argument: fence.start(), result: -1, errno: 0 };
    let mut stack = vec![0_u128; STACK / size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let unblocked = block_signals();
    // SAFETY: the stack is this child's alone, and grows down from its end, which is aligned to 16 bytes. `job` and
    // `stack` outlive the child: CLONE_VFORK holds this thread until it has ended, which is also why both may use
    // the errno of one thread. Signals are blocked, so that no handler runs in the child.
    let pid = unsafe {
        libc::clone(one_ioctl, stack.as_mut_ptr_range().end.cast(), flags, (&raw mut job).cast::<c_void>())
    };
    let failure = errno::last();
    restore_signals(&unblocked);
    let Some(pid) = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0) else {
        return Err(failure);
    };
    let _ = waitpid(Some(pid), WaitOptions::empty());
    fence.copy_out(bytes);
    Ok(if job.result >= 0 { Ok(job.result) } else { Err(Errno::from_raw(job.errno)) })
}

extern "C" fn one_ioctl(job: *mut c_void) -> c_int {
    // SAFETY: the pointer is that of the job in `vfork_ioctl`, which waits, so this is the only access to it. The
    // device accesses memory from its argument upward only, which is in the fence there.
    unsafe {
        let job = &mut *job.cast::<Job>();
        job.result = libc::ioctl(job.device, request(job.cmd), job.argument);
        job.errno = *libc::__errno_location();
    }
    0
}

fn block_signals() -> libc::sigset_t {
    let (mut all, mut old) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: sigfillset makes a set of what it is given, and pthread_sigmask stores one in `old`; it cannot fail
    // with SIG_BLOCK, and after it both are initialised.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), old.as_mut_ptr());
        old.assume_init()
    }
}

fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: the set is the one that `block_signals` got from the same call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, old, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> VhostVdpaFd {
        let fd = crate::memfd::create(c"no-device", 0, None).unwrap();
        rustix::io::write(&fd, bytes).unwrap();
        VhostVdpaFd::from_fd(fd)
    }

    #[test]
    fn a_forked_child_uses_the_descriptor_it_inherited() {
        // FIONREAD and the write show that both see one open file: the child's writes move the position.
        const FIONREAD: u32 = 0x541B;
        let device = file(b"abc");
        let child = Forked::start(Some(&device)).unwrap();
        assert_ne!(child.pid(), i32::try_from(std::process::id()).unwrap());
        assert_eq!(child.write(b"12345"), Ok(Ok(5)));
        assert_eq!(rustix::fs::tell(&device), Ok(8));
        rustix::fs::seek(&device, rustix::fs::SeekFrom::Start(2)).unwrap();
        let mut left = [0xff; 4];
        assert_eq!(child.ioctl(FIONREAD, &mut left), Ok(Ok(0)));
        assert_eq!(u32::from_ne_bytes(left), 6);
        assert_eq!(child.call(0xAF01), Ok(Err(Errno::NOTTY)));
        assert_eq!(child.write(&[0; ARGUMENT_MAX + 1]), Err(Errno::MSGSIZE));
    }

    #[test]
    fn a_forked_child_ends_with_its_handle() {
        let child = Forked::start(None).unwrap();
        let pid = child.pid();
        assert_eq!(child.call(0xAF01), Ok(Err(Errno::BADF)));
        drop(child);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_vforked_child_writes_into_this_process() {
        const FIONREAD: u32 = 0x541B;
        let device = file(b"abcd");
        rustix::fs::seek(&device, rustix::fs::SeekFrom::Start(1)).unwrap();
        let mut left = [0xff; 4];
        assert_eq!(vfork_ioctl(&device, FIONREAD, &mut left), Ok(Ok(0)));
        assert_eq!(u32::from_ne_bytes(left), 3);
        assert_eq!(vfork_ioctl(&device, 0xAF01, &mut []), Ok(Err(Errno::NOTTY)));
    }
}
