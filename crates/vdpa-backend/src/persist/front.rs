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
}

const VERSION: u8 = 1;
const OUT_MAX: usize = 256;

impl DeviceFront {
    /// The bytes that a journal keeps.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.push(VERSION);
        out.push(u8::from(self.opener.is_some()));
        let opener = self.opener.unwrap_or(Opener { handle: 0, uid: 0, tid: 0, flags: 0 });
        out.extend_from_slice(&opener.handle.to_le_bytes());
        out.extend_from_slice(&opener.uid.to_le_bytes());
        out.extend_from_slice(&opener.tid.to_le_bytes());
        out.extend_from_slice(&opener.flags.to_le_bytes());
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
        out.extend_from_slice(&u16::try_from(bytes.len()).unwrap_or(0).to_le_bytes());
        out.extend_from_slice(bytes);
    }

    /// Reads it at the beginning of `bytes`; with what follows. `None` for bytes that are none, or of another version.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let mut bytes = Bytes(bytes);
        if bytes.take::<1>()? != [VERSION] {
            return None;
        }
        let [open] = bytes.take()?;
        let opener = Opener {
            handle: u64::from_le_bytes(bytes.take()?),
            uid: u32::from_le_bytes(bytes.take()?),
            tid: u32::from_le_bytes(bytes.take()?),
            flags: u32::from_le_bytes(bytes.take()?),
        };
        let owned_since_ns = u64::from_le_bytes(bytes.take()?);
        let unique = u64::from_le_bytes(bytes.take()?);
        let [kind] = bytes.take()?;
        let number = u64::from_le_bytes(bytes.take()?);
        let len = u16::from_le_bytes(bytes.take()?);
        let (out, rest) = bytes.0.split_at_checked(len.into())?;
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
        Some((Self { opener, owned_since_ns, last: completed.map(|completed| (unique, completed)) }, rest))
    }
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, later) = self.0.split_first_chunk()?;
        self.0 = later;
        Some(*now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            let front = DeviceFront { opener, owned_since_ns: 5, last };
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
