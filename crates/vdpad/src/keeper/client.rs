//! The daemon's side: starting a keeper, and making requests of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;
use thiserror::Error;
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, GroupIndex, IotlbMsg, IovaRange, QueueIndex, Result, VringAddr, iotlb_type};
use vdpa_holder::packet;
use vdpa_sys::eventfd::EventFd;

use super::protocol::{
    Answer, CONFIG_MAX, Enter, KeptMapping, MAPPINGS_MAX, PACKET_MAX, Request, VERSION, Value,
};

/// Why there is no keeper to speak with.
#[derive(Debug, Error)]
pub(crate) enum KeeperError {
    /// It could not be started.
    #[error("the process that keeps the device open cannot be started: {errno}")]
    Start {
        /// Of socketpair(2), or of starting a process.
        errno: Errno,
    },
    /// It has ended, and with it the device was closed.
    #[error("the process that kept the device open has ended")]
    Ended,
    /// It does not answer as it should.
    #[error("the process that keeps the device open answers with an error: {errno}")]
    Refused {
        /// What it answers.
        errno: Errno,
    },
    /// It is of another program.
    #[error(
        "the process that keeps the device open speaks version {theirs} of its protocol, this program version {ours}"
    )]
    Version {
        /// Its version.
        theirs: u64,
        /// That of this program.
        ours: u32,
    },
}

impl KeeperError {
    pub(crate) const fn errno(&self) -> Errno {
        match self {
            Self::Start { errno } | Self::Refused { errno } => *errno,
            Self::Ended => Errno::NODEV,
            Self::Version { .. } => Errno::OPNOTSUPP,
        }
    }
}

/// A device that a keeper has open. As [`VdpaOps`] it is that device, but for ownership, which stays with the keeper, and for mappings,
/// which are made by [`map_all`](Self::map_all). Each request is one exchange with the keeper, and blocks as long as the device does.
#[derive(Debug)]
pub(crate) struct Keeper {
    connection: Mutex<OwnedFd>,
    /// The version of the protocol that both understand.
    version: u32,
    /// The keeper lives as long as somebody has this.
    lobby: Arc<OwnedFd>,
}

impl Keeper {
    /// Starts a keeper for `device`, which is open and called `name`, as the process `vdpad keeper`. May do what it likes with it:
    /// see [`take`](Self::take).
    ///
    /// # Errors
    /// [`KeeperError`]; the device is closed then.
    pub(crate) fn start(device: OwnedFd, name: &str) -> Result<Self, KeeperError> {
        let start = |errno| KeeperError::Start { errno };
        let (lobby, theirs) = packet::pair().map_err(start)?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("vdpad")
            .args(["keeper", "--device", name])
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            // What ends the daemon, Ctrl-C for example, does not end it.
            .process_group(0)
            .spawn()
            .map_err(|error| start(Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
        let waits = std::thread::Builder::new().name("keeper".into()).spawn(move || drop(child.wait()));
        waits.map_err(|_| start(Errno::AGAIN))?;
        let keeper = Self::enter(Arc::new(lobby), Some(device))?;
        keeper.take().map_err(|errno| KeeperError::Refused { errno })?;
        Ok(keeper)
    }

    /// A connection to the keeper of this lobby.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub(crate) fn join(lobby: Arc<OwnedFd>) -> Result<Self, KeeperError> {
        Self::enter(lobby, None)
    }

    pub(super) fn enter(lobby: Arc<OwnedFd>, device: Option<OwnedFd>) -> Result<Self, KeeperError> {
        let start = |errno| KeeperError::Start { errno };
        let (ours, theirs) = packet::pair().map_err(start)?;
        let hello = serde_json::to_vec(&Enter {}).map_err(|_| start(Errno::INVAL))?;
        let fds: Vec<BorrowedFd<'_>> =
            std::iter::once(theirs.as_fd()).chain(device.as_ref().map(AsFd::as_fd)).collect();
        packet::send(&*lobby, &hello, &fds).map_err(|_| KeeperError::Ended)?;
        drop(theirs);
        let mut keeper = Self { connection: Mutex::new(ours), version: VERSION, lobby };
        match keeper.number(&Request::Hello { version: VERSION }) {
            // A keeper of an earlier program is asked for what it knows.
            Ok(theirs) => match u32::try_from(theirs) {
                Ok(version @ 1..=VERSION) => {
                    keeper.version = version;
                    Ok(keeper)
                }
                _ => Err(KeeperError::Version { theirs, ours: VERSION }),
            },
            Err(Errno::NODEV) => Err(KeeperError::Ended),
            Err(errno) => Err(KeeperError::Refused { errno }),
        }
    }

    /// What keeps the keeper alive, and lets another process speak with it.
    pub(crate) const fn lobby(&self) -> &Arc<OwnedFd> {
        &self.lobby
    }

    /// Becomes the one who may change the device: nobody else can any more.
    ///
    /// # Errors
    /// `ENODEV` when the keeper has ended.
    pub(crate) fn take(&self) -> Result<()> {
        self.done(&Request::Take, None)
    }

    /// Closes the device, which stops its I/O. It cannot be used again.
    ///
    /// # Errors
    /// `ESTALE` for one who may not change it.
    pub(crate) fn close(&self) -> Result<()> {
        self.done(&Request::Close, None)
    }

    /// Unbinds all events of queues.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn unbind_events(&self) -> Result<()> {
        self.done(&Request::UnbindEvents, None)
    }

    /// Maps memory of objects. After an error some of it may be mapped.
    ///
    /// # Errors
    /// Of mmap(2), and `EFAULT` from the device.
    pub(crate) fn map_all(&self, asid: Asid, all: &[(KeptMapping, BorrowedFd<'_>)]) -> Result<()> {
        if self.version < 2 {
            return all.iter().try_for_each(|&(mapping, object)| {
                self.call(&Request::Map { asid, mapping }, &[object]).map(drop)
            });
        }
        all.chunks(MAPPINGS_MAX).try_for_each(|some| {
            let (mappings, objects): (Vec<_>, Vec<_>) = some.iter().copied().unzip();
            self.call(&Request::MapAll { asid, mappings }, &objects).map(drop)
        })
    }

    /// Removes what [`map_all`](Self::map_all) has mapped at these ranges. After an error some may be removed.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn unmap_all(&self, asid: Asid, ranges: &[IovaRange]) -> Result<()> {
        if self.version < 2 {
            return ranges.iter().try_for_each(|&range| self.done(&Request::Unmap { asid, range }, None));
        }
        ranges
            .chunks(MAPPINGS_MAX)
            .try_for_each(|some| self.done(&Request::UnmapAll { asid, ranges: some.to_vec() }, None))
    }

    /// What is mapped, in the order of addresses, whoever has mapped it.
    ///
    /// # Errors
    /// `ENODEV` when the keeper has ended.
    pub(crate) fn mappings(&self, asid: Asid) -> Result<Vec<KeptMapping>> {
        let mut all: Vec<KeptMapping> = Vec::new();
        loop {
            let above = all.last().map(|mapping| mapping.range.first());
            let Value::Mappings(some) = self.call(&Request::Mappings { asid, above }, &[])? else {
                return Err(Errno::IO);
            };
            let more = some.len() == MAPPINGS_MAX;
            all.extend(some);
            if !more {
                return Ok(all);
            }
        }
    }

    fn call(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Value> {
        let bytes = serde_json::to_vec(request).map_err(|_| Errno::INVAL)?;
        let connection = self.connection.lock();
        packet::send(&*connection, &bytes, fds).map_err(|_| Errno::NODEV)?;
        let answer = packet::receive::<PACKET_MAX>(&*connection, true);
        drop(connection);
        let (bytes, _) = answer.map_err(|_| Errno::NODEV)?.ok_or(Errno::NODEV)?;
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| Errno::IO)?;
        answer.map_err(Errno::from_raw)
    }

    fn done(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.call(request, fd.as_slice()).map(drop)
    }

    fn number(&self, request: &Request) -> Result<u64> {
        match self.call(request, &[])? {
            Value::Number(number) => Ok(number),
            _ => Err(Errno::IO),
        }
    }

    fn short<T: TryFrom<u64>>(&self, request: &Request) -> Result<T> {
        self.number(request).and_then(|number| T::try_from(number).map_err(|_| Errno::IO))
    }

    fn set_event(&self, request: &Request, event: Option<&EventFd>) -> Result<()> {
        self.done(request, event.map(AsFd::as_fd))
    }
}

impl VdpaOps for Keeper {
    type Event = EventFd;

    fn device_id(&self) -> Result<u32> {
        self.short(&Request::DeviceId)
    }

    fn status(&self) -> Result<Status> {
        self.short(&Request::Status).map(Status)
    }

    fn set_status(&self, status: Status) -> Result<()> {
        self.done(&Request::SetStatus { status: status.0 }, None)
    }

    fn features(&self) -> Result<Features> {
        self.number(&Request::Features).map(Features)
    }

    fn set_features(&self, features: Features) -> Result<()> {
        self.done(&Request::SetFeatures { features: features.0 }, None)
    }

    fn backend_features(&self) -> Result<BackendFeatures> {
        self.number(&Request::BackendFeatures).map(BackendFeatures)
    }

    fn set_backend_features(&self, features: BackendFeatures) -> Result<()> {
        self.done(&Request::SetBackendFeatures { features: features.0 }, None)
    }

    fn vqs_count(&self) -> Result<u32> {
        self.short(&Request::VqsCount)
    }

    fn group_num(&self) -> Result<u32> {
        self.short(&Request::GroupNum)
    }

    fn as_num(&self) -> Result<u32> {
        self.short(&Request::AsNum)
    }

    fn iova_range(&self) -> Result<IovaRange> {
        match self.call(&Request::IovaRange, &[])? {
            Value::Range(range) => Ok(range),
            _ => Err(Errno::IO),
        }
    }

    fn config_size(&self) -> Result<u32> {
        self.short(&Request::ConfigSize)
    }

    fn config(&self, offset: u32, out: &mut [u8]) -> Result<()> {
        for (piece, at) in out.chunks_mut(CONFIG_MAX).zip((offset..).step_by(CONFIG_MAX)) {
            match self.call(&Request::Config { offset: at, len: piece.len() }, &[])? {
                Value::Bytes(bytes) if bytes.len() == piece.len() => piece.copy_from_slice(&bytes),
                _ => return Err(Errno::IO),
            }
        }
        Ok(())
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> Result<()> {
        for (piece, at) in data.chunks(CONFIG_MAX).zip((offset..).step_by(CONFIG_MAX)) {
            self.done(&Request::SetConfig { offset: at, data: piece.to_vec() }, None)?;
        }
        Ok(())
    }

    fn set_config_call(&self, event: Option<&EventFd>) -> Result<()> {
        self.set_event(&Request::SetConfigCall, event)
    }

    fn vring_num(&self) -> Result<u16> {
        self.short(&Request::VringNum)
    }

    fn set_owner(&self) -> Result<()> {
        self.done(&Request::SetOwner, None)
    }

    /// The keeper stays the owner.
    fn new_owner(&self) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// As [`new_owner`](Self::new_owner).
    fn reset_owner(&self) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    fn set_vring_num(&self, index: QueueIndex, num: u32) -> Result<()> {
        self.done(&Request::SetVringNum { index, num }, None)
    }

    fn set_vring_addr(&self, index: QueueIndex, addr: &VringAddr) -> Result<()> {
        let &VringAddr { flags, desc, used, avail, log } = addr;
        self.done(&Request::SetVringAddr { index, flags, desc, used, avail, log }, None)
    }

    fn set_vring_base(&self, index: QueueIndex, num: u32) -> Result<()> {
        self.done(&Request::SetVringBase { index, num }, None)
    }

    fn vring_base(&self, index: QueueIndex) -> Result<u32> {
        self.short(&Request::VringBase { index })
    }

    fn set_vring_enable(&self, index: QueueIndex, enable: bool) -> Result<()> {
        self.done(&Request::SetVringEnable { index, enable }, None)
    }

    fn set_vring_kick(&self, index: QueueIndex, event: Option<&EventFd>) -> Result<()> {
        self.set_event(&Request::SetVringKick { index }, event)
    }

    fn set_vring_call(&self, index: QueueIndex, event: Option<&EventFd>) -> Result<()> {
        self.set_event(&Request::SetVringCall { index }, event)
    }

    fn set_vring_err(&self, index: QueueIndex, event: Option<&EventFd>) -> Result<()> {
        self.set_event(&Request::SetVringErr { index }, event)
    }

    fn vring_group(&self, index: QueueIndex) -> Result<GroupIndex> {
        self.short(&Request::VringGroup { index }).map(GroupIndex)
    }

    fn vring_desc_group(&self, index: QueueIndex) -> Result<GroupIndex> {
        self.short(&Request::VringDescGroup { index }).map(GroupIndex)
    }

    fn set_group_asid(&self, group: GroupIndex, asid: Asid) -> Result<()> {
        self.done(&Request::SetGroupAsid { group, asid }, None)
    }

    fn vring_size(&self, index: QueueIndex) -> Result<u32> {
        self.short(&Request::VringSize { index })
    }

    fn suspend(&self) -> Result<()> {
        self.done(&Request::Suspend, None)
    }

    fn resume(&self) -> Result<()> {
        self.done(&Request::Resume, None)
    }

    /// Batches only: memory is mapped by [`map_all`](Self::map_all), as its addresses are those of the keeper.
    fn iotlb(&self, asid: Asid, msg: &IotlbMsg) -> Result<()> {
        match msg.kind {
            iotlb_type::BATCH_BEGIN => self.done(&Request::BatchBegin { asid }, None),
            iotlb_type::BATCH_END => self.done(&Request::BatchEnd { asid }, None),
            _ => Err(Errno::OPNOTSUPP),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vdpa_core::types::Perm;
    use vdpa_sys::guest::ObjectId;
    use vdpa_sys::memfd;

    use super::*;

    /// A keeper that an earlier program has started knows one mapping in a request.
    #[test]
    fn a_keeper_of_the_first_version_gets_one_mapping_at_a_time() {
        let (lobby, theirs) = packet::pair().unwrap();
        let keeper = thread::spawn(move || {
            let (_, mut fds) = packet::receive::<PACKET_MAX>(&theirs, true).unwrap().unwrap();
            let connection = fds.remove(0);
            let mut came = Vec::new();
            while let Some((bytes, fds)) = packet::receive::<PACKET_MAX>(&connection, true).unwrap() {
                let answer: Answer = Ok(match serde_json::from_slice(&bytes).unwrap() {
                    Request::Hello { .. } => Value::Number(1),
                    _ => Value::Nothing,
                });
                came.push((String::from_utf8(bytes).unwrap(), fds.len()));
                packet::send(&connection, &serde_json::to_vec(&answer).unwrap(), &[]).unwrap();
            }
            came
        });
        let client = Keeper::join(Arc::new(lobby)).unwrap();
        let object = memfd::create(c"ram", 8192, None).unwrap();
        let id = ObjectId { dev_major: 0, dev_minor: 1, inode: 7, created_ns: 0, offset: 0 };
        let mapping = |iova| {
            let range = IovaRange::from_size(iova, 4096).unwrap();
            (KeptMapping { range, perm: Perm::RW, object: id.into() }, object.as_fd())
        };
        let both = [mapping(0x1000), mapping(0x3000)];
        client.map_all(Asid(0), &both).unwrap();
        client.unmap_all(Asid(0), &both.map(|(mapping, _)| mapping.range)).unwrap();
        drop(client);
        let came = keeper.join().unwrap();
        let kinds: Vec<_> = came.iter().map(|(text, fds)| (text.split('"').nth(1).unwrap(), *fds)).collect();
        assert_eq!(kinds, [("hello", 0), ("map", 1), ("map", 1), ("unmap", 0), ("unmap", 0)]);
    }
}
