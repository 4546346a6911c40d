//! Messages between predecessor and successor on a Unix stream socket, with descriptors.
//!
//! A message is a header of 16 bytes and a payload. Its descriptors are sent before it, in messages of their own, since the
//! kernel limits how many one message carries. The two sides usually run different versions of the program, so each header
//! has the version of the protocol. `docs/saved-state.md` describes the messages.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_passcred, socket_domain, socket_peercred, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, recvmsg, sendmsg,
};
use thiserror::Error;
use vdpa_core::Errno;

use super::Cancel;
use crate::state::MAX_PAYLOAD;

/// Version of the protocol, in each header.
const PROTOCOL: u16 = 1;
const MAGIC: [u8; 4] = *b"VDPH";
const HEADER: usize = 16;
/// The kernel passes at most 253 descriptors at once (`SCM_MAX_FD`).
const FDS_AT_ONCE: usize = 200;
/// Limit on the descriptors of one message, so that a peer cannot make this process hold any number of them.
const FDS_MAX: usize = 1 << 16;

/// Why a message could not be sent to or received from the peer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The descriptor is not a Unix stream socket.
    #[error("the descriptor is not a Unix stream socket")]
    NotUnixStream,
    /// The peer runs as a user that may not have the devices.
    #[error("the other side runs as user {uid}; only root{} may take part", users(*.own, *.allowed))]
    ForbiddenUser {
        /// User of the peer.
        uid: u32,
        /// User of this process, which is always allowed.
        own: u32,
        /// The further user that is allowed: [`Plan::allow_uid`](super::Plan::allow_uid), or the argument of
        /// [`Incoming::receive_from`](super::Incoming::receive_from).
        allowed: Option<u32>,
    },
    /// The peer closed the connection or has ended.
    #[error("the other side is gone")]
    Closed,
    /// The peer did not answer before the deadline.
    #[error("the other side has not answered in time")]
    TimedOut,
    /// [`Cancel::cancel`] was called.
    #[error("it was cancelled")]
    Cancelled,
    /// The peer sent something that this version of the protocol does not allow.
    #[error("the other side does not speak this protocol: {what}")]
    Protocol {
        /// How the message violates the protocol.
        what: String,
    },
    /// The kernel dropped descriptors of a message (`MSG_CTRUNC`), usually because of RLIMIT_NOFILE.
    #[error("not all descriptors could be received; RLIMIT_NOFILE may be too low here")]
    Descriptors,
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// The action for which it was made.
        action: &'static str,
        /// Error of the system call.
        source: Errno,
    },
}

fn users(own: u32, allowed: Option<u32>) -> String {
    allowed.map_or_else(|| format!(" and user {own}"), |uid| format!(", user {own} and user {uid}"))
}

fn system(action: &'static str) -> impl Fn(rustix::io::Errno) -> ConnectionError {
    move |e| ConnectionError::System { action, source: Errno::from_raw(e.raw_os_error()) }
}

/// Kind of a message; the numbers are those on the wire. Listed in `docs/saved-state.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the successor: carries descriptors of the next message.
    Descriptors = 1,
    /// To the successor: everything that is known before the switch.
    Offer = 2,
    /// To the predecessor: everything is understood and mapped.
    Ready = 3,
    /// To the predecessor: the successor does not want the devices; with the reason.
    Refused = 4,
    /// To the successor: the rest of the state; the devices are stopped as their strategies say.
    Switch = 5,
    /// To the predecessor: the devices are taken over.
    Taken = 6,
    /// To the predecessor: taking over failed; the successor holds nothing any more.
    Failed = 7,
    /// To the successor: the devices are the successor's.
    Commit = 8,
    /// To the successor: release the devices.
    Abort = 9,
    /// To the predecessor: the successor has released the devices.
    Aborted = 10,
    /// To the predecessor: the commit was received; with the report of the update. From here on the successor drives the
    /// devices.
    Done = 11,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Descriptors,
        Self::Offer,
        Self::Ready,
        Self::Refused,
        Self::Switch,
        Self::Taken,
        Self::Failed,
        Self::Commit,
        Self::Abort,
        Self::Aborted,
        Self::Done,
    ];
}

/// One message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) kind: Kind,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
    /// Process id of the sender, from the kernel (`SCM_CREDENTIALS`). It may differ from [`Connection::peer`], which is the
    /// process that made the connection: a socket can be passed on, and a service manager listens for the programs it starts.
    pub(super) sender: Option<i32>,
}

/// Control messages received with the bytes.
#[derive(Debug, Default)]
struct Ancillary {
    fds: Vec<OwnedFd>,
    sender: Option<i32>,
}

/// How long to wait, and what ends the wait early.
#[derive(Clone, Copy, Default)]
pub(super) struct Wait<'a> {
    pub(super) until: Option<Instant>,
    pub(super) cancel: Option<&'a Cancel>,
    /// Pidfd of the peer: readable when the process has ended.
    pub(super) process: Option<BorrowedFd<'a>>,
    /// Busy-poll for [`BUSY_POLL`] before sleeping. For answers that devices wait for: waking a thread on an idle CPU takes
    /// longer than the rest of a message. The thread yields between two tries.
    pub(super) busy_poll: bool,
}

/// How long to busy-poll, with [`Wait::busy_poll`].
const BUSY_POLL: Duration = Duration::from_micros(300);

/// One end of the connection between predecessor and successor.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    partial: Mutex<Partial>,
}

/// The part of a message that has arrived.
#[derive(Debug, Default)]
struct Partial {
    header: [u8; HEADER],
    /// Bytes of the header that are there.
    have: usize,
    /// Kind and length, once the header is complete.
    head: Option<(Kind, u64)>,
    payload: Vec<u8>,
    /// Bytes of the payload that are there.
    filled: usize,
    ancillary: Ancillary,
    /// Whether the peer has announced that a message comes soon.
    announced: bool,
}

/// A message that is being sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Bytes, and the descriptors that go with the first of them.
    parts: VecDeque<(Vec<u8>, Range<usize>)>,
    /// Bytes of the first part that are sent.
    sent: usize,
}

impl Outgoing {
    pub(super) fn new(kind: Kind, payload: &[u8], fds: usize) -> Self {
        let pieces = (0..fds).step_by(FDS_AT_ONCE).map(|at| at..fds.min(at + FDS_AT_ONCE));
        let mut parts: VecDeque<_> =
            pieces.map(|piece| (header(Kind::Descriptors, 0).to_vec(), piece)).collect();
        parts.push_back(([&header(kind, payload.len() as u64), payload].concat(), 0..0));
        Self { parts, sent: 0 }
    }

    pub(super) fn is_sent(&self) -> bool {
        self.parts.is_empty()
    }
}

/// The process that made the connection, from the kernel (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    pub(super) pid: i32,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Result<Self, ConnectionError> {
        let unix = socket_domain(&socket).is_ok_and(|family| family == AddressFamily::UNIX);
        let stream = socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
        if !unix || !stream {
            return Err(ConnectionError::NotUnixStream);
        }
        // The kernel adds the sender to each message if either end has set this option.
        set_socket_passcred(&socket, true).map_err(system("ask for the sender of messages"))?;
        Ok(Self { socket, partial: Mutex::default() })
    }

    /// The peer, if its user may take part: root, the user of this process, or `allowed`.
    pub(super) fn peer(&self, allowed: Option<u32>) -> Result<Peer, ConnectionError> {
        let credentials = socket_peercred(&self.socket).map_err(system("ask who is at the other end"))?;
        let uid = credentials.uid.as_raw();
        let own = rustix::process::geteuid().as_raw();
        if !may_take_part(uid, own, allowed) {
            return Err(ConnectionError::ForbiddenUser { uid, own, allowed });
        }
        Ok(Peer { pid: credentials.pid.as_raw_nonzero().get() })
    }

    pub(super) fn send(
        &self,
        kind: Kind,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        wait: Wait<'_>,
    ) -> Result<(), ConnectionError> {
        let mut message = Outgoing::new(kind, payload, fds.len());
        while !self.try_send(&mut message, fds)? {
            self.wait(PollFlags::OUT, wait)?;
        }
        Ok(())
    }

    /// Sends as much of a message as is possible without waiting; returns whether that was all. `fds` are its descriptors, the
    /// same in each call.
    pub(super) fn try_send(
        &self,
        message: &mut Outgoing,
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, ConnectionError> {
        while let Some((bytes, range)) = message.parts.front() {
            let rest = bytes.get(message.sent..).unwrap_or_default();
            if rest.is_empty() {
                message.parts.pop_front();
                message.sent = 0;
                continue;
            }
            let fds = if message.sent == 0 { fds.get(range.clone()).unwrap_or_default() } else { &[] };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.socket, &[IoSlice::new(rest)], &mut control, flags) {
                Ok(sent) => message.sent += sent,
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ConnectionError::Closed);
                }
                Err(e) => return Err(system("send to the other side")(e)),
            }
        }
        Ok(true)
    }

    /// Wakes a peer that waits in [`receive`](Self::receive), so that it busy-polls when the next message comes. Does not
    /// block. An optimization only: errors are ignored.
    pub(super) fn announce(&self) {
        let _ = self.try_send(
            &mut Outgoing { parts: VecDeque::from([(header(Kind::Descriptors, 0).to_vec(), 0..0)]), sent: 0 },
            &[],
        );
    }

    pub(super) fn receive(&self, wait: Wait<'_>) -> Result<Message, ConnectionError> {
        loop {
            if let Some(message) = self.receive_soon(wait.busy_poll)? {
                return Ok(message);
            }
            self.wait(PollFlags::IN, wait)?;
        }
    }

    /// The next message if it is there, or comes while this busy-polls: for [`BUSY_POLL`], when `busy_poll` or when the peer has
    /// announced it. What has arrived of a message is kept.
    pub(super) fn receive_soon(&self, busy_poll: bool) -> Result<Option<Message>, ConnectionError> {
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let mut until = busy_poll.then(|| Instant::now() + BUSY_POLL);
        loop {
            if let Some(message) = self.try_receive(&mut partial)? {
                return Ok(Some(message));
            }
            if std::mem::take(&mut partial.announced) {
                until = Some(Instant::now() + BUSY_POLL);
            }
            if until.is_none_or(|until| Instant::now() >= until) {
                return Ok(None);
            }
            rustix::thread::sched_yield();
        }
    }

    fn try_receive(&self, partial: &mut Partial) -> Result<Option<Message>, ConnectionError> {
        loop {
            let Partial { header, have, head, payload, filled, ancillary, announced } = &mut *partial;
            let Some((kind, len)) = *head else {
                let rest = header.get_mut(*have..).unwrap_or_default();
                if !rest.is_empty() {
                    let Some(count) = self.read(rest, ancillary)? else { return Ok(None) };
                    *have += count;
                    continue;
                }
                let (kind, len) = parse(header)?;
                *have = 0;
                if ancillary.fds.len() > FDS_MAX {
                    return Err(ConnectionError::Protocol {
                        what: format!("more than {FDS_MAX} descriptors"),
                    });
                }
                if kind == Kind::Descriptors {
                    *announced = true;
                } else {
                    *head = Some((kind, len));
                }
                continue;
            };
            if (*filled as u64) < len {
                if *filled == payload.len() {
                    // In pieces of 1 MiB, so that a false length cannot make this process allocate it all.
                    let rest = usize::try_from(len - *filled as u64).unwrap_or(usize::MAX);
                    payload.resize(*filled + rest.min(1 << 20), 0);
                }
                let piece = payload.get_mut(*filled..).unwrap_or_default();
                let Some(count) = self.read(piece, ancillary)? else { return Ok(None) };
                *filled += count;
                continue;
            }
            let Partial { payload, ancillary: Ancillary { fds, sender }, .. } = std::mem::take(partial);
            return Ok(Some(Message { kind, payload, fds, sender }));
        }
    }

    /// Reads some bytes; `None` when there are none yet.
    fn read(&self, bytes: &mut [u8], ancillary: &mut Ancillary) -> Result<Option<usize>, ConnectionError> {
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = loop {
            match recvmsg(&self.socket, &mut [IoSliceMut::new(bytes)], &mut control, flags) {
                Ok(received) => break received,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Err(e) => return Err(system("receive from the other side")(e)),
            }
        };
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(some) => ancillary.fds.extend(some),
                RecvAncillaryMessage::ScmCredentials(sender) => {
                    ancillary.sender = Some(sender.pid.as_raw_nonzero().get());
                }
                _ => {}
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ConnectionError::Descriptors);
        }
        if received.bytes == 0 {
            return Err(ConnectionError::Closed);
        }
        Ok(Some(received.bytes))
    }

    fn wait(&self, flags: PollFlags, wait: Wait<'_>) -> Result<(), ConnectionError> {
        loop {
            let left = wait.until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(ConnectionError::TimedOut);
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = vec![PollFd::new(&self.socket, flags)];
            if let Some(cancel) = wait.cancel {
                fds.push(PollFd::new(cancel, PollFlags::IN));
            }
            let cancel_at = wait.cancel.map(|_| 1);
            if let Some(process) = &wait.process {
                fds.push(PollFd::new(process, PollFlags::IN));
            }
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(system("wait for the other side")(e)),
            }
            let ready = |at: usize| fds.get(at).is_some_and(|fd| !fd.revents().is_empty());
            // Received bytes come first: a process may have sent its answer and ended.
            if ready(0) {
                return Ok(());
            }
            if cancel_at.is_some_and(ready) {
                return Err(ConnectionError::Cancelled);
            }
            if wait.process.is_some() && ready(fds.len() - 1) {
                return Err(ConnectionError::Closed);
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether a peer with this user id may take part in an update. The messages carry descriptors of devices and memory, which
/// give full access to the devices.
fn may_take_part(uid: u32, own: u32, allowed: Option<u32>) -> bool {
    uid == 0 || uid == own || allowed == Some(uid)
}

fn header(kind: Kind, len: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    let parts = MAGIC.into_iter().chain(PROTOCOL.to_le_bytes()).chain((kind as u16).to_le_bytes());
    bytes.iter_mut().zip(parts.chain(len.to_le_bytes())).for_each(|(to, from)| *to = from);
    bytes
}

fn parse(bytes: &[u8; HEADER]) -> Result<(Kind, u64), ConnectionError> {
    let protocol = |what: String| ConnectionError::Protocol { what };
    let [m0, m1, m2, m3, v0, v1, k0, k1, len @ ..] = *bytes;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(protocol("its message begins with something else".to_owned()));
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != PROTOCOL {
        return Err(protocol(format!("version {version}, here it is {PROTOCOL}")));
    }
    let number = u16::from_le_bytes([k0, k1]);
    let kind = Kind::ALL
        .into_iter()
        .find(|&kind| kind as u16 == number)
        .ok_or_else(|| protocol(format!("message {number}")))?;
    let len = u64::from_le_bytes(len);
    if len > MAX_PAYLOAD + crate::state::HEADER_LEN as u64 {
        return Err(protocol(format!("a message of {len} bytes")));
    }
    Ok((kind, len))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use vdpa_sys::eventfd::EventFd;

    use super::*;

    fn pair() -> (Connection, Connection) {
        let (a, b) = UnixStream::pair().unwrap();
        (Connection::new(a.into()).unwrap(), Connection::new(b.into()).unwrap())
    }

    fn ten_seconds() -> Wait<'static> {
        Wait { until: Some(Instant::now() + Duration::from_secs(10)), ..Wait::default() }
    }

    #[test]
    fn messages_arrive_with_all_their_descriptors() {
        let (a, b) = pair();
        let files: Vec<EventFd> = (0..450).map(|_| EventFd::new().unwrap()).collect();
        let payload = vec![7; 3 << 20];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                a.send(Kind::Offer, &payload, &fds, ten_seconds()).unwrap();
            });
            let message = b.receive(ten_seconds()).unwrap();
            assert_eq!((message.kind, message.payload.len(), message.fds.len()), (Kind::Offer, 3 << 20, 450));
            for (sent, received) in files.iter().zip(message.fds) {
                sent.signal();
                assert_eq!(EventFd::from_fd(received).unwrap().drain(), 1);
            }
        });
        assert_eq!(b.peer(None).unwrap().pid, i32::try_from(std::process::id()).unwrap());
    }

    #[test]
    fn waiting_ends_by_time_by_cancel_and_by_the_end() {
        let (a, b) = pair();
        let now = Wait { until: Some(Instant::now()), ..Wait::default() };
        assert!(matches!(b.receive(now), Err(ConnectionError::TimedOut)));
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let wait = Wait { cancel: Some(&cancel), ..ten_seconds() };
        assert!(matches!(b.receive(wait), Err(ConnectionError::Cancelled)));
        a.send(Kind::Ready, b"", &[], ten_seconds()).unwrap();
        drop(a);
        assert_eq!(b.receive(wait).unwrap().kind, Kind::Ready);
        assert!(matches!(b.receive(ten_seconds()), Err(ConnectionError::Closed)));
        assert!(matches!(b.send(Kind::Ready, b"", &[], ten_seconds()), Err(ConnectionError::Closed)));
    }

    #[test]
    fn root_the_same_user_and_one_more_may_take_part() {
        assert!(may_take_part(0, 1000, None) && may_take_part(1000, 1000, None));
        assert!(may_take_part(1001, 1000, Some(1001)));
        assert!(!may_take_part(1001, 1000, None) && !may_take_part(1000, 0, None));
        assert!(!may_take_part(1002, 1000, Some(1001)));
        let text = |allowed| ConnectionError::ForbiddenUser { uid: 1002, own: 1000, allowed }.to_string();
        assert_eq!(text(None), "the other side runs as user 1002; only root and user 1000 may take part");
        assert_eq!(
            text(Some(1001)),
            "the other side runs as user 1002; only root, user 1000 and user 1001 may take part"
        );
    }

    #[test]
    fn the_document_lists_every_kind() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/saved-state.md");
        let document = std::fs::read_to_string(path).unwrap();
        let (_, protocol) = document.split_once("## Hand-over protocol").unwrap();
        let kind = |line: &str| {
            let (number, name) = line.strip_prefix("| ")?.split_once(" |")?.0.split_once(' ')?;
            Some((number.parse::<u16>().ok()?, name.to_owned()))
        };
        let documented: Vec<_> = protocol.lines().filter_map(kind).collect();
        let in_code: Vec<_> =
            Kind::ALL.into_iter().map(|kind| (kind as u16, format!("{kind:?}").to_lowercase())).collect();
        assert_eq!(documented, in_code);
    }

    #[test]
    fn what_is_not_the_protocol_is_refused() {
        assert!(matches!(parse(b"GET / HTTP/1.1\r\n"), Err(ConnectionError::Protocol { .. })));
        let mut other = header(Kind::Offer, 0);
        other[4] = 9;
        assert!(parse(&other).unwrap_err().to_string().contains("version 9, here it is 1"));
        assert!(parse(&header(Kind::Offer, MAX_PAYLOAD + 25)).is_err());
        for kind in Kind::ALL {
            assert_eq!(parse(&header(kind, 5)).unwrap(), (kind, 5));
        }
        let (reading, _writing) = std::io::pipe().unwrap();
        assert!(matches!(Connection::new(reading.into()), Err(ConnectionError::NotUnixStream)));
    }
}
