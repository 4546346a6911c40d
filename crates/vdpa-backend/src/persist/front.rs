//! [`DeviceFront`]: what the device file knows beside the device.

use crate::front::fuse::{Completed, IoctlReply, Opener};

/// What is saved of a device file with each change of its device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFront {
    /// The client that has it open.
    pub opener: Option<Opener>,
    /// When the present owner became it, in ns since 1970; 0 without an owner.
    pub owned_since_ns: u64,
    /// The last request that changed the device, by the number that the kernel gave it, and its result.
    pub last: Option<(u64, Completed)>,
    /// Where a second client can open the device.
    pub shared: Option<SharedFront>,
}

/// What is saved of the opens of a file that a second client can open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedFront {
    /// Number of the [`Handle`](vdpa_core::handover::Handle) of the device that clients have.
    pub handle: u64,
    /// The client that has opened the device to take it over.
    pub successor: Option<SuccessorFront>,
    /// Opens whose device has passed to another one.
    pub superseded: Vec<u64>,
}

/// What is saved of a client that has opened the device to take it over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuccessorFront {
    /// Number of the handle of its device.
    pub handle: u64,
    /// Its open.
    pub opener: Opener,
    /// When it has opened the device, in ns since 1970.
    pub since_ns: u64,
    /// Its process id and name, where they were visible.
    pub process: Option<(i32, String)>,
}

/// Without, and with [`DeviceFront::shared`].
const VERSIONS: [u8; 2] = [1, 2];
const OUT_MAX: usize = 256;

impl DeviceFront {
    /// The handles of all opens that clients have.
    #[must_use]
    pub fn handles(&self) -> Vec<u64> {
        let mut handles: Vec<u64> = self.opener.iter().map(|opener| opener.handle).collect();
        if let Some(shared) = &self.shared {
            handles.extend(shared.successor.iter().map(|successor| successor.opener.handle));
            handles.extend(&shared.superseded);
        }
        handles
    }

    /// The bytes that a journal keeps.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let [alone, shared] = VERSIONS;
        out.push(if self.shared.is_some() { shared } else { alone });
        out.push(u8::from(self.opener.is_some()));
        put_opener(out, self.opener.unwrap_or(Opener { handle: 0, uid: 0, tid: 0, flags: 0 }));
        out.extend_from_slice(&self.owned_since_ns.to_le_bytes());
        let (unique, kind, number, bytes): (u64, u8, u64, &[u8]) = match &self.last {
            None => (0, 0, 0, &[]),
            Some((unique, Completed::Open { handle })) => (*unique, 1, *handle, &[]),
            Some((unique, Completed::Ioctl(reply))) => {
                (*unique, 2, u64::from(reply.result.cast_unsigned()), &reply.out)
            }
            Some((unique, Completed::Write(size))) => (*unique, 3, u64::from(*size), &[]),
            Some((unique, Completed::Release)) => (*unique, 4, 0, &[]),
        };
        // A longer answer is of a request that changes nothing, and can be made again.
        let bytes = bytes.get(..bytes.len().min(OUT_MAX)).unwrap_or_default();
        out.extend_from_slice(&unique.to_le_bytes());
        out.push(kind);
        out.extend_from_slice(&number.to_le_bytes());
        put_bytes(out, bytes);
        if let Some(shared) = &self.shared {
            shared.encode(out);
        }
    }

    /// Reads it at the beginning of `bytes`; with what follows. `None` for bytes that are none, or of another version.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let mut bytes = Bytes(bytes);
        let [version] = bytes.take()?;
        if !VERSIONS.contains(&version) {
            return None;
        }
        let [open] = bytes.take()?;
        let opener = bytes.opener()?;
        let owned_since_ns = u64::from_le_bytes(bytes.take()?);
        let unique = u64::from_le_bytes(bytes.take()?);
        let [kind] = bytes.take()?;
        let number = u64::from_le_bytes(bytes.take()?);
        let out = bytes.bytes()?;
        let completed = match kind {
            0 => None,
            1 => Some(Completed::Open { handle: number }),
            2 => {
                let result = u32::try_from(number).ok()?.cast_signed();
                Some(Completed::Ioctl(IoctlReply { result, out: out.to_vec() }))
            }
            3 => Some(Completed::Write(u32::try_from(number).ok()?)),
            4 => Some(Completed::Release),
            _ => return None,
        };
        let opener = (open == 1).then_some(opener);
        let last = completed.map(|completed| (unique, completed));
        let shared = match VERSIONS {
            [_, shared] if shared == version => Some(SharedFront::decode(&mut bytes)?),
            _ => None,
        };
        Some((Self { opener, owned_since_ns, last, shared }, bytes.0))
    }
}

impl SharedFront {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.handle.to_le_bytes());
        out.push(u8::from(self.successor.is_some()));
        if let Some(SuccessorFront { handle, opener, since_ns, process }) = &self.successor {
            out.extend_from_slice(&handle.to_le_bytes());
            put_opener(out, *opener);
            out.extend_from_slice(&since_ns.to_le_bytes());
            let (pid, name) = process.as_ref().map_or((0, ""), |(pid, name)| (*pid, name));
            out.extend_from_slice(&pid.to_le_bytes());
            // A process name has 15 bytes.
            put_bytes(out, name.as_bytes().get(..name.len().min(OUT_MAX)).unwrap_or_default());
        }
        put_len(out, self.superseded.len());
        self.superseded.iter().for_each(|handle| out.extend_from_slice(&handle.to_le_bytes()));
    }

    fn decode(bytes: &mut Bytes<'_>) -> Option<Self> {
        let handle = u64::from_le_bytes(bytes.take()?);
        let successor = match bytes.take::<1>()? {
            [0] => None,
            [1] => {
                let (handle, opener) = (u64::from_le_bytes(bytes.take()?), bytes.opener()?);
                let (since_ns, pid) = (u64::from_le_bytes(bytes.take()?), i32::from_le_bytes(bytes.take()?));
                let name = str::from_utf8(bytes.bytes()?).ok()?.to_owned();
                let process = (pid != 0).then_some((pid, name));
                Some(SuccessorFront { handle, opener, since_ns, process })
            }
            _ => return None,
        };
        let len = u16::from_le_bytes(bytes.take()?);
        let superseded = (0..len).map(|_| bytes.take().map(u64::from_le_bytes));
        Some(Self { handle, successor, superseded: superseded.collect::<Option<_>>()? })
    }
}

fn put_opener(out: &mut Vec<u8>, opener: Opener) {
    out.extend_from_slice(&opener.handle.to_le_bytes());
    out.extend_from_slice(&opener.uid.to_le_bytes());
    out.extend_from_slice(&opener.tid.to_le_bytes());
    out.extend_from_slice(&opener.flags.to_le_bytes());
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.extend_from_slice(bytes);
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, later) = self.0.split_first_chunk()?;
        self.0 = later;
        Some(*now)
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = u16::from_le_bytes(self.take()?);
        let (now, later) = self.0.split_at_checked(len.into())?;
        self.0 = later;
        Some(now)
    }

    fn opener(&mut self) -> Option<Opener> {
        Some(Opener {
            handle: u64::from_le_bytes(self.take()?),
            uid: u32::from_le_bytes(self.take()?),
            tid: u32::from_le_bytes(self.take()?),
            flags: u32::from_le_bytes(self.take()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared() -> [Option<SharedFront>; 4] {
        let opener = Opener { handle: 8, uid: 0, tid: 43, flags: 2 };
        let successor = SuccessorFront { handle: 5, opener, since_ns: 6, process: Some((43, "qemu".into())) };
        let unseen = SuccessorFront { process: None, ..successor.clone() };
        let shared = SharedFront { handle: 4, successor: None, superseded: vec![1, 2] };
        let with = |successor| SharedFront { handle: 4, successor: Some(successor), superseded: Vec::new() };
        [None, Some(shared.clone()), Some(with(successor)), Some(with(unseen))]
    }

    #[test]
    fn another_version_is_refused() {
        let mut bytes = Vec::new();
        DeviceFront::default().encode(&mut bytes);
        assert_eq!(bytes[0], 1, "what an older program wrote too");
        for version in [0, 3, 255] {
            bytes[0] = version;
            assert_eq!(DeviceFront::decode(&bytes), None);
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_and_what_is_cut_is_refused() {
        let opener = Some(Opener { handle: 7, uid: 1000, tid: 42, flags: 2 });
        let reply = IoctlReply { result: 3, out: vec![1, 2, 3, 4, 5, 6, 7, 8] };
        for last in [
            None,
            Some((9, Completed::Open { handle: 7 })),
            Some((u64::MAX >> 1, Completed::Ioctl(reply))),
            Some((1, Completed::Write(72))),
            Some((2, Completed::Release)),
        ] {
            for shared in shared() {
                let front = DeviceFront { opener, owned_since_ns: 5, last: last.clone(), shared };
                let mut bytes = Vec::new();
                front.encode(&mut bytes);
                for len in 0..bytes.len() {
                    assert_eq!(DeviceFront::decode(&bytes[..len]), None);
                }
                bytes.push(0xee);
                assert_eq!(DeviceFront::decode(&bytes), Some((front, &[0xee][..])));
            }
        }
    }
}
