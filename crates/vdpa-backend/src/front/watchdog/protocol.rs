//! The protocol that a server speaks to its [watchdog](super) over a pipe: heartbeats, and which mounts and devices to abort
//! when the heartbeats stop.
//!
//! Each message ends with a NUL. `.` is a heartbeat, `z` idle, `q` a shutdown in order, `+` and `-` are followed by a mount
//! or device to watch or not to watch any more ([`Watched`]).

use std::ffi::OsStr;
use std::io::PipeWriter;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{debug, error, warn};
use vdpa_sys::fuse::Connections;
use vdpa_sys::fuse::cuse::Number;

/// Maximum length of a message in bytes: a pipe takes no more in one piece (`PIPE_BUF`).
const MESSAGE_MAX: usize = 4096;

/// A mount or device whose clients wait uninterruptibly for as long as its server does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::front) enum Watched {
    /// A FUSE mount, over a directory or a file: absolute and free of symbolic links.
    Mount(PathBuf),
    /// A character device.
    Device { name: String, number: Number },
}

impl Watched {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Mount(path) => [b"m", path.as_os_str().as_bytes()].concat(),
            Self::Device { name, number: Number { major, minor } } => {
                format!("d{major}:{minor}:{name}").into_bytes()
            }
        }
    }

    fn decode(message: &[u8]) -> Option<Self> {
        match message.split_first()? {
            (b'm', path) => Some(Self::Mount(OsStr::from_bytes(path).into())),
            (b'd', rest) => {
                let mut parts = str::from_utf8(rest).ok()?.splitn(3, ':');
                let (major, minor) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
                Some(Self::Device { name: parts.next()?.to_owned(), number: Number { major, minor } })
            }
            _ => None,
        }
    }
}

/// A message to the watchdog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::front) enum Message {
    /// The server's reader makes progress. The first one arms the watchdog.
    Heartbeat,
    /// No request is in progress, and no heartbeat follows before there is one. Until then the watchdog asks the kernel for
    /// requests that wait.
    Idle,
    /// The server has ended in order: what is mounted at its paths from now on belongs to another program.
    Shutdown,
    /// This mount or device exists, or is about to.
    Watch(Watched),
    /// This mount or device has ended in order.
    Unwatch(Watched),
}

impl Message {
    fn encode(&self) -> Vec<u8> {
        let mut message = match self {
            Self::Heartbeat => b".".to_vec(),
            Self::Idle => b"z".to_vec(),
            Self::Shutdown => b"q".to_vec(),
            Self::Watch(watched) => [b"+", &*watched.encode()].concat(),
            Self::Unwatch(watched) => [b"-", &*watched.encode()].concat(),
        };
        message.push(0);
        message
    }

    fn decode(message: &[u8]) -> Option<Self> {
        match message.split_first()? {
            (b'.', []) => Some(Self::Heartbeat),
            (b'z', []) => Some(Self::Idle),
            (b'q', []) => Some(Self::Shutdown),
            (b'+', rest) => Watched::decode(rest).map(Self::Watch),
            (b'-', rest) => Watched::decode(rest).map(Self::Unwatch),
            _ => None,
        }
    }
}

/// Decodes messages from a stream of bytes. Has the bytes of the incomplete last message.
#[derive(Debug, Default)]
pub(in crate::front) struct Decoder(Vec<u8>);

impl Decoder {
    /// Takes more bytes and returns the messages that are complete now. Malformed messages are skipped.
    pub(in crate::front) fn read(&mut self, bytes: &[u8]) -> Vec<Message> {
        self.0.extend_from_slice(bytes);
        let Some(end) = self.0.iter().rposition(|byte| *byte == 0) else { return Vec::new() };
        let rest = self.0.split_off(end + 1);
        let whole = std::mem::replace(&mut self.0, rest);
        whole.split(|byte| *byte == 0).filter_map(Message::decode).collect()
    }
}

/// The server's end of the pipe. Any thread may call it; no method blocks.
#[derive(Debug)]
pub(in crate::front) struct WatchdogLink {
    /// `None` without a watchdog.
    pipe: Mutex<Option<PipeWriter>>,
    /// Minimum time between two heartbeats.
    interval: Duration,
    /// Whether the watchdog can see requests that wait, so that heartbeats are needed only while one is in progress.
    idle_allowed: bool,
    last: Mutex<LastSent>,
}

/// The last heartbeat or idle message.
#[derive(Clone, Copy, Debug)]
enum LastSent {
    Nothing,
    Heartbeat(Instant),
    Idle,
}

impl WatchdogLink {
    /// Sends at most one heartbeat per `interval`. Without a pipe it sends nothing.
    ///
    /// # Errors
    /// Those of making the pipe non-blocking: a watchdog that is stopped must not block the server.
    pub(in crate::front) fn new(pipe: Option<PipeWriter>, interval: Duration) -> std::io::Result<Self> {
        let mut idle_allowed = true;
        if let Some(pipe) = &pipe {
            rustix::io::ioctl_fionbio(pipe, true)?;
            // The watchdog process has the same permissions, so what fails here fails there.
            idle_allowed = Connections::open()
                .inspect_err(|errno| debug!(%errno, "the kernel's list of connections cannot be read; a heartbeat every {interval:?}"))
                .is_ok();
        }
        Ok(Self { pipe: Mutex::new(pipe), interval, idle_allowed, last: Mutex::new(LastSent::Nothing) })
    }

    /// Longest time between two calls of [`WatchdogLink::heartbeat`] while a request is in progress.
    pub(in crate::front) const fn interval(&self) -> Duration {
        self.interval
    }

    /// Sends a heartbeat, unless one was sent less than an interval ago.
    pub(in crate::front) fn heartbeat(&self) {
        let mut last = self.last.lock();
        if !matches!(*last, LastSent::Heartbeat(sent) if sent.elapsed() < self.interval) {
            *last = LastSent::Heartbeat(Instant::now());
            self.send(&Message::Heartbeat);
        }
    }

    /// Sends that the server is idle; `false` when the watchdog needs heartbeats even then.
    pub(in crate::front) fn idle(&self) -> bool {
        let mut last = self.last.lock();
        if !self.idle_allowed || matches!(*last, LastSent::Idle) {
            return self.idle_allowed;
        }
        // A watchdog that did not get the message expects a heartbeat.
        let delivered = self.send(&Message::Idle);
        if delivered {
            *last = LastSent::Idle;
        }
        delivered
    }

    /// Sends a message; `false` when there is a watchdog and the message was not delivered.
    pub(in crate::front) fn send(&self, message: &Message) -> bool {
        let mut pipe = self.pipe.lock();
        let Some(open) = &*pipe else { return true };
        let bytes = message.encode();
        if bytes.len() > MESSAGE_MAX {
            warn!(?message, "the message is too long for the watchdog and is not sent");
            return false;
        }
        match rustix::io::write(open, &bytes) {
            Ok(_) => return true,
            // The pipe is full because the watchdog is slow. These two are sent again later; others are not.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR)
                if matches!(message, Message::Heartbeat | Message::Idle) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                warn!(?message, "the watchdog does not read its pipe; the message is lost");
            }
            Err(error) => {
                error!(%error, "the watchdog has ended: if this process stops, its clients hang");
                *pipe = None;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<Message> {
        let mount = Watched::Mount("/run/a q.:/-+".into());
        let device =
            Watched::Device { name: "vhost-vdpa/a:b".into(), number: Number { major: 511, minor: 3 } };
        vec![
            Message::Watch(mount.clone()),
            Message::Heartbeat,
            Message::Watch(device.clone()),
            Message::Unwatch(mount),
            Message::Unwatch(device),
            Message::Idle,
            Message::Shutdown,
        ]
    }

    #[test]
    fn messages_arrive_however_the_pipe_splits_them() {
        let bytes: Vec<u8> = messages().iter().flat_map(Message::encode).collect();
        for size in 1..=bytes.len() {
            let mut reader = Decoder::default();
            let got: Vec<Message> = bytes.chunks(size).flat_map(|chunk| reader.read(chunk)).collect();
            assert_eq!(got, messages(), "in pieces of {size}");
        }
    }

    #[test]
    fn a_watchdog_that_does_not_read_gets_heartbeats_and_no_idle() {
        let (_read, write) = std::io::pipe().unwrap();
        let link = WatchdogLink::new(Some(write), Duration::from_secs(1)).unwrap();
        if !link.idle_allowed {
            // Only root can read the kernel's list.
            assert!(!link.idle());
            return;
        }
        assert!(link.idle() && link.idle());
        while link.send(&Message::Heartbeat) {}
        assert!(link.idle(), "that was delivered");
        link.heartbeat();
        assert!(!link.idle(), "that was not");
    }

    #[test]
    fn malformed_messages_are_skipped() {
        let mut reader = Decoder::default();
        let bytes = b"x\0\0..\0+\0+d1\0+d1:x:n\0-z\0q\0";
        assert_eq!(reader.read(bytes), [Message::Shutdown]);
    }

    #[test]
    fn a_path_too_long_for_one_write_is_not_cut() {
        use std::io::Read;
        let (mut read, write) = std::io::pipe().unwrap();
        let link = WatchdogLink::new(Some(write), Duration::from_secs(1)).unwrap();
        link.send(&Message::Watch(Watched::Mount("x".repeat(MESSAGE_MAX).into())));
        link.send(&Message::Shutdown);
        drop(link);
        let mut all = Vec::new();
        read.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"q\0");
    }
}
