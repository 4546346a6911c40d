//! Messages between a holder and its daemon.
//!
//! One packet of a `SOCK_SEQPACKET` socket each, little-endian: the kind (u32), the number of the request that an answer
//! belongs to (u32, 0 for events), then the fields of the kind. Descriptors travel beside the bytes. A request gets one
//! [`Answer`](Message::Answer), [`Items`](Message::Items) or [`Status`](Message::Status); the daemon has one request in
//! progress at a time, so neither side ever waits for room in the socket.

use vdpa_core::Errno;

/// The version of the protocol that a holder speaks. Daemon and holder may be of different programs after an upgrade, so a
/// message keeps its form for ever; a daemon sends those of a later version only to a holder that knows them.
///
/// | version | what is new |
/// |---|---|
/// | 1 | everything else |
/// | 2 | [`AskFullStatus`](Message::AskFullStatus), [`FullStatus`](Message::FullStatus) |
pub const VERSION: u32 = 2;
/// Most bytes of an item's record.
pub const RECORD_MAX: usize = 128;
/// Most items of one answer, each with at most one descriptor. The kernel passes 253 at once.
pub const ITEMS_MAX: usize = 64;
/// Most bytes of the arguments of a program.
pub const ARGUMENTS_MAX: usize = 8192;
/// Most bytes of a message.
pub const MESSAGE_MAX: usize = 16384;

/// What a held descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Kind {
    /// A memory file: a journal, an in-flight log, guest memory.
    Memory = 1,
    /// A FUSE or CUSE connection. The holder looks whether requests wait in it while the daemon says it is idle.
    Fuse = 2,
    /// An eventfd.
    Event = 3,
    /// An io_uring; its record is a `RingRecord`. Cannot be passed by message: taken by `pidfd_getfd(2)`.
    Ring = 4,
    /// Anything else: a listening socket, a file, a directory.
    Other = 5,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::Memory, Self::Fuse, Self::Event, Self::Ring, Self::Other];

    /// The kind of this number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// What a daemon process is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Role {
    /// Serve.
    #[default]
    Daemon = 1,
    /// Prepare to take over from the daemon, whose socket comes with this message; begin when
    /// [`Committed`](Message::Committed) comes.
    Candidate = 2,
    /// Too many crashes: answer every request with an error, and touch no ring.
    Failed = 3,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// The signal that ended it, 0 if it exited.
    pub signal: i32,
    /// Its exit status, 0 if a signal ended it.
    pub status: i32,
    /// Whether a core was dumped.
    pub core: bool,
    /// Whether the holder killed it because it made no progress.
    pub hung: bool,
    /// When the holder heard of it: `CLOCK_MONOTONIC` in ns.
    pub heard_ns: u64,
    /// Its process id.
    pub pid: i32,
}

/// Why an upgrade was rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RollBack {
    /// The candidate ended.
    Died = 1,
    /// The time for the upgrade is up.
    Deadline = 2,
    /// The daemon asked for it.
    Asked = 3,
}

/// One held item without its descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The daemon's name for it.
    pub key: u64,
    /// What it is.
    pub kind: Kind,
    /// The descriptor's number in the holder, for a ring; else -1, and the descriptor comes with the message.
    pub number: i32,
    /// What the daemon keeps with it, at most [`RECORD_MAX`] bytes.
    pub record: Vec<u8>,
}

/// What the holder says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its process id.
    pub pid: i32,
    /// When it began: `CLOCK_MONOTONIC` in ns. Kept when it replaces its own program.
    pub since_ns: u64,
    /// Daemon processes so far that became the daemon.
    pub generation: u64,
    /// Crashes so far.
    pub crashes: u64,
    /// Upgrades committed so far.
    pub upgrades: u64,
    /// Programs of the holder so far, less one.
    pub replaced: u64,
    /// Items held.
    pub held: u64,
    /// How many of each kind, in the order of [`Kind::ALL`]. This and the following is told from version 2 on, by
    /// [`FullStatus`](Message::FullStatus) only.
    pub kinds: [u64; Kind::ALL.len()],
    /// What the present daemon is, or is to be.
    pub role: Role,
    /// Whether a service manager keeps copies of what is held: a daemon whose holder has died is to leave everything in place.
    pub stored: bool,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are explained at their variants")]
pub enum Message {
    /// To the daemon, first: what it is to be; the number of its generation; the state of the holder; how the last
    /// daemon ended, if by a crash. With the memory of [`progress`](crate::progress), and for a candidate the socket to the
    /// daemon.
    Start { role: Role, status: Status, crash: Option<End> },
    /// From the daemon, with one descriptor: hold it. `EEXIST` when the key is taken.
    Hold { key: u64, kind: Kind, record: Vec<u8> },
    /// From the daemon: hold the ring with this descriptor number in the daemon.
    HoldRing { key: u64, number: i32, record: Vec<u8> },
    /// From the daemon: hold it no more. `ENOENT` when it is not held.
    Drop { key: u64 },
    /// From the daemon: the items whose keys are greater than `after`, or all, as many as one message takes.
    List { after: Option<u64> },
    /// From the daemon: it serves; from a candidate: it can take over.
    Ready,
    /// From the daemon: its next exit ends the service, with its exit status.
    Stopping,
    /// From the daemon, with the open program: start a candidate. `args` are separated by NUL. The answer comes with a
    /// socket to the candidate.
    Prepare { args: Vec<u8> },
    /// From the daemon: the candidate is the daemon from now on.
    Commit,
    /// From the daemon: end the candidate.
    Abort,
    /// From the daemon, with the open program: replace the program of the holder. Answered by the new one.
    Replace { args: Vec<u8> },
    /// From the daemon: the holder's [`Status`](Message::Status).
    AskStatus,
    /// From version 2 on, from the daemon or a candidate: the holder's [`FullStatus`](Message::FullStatus).
    AskFullStatus,
    /// Answer: 0 or an errno.
    Answer { errno: i32 },
    /// Answer to [`List`](Message::List), with the descriptors of all but rings; whether there are more.
    Items { more: bool, items: Vec<Item> },
    /// Answer to [`AskStatus`](Message::AskStatus).
    Status(Status),
    /// Answer to [`AskFullStatus`](Message::AskFullStatus).
    FullStatus(Status),
    /// Event to the daemon: the candidate said [`Ready`](Message::Ready).
    CandidateReady,
    /// Event to the daemon: the candidate is no more, and why; how it ended.
    RolledBack { why: RollBack, end: End },
    /// Event to the candidate: it is the daemon.
    Committed,
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes are not a message of the holder's protocol")]
pub struct DecodeError {
    /// Bytes that came.
    pub len: usize,
}

impl DecodeError {
    /// `EBADMSG`, for the one who sent it.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        Errno::from_raw(74)
    }
}

impl Message {
    /// The bytes of a message, at most [`MESSAGE_MAX`] when records and arguments keep their limits.
    #[must_use]
    pub fn encode(&self, number: u32) -> Vec<u8> {
        let mut out = Out(Vec::with_capacity(64));
        out.u32(self.code());
        out.u32(number);
        match self {
            Self::Start { role, status, crash } => {
                out.u32(*role as u32);
                out.status(status);
                out.u32(crash.is_some().into());
                out.end(&crash.unwrap_or_default());
            }
            Self::Hold { key, kind, record } => {
                out.u64(*key);
                out.u32(*kind as u32);
                out.bytes(record);
            }
            Self::HoldRing { key, number, record } => {
                out.u64(*key);
                out.i32(*number);
                out.bytes(record);
            }
            Self::Drop { key } => out.u64(*key),
            Self::List { after } => {
                out.u32(after.is_some().into());
                out.u64(after.unwrap_or(0));
            }
            Self::Prepare { args } | Self::Replace { args } => out.bytes(args),
            Self::Answer { errno } => out.i32(*errno),
            Self::Items { more, items } => {
                out.u32((*more).into());
                out.u32(u32::try_from(items.len()).unwrap_or(u32::MAX));
                items.iter().for_each(|item| out.item(item));
            }
            Self::Status(status) => out.status(status),
            Self::FullStatus(status) => {
                out.status(status);
                out.more(status);
            }
            Self::RolledBack { why, end } => {
                out.u32(*why as u32);
                out.end(end);
            }
            Self::Ready
            | Self::Stopping
            | Self::Commit
            | Self::Abort
            | Self::AskStatus
            | Self::AskFullStatus
            | Self::CandidateReady
            | Self::Committed => {}
        }
        out.0
    }

    /// The message in the bytes of one packet, and its number.
    ///
    /// # Errors
    /// [`DecodeError`] for anything else, also for bytes behind a message.
    pub fn decode(bytes: &[u8]) -> Result<(u32, Self), DecodeError> {
        let mut input = In(bytes);
        decode(&mut input).filter(|_| input.0.is_empty()).ok_or(DecodeError { len: bytes.len() })
    }

    const fn code(&self) -> u32 {
        match self {
            Self::Start { .. } => 1,
            Self::Hold { .. } => 2,
            Self::HoldRing { .. } => 3,
            Self::Drop { .. } => 4,
            Self::List { .. } => 5,
            Self::Ready => 6,
            Self::Stopping => 7,
            Self::Prepare { .. } => 8,
            Self::Commit => 9,
            Self::Abort => 10,
            Self::Replace { .. } => 11,
            Self::AskStatus => 12,
            Self::Answer { .. } => 13,
            Self::Items { .. } => 14,
            Self::Status(_) => 15,
            Self::CandidateReady => 16,
            Self::RolledBack { .. } => 17,
            Self::Committed => 18,
            Self::AskFullStatus => 19,
            Self::FullStatus(_) => 20,
        }
    }
}

fn decode(input: &mut In<'_>) -> Option<(u32, Message)> {
    let (code, number) = (input.u32()?, input.u32()?);
    let message = match code {
        1 => {
            let role = input.role()?;
            let status = input.status()?;
            let (crashed, end) = (input.bool()?, input.end()?);
            Message::Start { role, status, crash: crashed.then_some(end) }
        }
        2 => Message::Hold {
            key: input.u64()?,
            kind: Kind::from_number(input.u32()?)?,
            record: input.record()?,
        },
        3 => Message::HoldRing { key: input.u64()?, number: input.i32()?, record: input.record()? },
        4 => Message::Drop { key: input.u64()? },
        5 => {
            let (some, after) = (input.bool()?, input.u64()?);
            Message::List { after: some.then_some(after) }
        }
        6 => Message::Ready,
        7 => Message::Stopping,
        8 => Message::Prepare { args: input.bytes(ARGUMENTS_MAX)?.to_vec() },
        9 => Message::Commit,
        10 => Message::Abort,
        11 => Message::Replace { args: input.bytes(ARGUMENTS_MAX)?.to_vec() },
        12 => Message::AskStatus,
        13 => Message::Answer { errno: input.i32()? },
        14 => {
            let (more, count) = (input.bool()?, usize::try_from(input.u32()?).ok()?);
            let items = (0..count.min(ITEMS_MAX + 1)).map(|_| input.item()).collect::<Option<Vec<_>>>()?;
            (count <= ITEMS_MAX).then_some(Message::Items { more, items })?
        }
        15 => Message::Status(input.status()?),
        16 => Message::CandidateReady,
        17 => Message::RolledBack { why: roll_back(input.u32()?)?, end: input.end()? },
        18 => Message::Committed,
        19 => Message::AskFullStatus,
        20 => {
            let status = input.status()?;
            Message::FullStatus(input.more(status)?)
        }
        _ => return None,
    };
    Some((number, message))
}

fn role(number: u32) -> Option<Role> {
    [Role::Daemon, Role::Candidate, Role::Failed].into_iter().find(|role| *role as u32 == number)
}

fn roll_back(number: u32) -> Option<RollBack> {
    [RollBack::Died, RollBack::Deadline, RollBack::Asked].into_iter().find(|why| *why as u32 == number)
}

/// Bytes being written.
pub(crate) struct Out(pub(crate) Vec<u8>);

impl Out {
    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn i32(&mut self, value: i32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn item(&mut self, item: &Item) {
        self.u64(item.key);
        self.u32(item.kind as u32);
        self.i32(item.number);
        self.bytes(&item.record);
    }

    pub(crate) fn status(&mut self, status: &Status) {
        self.i32(status.pid);
        for value in [
            status.since_ns,
            status.generation,
            status.crashes,
            status.upgrades,
            status.replaced,
            status.held,
        ] {
            self.u64(value);
        }
    }

    /// What version 2 tells of the holder.
    fn more(&mut self, status: &Status) {
        status.kinds.into_iter().for_each(|count| self.u64(count));
        self.u32(status.role as u32);
        self.u32(status.stored.into());
    }

    pub(crate) fn end(&mut self, end: &End) {
        for value in [end.signal, end.status, end.core.into(), end.hung.into(), end.pid] {
            self.i32(value);
        }
        self.u64(end.heard_ns);
    }
}

/// Bytes being read.
pub(crate) struct In<'a>(pub(crate) &'a [u8]);

impl<'a> In<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn bool(&mut self) -> Option<bool> {
        self.u32().and_then(|value| (value < 2).then_some(value == 1))
    }

    pub(crate) fn bytes(&mut self, max: usize) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok().filter(|&len| len <= max)?;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(bytes)
    }

    fn record(&mut self) -> Option<Vec<u8>> {
        self.bytes(RECORD_MAX).map(<[u8]>::to_vec)
    }

    pub(crate) fn role(&mut self) -> Option<Role> {
        role(self.u32()?)
    }

    pub(crate) fn item(&mut self) -> Option<Item> {
        Some(Item {
            key: self.u64()?,
            kind: Kind::from_number(self.u32()?)?,
            number: self.i32()?,
            record: self.record()?,
        })
    }

    pub(crate) fn status(&mut self) -> Option<Status> {
        Some(Status {
            pid: self.i32()?,
            since_ns: self.u64()?,
            generation: self.u64()?,
            crashes: self.u64()?,
            upgrades: self.u64()?,
            replaced: self.u64()?,
            held: self.u64()?,
            ..Status::default()
        })
    }

    /// What [`Out::more`] has written.
    fn more(&mut self, mut status: Status) -> Option<Status> {
        for count in &mut status.kinds {
            *count = self.u64()?;
        }
        (status.role, status.stored) = (self.role()?, self.bool()?);
        Some(status)
    }

    pub(crate) fn end(&mut self) -> Option<End> {
        Some(End {
            signal: self.i32()?,
            status: self.i32()?,
            core: self.i32()? != 0,
            hung: self.i32()? != 0,
            pid: self.i32()?,
            heard_ns: self.u64()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every message of version 2 that version 1 did not have.
    fn of_version_2() -> Vec<Message> {
        let kinds = [1, 2, 3, 4, 5];
        let status = Status { pid: 1, kinds, role: Role::Failed, stored: true, ..Status::default() };
        vec![Message::AskFullStatus, Message::FullStatus(status)]
    }

    fn all() -> Vec<Message> {
        [of_version_1(), of_version_2()].concat()
    }

    fn of_version_1() -> Vec<Message> {
        let end = End { signal: 9, status: 0, core: true, hung: true, heard_ns: 77, pid: 5 };
        let status = Status { pid: 1, generation: 3, held: 9, ..Status::default() };
        let item = Item { key: 7, kind: Kind::Ring, number: 12, record: vec![1; RECORD_MAX] };
        vec![
            Message::Start { role: Role::Candidate, status, crash: Some(end) },
            Message::Start { role: Role::Failed, status, crash: None },
            Message::Hold { key: u64::MAX, kind: Kind::Fuse, record: vec![3; 20] },
            Message::HoldRing { key: 0, number: 4, record: vec![] },
            Message::Drop { key: 8 },
            Message::List { after: None },
            Message::List { after: Some(0) },
            Message::Ready,
            Message::Stopping,
            Message::Prepare { args: b"a\0b\0".to_vec() },
            Message::Commit,
            Message::Abort,
            Message::Replace { args: vec![b'x'; ARGUMENTS_MAX] },
            Message::AskStatus,
            Message::Answer { errno: 17 },
            Message::Items { more: true, items: vec![item; ITEMS_MAX] },
            Message::Status(status),
            Message::CandidateReady,
            Message::RolledBack { why: RollBack::Deadline, end },
            Message::Committed,
        ]
    }

    /// With `VDPA_WRITE_SEEDS` they are written as seeds of the fuzz target `holder_wire`.
    #[test]
    fn every_message_comes_back() {
        for (number, message) in (0..).zip(all()) {
            let bytes = message.encode(number);
            if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
                let dir = std::path::Path::new(&dir).join("holder_wire");
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(dir.join(format!("message-{number}")), &bytes).unwrap();
            }
            assert!(bytes.len() <= MESSAGE_MAX);
            assert_eq!(Message::decode(&bytes), Ok((number, message)));
        }
    }

    /// A daemon of an earlier program, or a later one, understands its holder. `VDPA_WRITE_GOLDEN` writes a file where there is none.
    #[test]
    fn a_message_keeps_its_form() {
        for (version, messages) in [(1, of_version_1()), (2, of_version_2())] {
            let name = format!("tests/golden/messages-v{version}.bin");
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            let bytes: Vec<u8> =
                (0..).zip(&messages).flat_map(|(number, message)| message.encode(number)).collect();
            if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            assert!(std::fs::read(&path).unwrap() == bytes, "messages of version {version} have changed");
        }
    }

    #[test]
    fn no_bytes_make_it_panic_and_cut_messages_are_refused() {
        for message in all() {
            let bytes = message.encode(1);
            for len in 0..bytes.len() {
                assert!(Message::decode(&bytes[..len]).is_err(), "{message:?} cut to {len}");
            }
            assert!(Message::decode(&[&*bytes, &[0]].concat()).is_err());
            for at in 0..bytes.len().min(200) {
                for value in [0, 1, 0x7f, 0xff] {
                    let mut wrong = bytes.clone();
                    wrong[at] = value;
                    let _ = Message::decode(&wrong);
                }
            }
        }
    }
}
