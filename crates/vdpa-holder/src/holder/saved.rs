//! What a holder leaves to the program that replaces it, as bytes. A descriptor is its number, which the new program inherits.

use std::os::fd::RawFd;

use crate::protocol::{ARGUMENTS_MAX, In, Item, Out, Role, Status};

/// "VHLD" and the version of the format.
const MAGIC: u64 = 0x2_444c_4856;

/// The state of a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Saved {
    /// The request that the new program answers.
    pub(super) number: u32,
    /// What the daemon is: [`Role::Daemon`] or [`Role::Failed`].
    pub(super) role: Role,
    /// Whether a daemon has ever served.
    pub(super) served: bool,
    /// What is counted.
    pub(super) status: Status,
    /// When the last crashes were.
    pub(super) crashes: Vec<u64>,
    /// The process of the daemon.
    pub(super) daemon: SavedDaemon,
    /// The memory for what is counted; -1 without one.
    pub(super) counts: RawFd,
    /// What is held, in the order of the keys.
    pub(super) items: Vec<Item>,
}

/// The daemon of a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SavedDaemon {
    pub(super) pid: i32,
    pub(super) pidfd: RawFd,
    pub(super) socket: RawFd,
    pub(super) progress: RawFd,
    /// The program.
    pub(super) file: RawFd,
    pub(super) started_ns: u64,
    pub(super) ready: bool,
    /// The arguments of the program, separated by NUL.
    pub(super) args: Vec<u8>,
}

impl Saved {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Out(Vec::new());
        out.u64(MAGIC);
        out.u32(self.number);
        out.u32(self.role as u32);
        out.u32(self.served.into());
        out.status(&self.status);
        out.u32(u32::try_from(self.crashes.len()).unwrap_or(u32::MAX));
        self.crashes.iter().for_each(|&at| out.u64(at));
        let daemon = &self.daemon;
        for number in [daemon.pid, daemon.pidfd, daemon.socket, daemon.progress, daemon.file] {
            out.i32(number);
        }
        out.u64(daemon.started_ns);
        out.u32(daemon.ready.into());
        out.i32(self.counts);
        out.bytes(&daemon.args);
        self.items.iter().for_each(|item| out.item(item));
        out.0
    }

    /// The state in `bytes`; `None` if they are not one of this version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut input = In(bytes);
        (input.u64()? == MAGIC).then_some(())?;
        let number = input.u32()?;
        let role = input.role().filter(|role| *role != Role::Candidate)?;
        let served = input.bool()?;
        let status = input.status()?;
        let crashes = (0..input.u32()?).map(|_| input.u64()).collect::<Option<_>>()?;
        let (pid, pidfd, socket) = (input.i32()?, input.i32()?, input.i32()?);
        let (progress, file) = (input.i32()?, input.i32()?);
        let (started_ns, ready) = (input.u64()?, input.bool()?);
        let counts = input.i32()?;
        let args = input.bytes(ARGUMENTS_MAX)?.to_vec();
        let daemon = SavedDaemon { pid, pidfd, socket, progress, file, started_ns, ready, args };
        let mut items = Vec::new();
        while !input.0.is_empty() {
            items.push(input.item()?);
        }
        Some(Self { number, role, served, status, crashes, daemon, counts, items })
    }
}

/// Access of the fuzz target `holder_state`.
#[cfg(fuzzing)]
pub(super) fn fuzz(bytes: &[u8]) {
    if let Some(saved) = Saved::decode(bytes) {
        assert_eq!(saved.encode(), bytes, "encoding gives the decoded bytes");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::protocol::{Kind, RECORD_MAX};

    fn saved() -> Saved {
        let item = |key, kind, number, record: &[u8]| Item { key, kind, number, record: record.to_vec() };
        Saved {
            number: 77,
            role: Role::Daemon,
            served: true,
            status: Status {
                pid: 4242,
                since_ns: 1_000_000_007,
                generation: 9,
                crashes: 5,
                upgrades: 3,
                replaced: 2,
                held: 3,
                ..Status::default()
            },
            crashes: vec![2_000_000_000, u64::MAX],
            daemon: SavedDaemon {
                pid: 4343,
                pidfd: 10,
                socket: 11,
                progress: 12,
                file: 13,
                started_ns: 3_000_000_000,
                ready: true,
                args: b"vdpad\0--front\0cuse".to_vec(),
            },
            counts: 14,
            items: vec![
                item(1, Kind::Fuse, 15, &[1, 2, 3]),
                item(1 << 32, Kind::Memory, 16, &[]),
                item(u64::MAX - 1, Kind::Ring, 17, &[0xff; RECORD_MAX]),
            ],
        }
    }

    fn without_manager() -> Saved {
        Saved { role: Role::Failed, served: false, crashes: Vec::new(), counts: -1, ..saved() }
    }

    /// With `VDPA_WRITE_SEEDS` they are written as seeds of the fuzz target `holder_state`.
    #[test]
    fn a_state_comes_back() {
        for (number, saved) in [saved(), without_manager()].into_iter().enumerate() {
            let bytes = saved.encode();
            if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
                let dir = Path::new(&dir).join("holder_state");
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(dir.join(format!("state-{number}")), &bytes).unwrap();
            }
            assert_eq!(Saved::decode(&bytes), Some(saved));
        }
    }

    /// A holder is replaced by the program of a later version. `VDPA_WRITE_GOLDEN=1` writes a file where there is none; it never
    /// changes.
    #[test]
    fn the_state_of_version_2_is_read() {
        for (name, saved) in [("state-v2.bin", saved()), ("state-failed-v2.bin", without_manager())] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
            if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
                std::fs::write(&path, saved.encode()).unwrap();
            }
            assert_eq!(Saved::decode(&std::fs::read(&path).unwrap()), Some(saved), "{name}");
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let bytes = saved().encode();
        let without_items = Saved { items: Vec::new(), ..saved() }.encode().len();
        for len in 0..bytes.len() {
            let cut = Saved::decode(&bytes[..len]);
            // Items have no number: a state may end behind each.
            assert!(cut.is_none() || len >= without_items, "cut to {len}");
            assert!(cut.is_none_or(|cut| cut.encode() == bytes[..len]));
        }
        for (at, value) in [(0, 0), (4, 1), (12, Role::Candidate as u8), (12, 9), (16, 2)] {
            let mut wrong = bytes.clone();
            wrong[at] = value;
            assert_eq!(Saved::decode(&wrong), None, "{value} at {at}");
        }
    }
}
