//! The service manager: readiness, and its file descriptor store for when both processes die
//! (`sd_notify(3)`, `sd_listen_fds(3)`).

use std::ffi::OsString;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, sendmsg_addr, socket_with,
};
use rustix::pipe::PipeFlags;
use vdpa_core::Errno;
use vdpa_sys::inherit;

use crate::protocol::Kind;
use crate::socket::errno;

/// First descriptor that a service manager passes.
const FIRST: RawFd = 3;
/// Longest name of a stored descriptor.
const NAME_MAX: usize = 255;

/// How long the service manager may take to read what waits in its socket, which has room for ten messages at the least. Once it has
/// taken longer, it is not waited for until it has read something.
const PATIENCE: Duration = Duration::from_millis(500);

/// The connection to the service manager.
#[derive(Debug)]
pub struct Store {
    socket: OwnedFd,
    addr: SocketAddrUnix,
    slow: AtomicBool,
    /// How often the manager wants to hear that this process works (`WatchdogSec=`), and when it heard it last.
    watchdog: Option<(Duration, AtomicU64)>,
}

/// A third of the time in which the service manager wants to hear from this process; `None` if it does not.
fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(|usec| Duration::from_micros(usec / 3))
}

/// A descriptor that came back from the store.
#[derive(Debug)]
pub struct Restored {
    /// Its key, kind and record, or its name when that is not one of [`name`].
    pub what: Result<(u64, Kind, Vec<u8>), String>,
    /// It.
    pub fd: OwnedFd,
}

impl Store {
    /// The service manager that `NOTIFY_SOCKET` names, if it does.
    ///
    /// # Errors
    /// `EINVAL` for an address that is none.
    pub fn from_env() -> Result<Option<Self>, Errno> {
        std::env::var_os("NOTIFY_SOCKET").map(Self::at).transpose()
    }

    fn at(address: OsString) -> Result<Self, Errno> {
        let bytes = address.as_bytes();
        let addr = match bytes.split_first() {
            Some((b'@', name)) => SocketAddrUnix::new_abstract_name(name),
            _ => SocketAddrUnix::new(bytes),
        };
        let addr = addr.map_err(errno)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(errno)?;
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).map_err(errno)?;
        let watchdog = watchdog().map(|every| (every, AtomicU64::new(0)));
        Ok(Self { socket, addr, slow: AtomicBool::new(false), watchdog })
    }

    /// Sends a notification, such as `READY=1`. Waits 0.5 s at most.
    ///
    /// # Errors
    /// `EAGAIN` when the manager is slow; `ECONNREFUSED` without one.
    pub fn notify(&self, text: &str) -> Result<(), Errno> {
        self.send(text, &[])
    }

    /// The time until [`feed`](Self::feed) is to be called again; `None` without a watchdog. `now_ns` is `CLOCK_MONOTONIC`.
    pub(crate) fn watchdog_left(&self, now_ns: u64) -> Option<Duration> {
        let (every, fed) = self.watchdog.as_ref()?;
        let since = Duration::from_nanos(now_ns.saturating_sub(fed.load(Ordering::Relaxed)));
        Some(every.saturating_sub(since))
    }

    /// Tells the manager's watchdog that this process works, if it is time.
    pub(crate) fn feed(&self, now_ns: u64) {
        if self.watchdog_left(now_ns) != Some(Duration::ZERO) {
            return;
        }
        if let Some((_, fed)) = &self.watchdog {
            fed.store(now_ns, Ordering::Relaxed);
        }
        // One that is lost is followed by two more before the time is up.
        let _ = self.notify("WATCHDOG=1");
    }

    /// Stores a copy of `fd`. The manager does not watch it (`FDPOLL=0`).
    ///
    /// # Errors
    /// As [`notify`](Self::notify). A store that is full (`FileDescriptorStoreMax=`) drops it silently.
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), &[fd])
    }

    /// Removes every stored descriptor of that name.
    ///
    /// # Errors
    /// As [`notify`](Self::notify).
    pub fn remove(&self, name: &str) -> Result<(), Errno> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// Waits until the manager has read all that was sent before: a process that ends earlier may not be known as one of its
    /// service any more when its messages are read (`sd_notify_barrier(3)`). Blocks at most `timeout`.
    ///
    /// # Errors
    /// As [`notify`](Self::notify); `ETIMEDOUT`.
    pub fn barrier(&self, timeout: Duration) -> Result<(), Errno> {
        let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(errno)?;
        self.send("BARRIER=1", &[theirs.as_fd()])?;
        // The manager closes its copy, which is the last one then.
        drop(theirs);
        let deadline = Instant::now() + timeout;
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
            let mut fds = [PollFd::new(&ours, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Err(Errno::TIMEDOUT),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(errno(error)),
            }
        }
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::MSGSIZE);
        }
        let mut flags = SendFlags::NOSIGNAL;
        flags.set(SendFlags::DONTWAIT, self.slow.load(Ordering::Relaxed));
        let parts = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg_addr(&self.socket, &self.addr, &parts, &mut control, flags);
        self.slow.store(sent == Err(rustix::io::Errno::AGAIN), Ordering::Relaxed);
        sent.map(drop).map_err(errno)
    }
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The name under which an item is stored, from which it can be known again: key, kind and record. `None` for a ring, which
/// cannot be stored, and for a record that makes it too long.
#[must_use]
pub fn name(key: u64, kind: Kind, record: &[u8]) -> Option<String> {
    let hex: String = record.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("vdpa.{key:x}.{}.{hex}", kind as u32);
    (kind != Kind::Ring && name.len() <= NAME_MAX).then_some(name)
}

/// What a name of [`name`] says.
#[must_use]
pub fn parse_name(name: &str) -> Option<(u64, Kind, Vec<u8>)> {
    let mut parts = name.strip_prefix("vdpa.")?.split('.');
    let key = u64::from_str_radix(parts.next()?, 16).ok()?;
    let kind = Kind::from_number(parts.next()?.parse().ok()?)?;
    let hex = parts.next().filter(|hex| hex.len() % 2 == 0 && hex.is_ascii())?;
    if parts.next().is_some() {
        return None;
    }
    let digits = hex.as_bytes().chunks_exact(2);
    let record = digits.map(|pair| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok());
    Some((key, kind, record.collect::<Option<_>>()?))
}

/// The descriptors that a service manager passed to this process. Once, at the start.
///
/// # Errors
/// `EINVAL` for variables that are no numbers; `EBADF` for descriptors that are not there.
pub fn restored() -> Result<Vec<Restored>, Errno> {
    let number = |name| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<RawFd>().map_err(|_| Errno::INVAL))
    };
    let (Some(pid), Some(count)) = (number("LISTEN_PID"), number("LISTEN_FDS")) else {
        return Ok(Vec::new());
    };
    if u32::try_from(pid?) != Ok(std::process::id()) {
        return Ok(Vec::new());
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').chain(std::iter::repeat(""));
    let count = usize::try_from(count?).map_err(|_| Errno::INVAL)?;
    (FIRST..)
        .zip(names)
        .take(count)
        .map(|(number, name)| {
            let what = parse_name(name).ok_or_else(|| name.to_owned());
            inherit::take(number).map(|fd| Restored { what, fd })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use vdpa_sys::memfd;

    use super::*;

    #[test]
    fn names_carry_an_item() {
        for (key, kind, record) in
            [(0, Kind::Memory, vec![]), (u64::MAX, Kind::Fuse, vec![0, 0xff]), (5, Kind::Other, vec![7; 100])]
        {
            let name = name(key, kind, &record).unwrap();
            assert!(name.len() <= NAME_MAX && !name.contains(':'));
            assert_eq!(parse_name(&name), Some((key, kind, record)));
        }
        assert_eq!((name(1, Kind::Ring, &[]), name(1, Kind::Memory, &[0; 128])), (None, None));
        for wrong in
            ["", "x", "vdpa.1.1", "vdpa.1.9.", "vdpa.1.1.0", "vdpa.1.1.00.", "vdpa.1.1.zz", "vdpa.1.1.é"]
        {
            assert_eq!(parse_name(wrong), None, "{wrong}");
        }
    }

    /// A holder of a later version gets them back from the service manager. `VDPA_WRITE_GOLDEN=1` writes the file where there is
    /// none; it never changes.
    #[test]
    fn the_names_of_version_1_are_read() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/stored-names-v1.txt");
        let items = [
            (0, Kind::Memory, vec![]),
            (u64::MAX, Kind::Memory, vec![]),
            (1, Kind::Fuse, vec![0, 0x7f, 0xff]),
            ((7 << 32) | 16, Kind::Event, vec![9; 20]),
            (3, Kind::Other, vec![1; 100]),
        ];
        if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
            let names = items.iter().map(|(key, kind, record)| name(*key, *kind, record).unwrap() + "\n");
            std::fs::write(&path, names.collect::<String>()).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let found: Vec<_> = text.lines().map(|name| parse_name(name).unwrap()).collect();
        assert_eq!(found, items);
    }

    #[test]
    fn a_manager_that_reads_late_loses_nothing_and_one_that_does_not_read_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        let store = Store::at(path.into_os_string()).unwrap();
        let mut sent = 0;
        while store.notify("X=1").is_ok() {
            sent += 1;
        }
        assert_eq!(store.notify("X=1"), Err(Errno::AGAIN));
        assert!(store.slow.load(Ordering::Relaxed));
        manager.recv(&mut [0; 16]).unwrap();
        assert_eq!(store.notify("X=1"), Ok(()));
        assert!(!store.slow.load(Ordering::Relaxed), "it has read something");
        let reader = std::thread::spawn(move || {
            (0..sent + 100).for_each(|_| assert_eq!(manager.recv(&mut [0; 16]).unwrap(), 3));
        });
        for _ in 0..100 {
            store.notify("X=1").unwrap();
        }
        reader.join().unwrap();
    }

    #[test]
    fn a_manager_gets_descriptors_and_notifications() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        let store = Store::at(path.into_os_string()).unwrap();
        let memory = memfd::sealed(c"state", b"content").unwrap();
        store.notify("READY=1").unwrap();
        store.store("vdpa.1.1.", memory.as_fd()).unwrap();
        store.remove("vdpa.1.1.").unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            let mut bytes = [0; 512];
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let len =
                recvmsg(&manager, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).unwrap().bytes;
            let fds: Vec<_> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .map(|fd| memfd::read_all(fd, 100).unwrap())
                .collect();
            seen.push((String::from_utf8_lossy(&bytes[..len]).into_owned(), fds));
        }
        let none = Vec::<Vec<u8>>::new();
        assert_eq!(seen[0], ("READY=1".into(), none.clone()));
        assert_eq!(seen[1], ("FDSTORE=1\nFDNAME=vdpa.1.1.\nFDPOLL=0".into(), vec![b"content".to_vec()]));
        assert_eq!(seen[2], ("FDSTOREREMOVE=1\nFDNAME=vdpa.1.1.".into(), none));
    }
}
