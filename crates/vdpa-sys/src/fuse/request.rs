//! Decoding of requests from bytes. No I/O; never panics, for any input.

use zerocopy::FromBytes;

use crate::uapi::fuse::{
    AccessIn, BatchForgetIn, CuseInitIn, FlushIn, ForgetIn, ForgetOne, GetattrIn, GetxattrIn, InHeader,
    InitIn, InterruptIn, IoctlIn, OpenIn, PollIn, ReadIn, ReleaseIn, SetattrIn, WriteIn, init_flags, opcode,
};

/// One request of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The caller, the node, and the number that the answer must carry.
    pub header: InHeader,
    /// The operation with its arguments.
    pub operation: Operation<'a>,
}

/// The operation of a request with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the variants are the requests of uapi::fuse::opcode, documented there")]
pub enum Operation<'a> {
    Init(InitIn),
    CuseInit(CuseInitIn),
    Lookup {
        name: &'a [u8],
    },
    Forget(ForgetIn),
    BatchForget(Forgets<'a>),
    Getattr(GetattrIn),
    Setattr(SetattrIn),
    Open(OpenIn),
    Release(ReleaseIn),
    Ioctl {
        args: IoctlIn,
        input: &'a [u8],
    },
    Write {
        args: WriteIn,
        data: &'a [u8],
    },
    Read(ReadIn),
    Poll(PollIn),
    Opendir(OpenIn),
    Readdir(ReadIn),
    Releasedir(ReleaseIn),
    Statfs,
    Interrupt(InterruptIn),
    Destroy,
    Flush(FlushIn),
    Getxattr {
        args: GetxattrIn,
        name: &'a [u8],
    },
    Access(AccessIn),
    /// An unknown request. After the answer `ENOSYS` the kernel does not send it again.
    Unknown {
        opcode: u32,
    },
}

/// The nodes of a `BATCH_FORGET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// The nodes and how many look-ups of each are taken back.
    pub fn iter(&self) -> impl Iterator<Item = ForgetOne> {
        self.0.chunks_exact(size_of::<ForgetOne>()).filter_map(|one| ForgetOne::read_from_bytes(one).ok())
    }
}

/// Why bytes could not be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than a header, so there is no request number to answer.
    #[error("request of {got} bytes; a FUSE header alone has 40")]
    NoHeader {
        /// Bytes read.
        got: usize,
    },
    /// The header's length is not that of the message.
    #[error("request {unique} says it has {said} bytes and has {got}")]
    Length {
        /// Request number, to be answered with `EIO`.
        unique: u64,
        /// Length in the header.
        said: u32,
        /// Bytes read.
        got: usize,
    },
    /// The arguments are shorter than the request's structure.
    #[error("request {unique} (opcode {opcode}) has arguments of {got} bytes, too few for it")]
    Arguments {
        /// Request number, to be answered with `EIO`.
        unique: u64,
        /// Which request.
        opcode: u32,
        /// Bytes after the header.
        got: usize,
    },
}

impl DecodeError {
    /// The request number, if it could be read. The request must be answered, since its caller would wait for ever.
    #[must_use]
    pub const fn unique(&self) -> Option<u64> {
        match *self {
            Self::NoHeader { .. } => None,
            Self::Length { unique, .. } | Self::Arguments { unique, .. } => Some(unique),
        }
    }
}

impl<'a> Request<'a> {
    /// Decodes one message, exactly as one `read` of `/dev/fuse` returned it.
    ///
    /// # Errors
    /// [`DecodeError`] for bytes that are not a request, which the kernel never sends.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let (header, body) =
            InHeader::read_from_prefix(bytes).map_err(|_| DecodeError::NoHeader { got: bytes.len() })?;
        if usize::try_from(header.len) != Ok(bytes.len()) {
            return Err(DecodeError::Length { unique: header.unique, said: header.len, got: bytes.len() });
        }
        let operation = Operation::decode(header.opcode, body).ok_or(DecodeError::Arguments {
            unique: header.unique,
            opcode: header.opcode,
            got: body.len(),
        })?;
        Ok(Self { header, operation })
    }
}

impl<'a> Operation<'a> {
    fn decode(code: u32, body: &'a [u8]) -> Option<Self> {
        Some(match code {
            opcode::INIT => Self::Init(init(body)?),
            opcode::CUSE_INIT => Self::CuseInit(args(body)?.0),
            opcode::LOOKUP => Self::Lookup { name: name(body)? },
            opcode::FORGET => Self::Forget(args(body)?.0),
            opcode::BATCH_FORGET => Self::BatchForget(forgets(body)?),
            opcode::GETATTR => Self::Getattr(args(body)?.0),
            opcode::SETATTR => Self::Setattr(args(body)?.0),
            opcode::OPEN => Self::Open(args(body)?.0),
            opcode::RELEASE => Self::Release(args(body)?.0),
            opcode::IOCTL => {
                let (args, rest) = args::<IoctlIn>(body)?;
                Self::Ioctl { args, input: rest.get(..usize::try_from(args.in_size).ok()?)? }
            }
            opcode::WRITE => {
                let (args, rest) = args::<WriteIn>(body)?;
                Self::Write { args, data: rest.get(..usize::try_from(args.size).ok()?)? }
            }
            opcode::READ => Self::Read(args(body)?.0),
            opcode::POLL => Self::Poll(args(body)?.0),
            opcode::OPENDIR => Self::Opendir(args(body)?.0),
            opcode::READDIR => Self::Readdir(args(body)?.0),
            opcode::RELEASEDIR => Self::Releasedir(args(body)?.0),
            opcode::STATFS => Self::Statfs,
            opcode::INTERRUPT => Self::Interrupt(args(body)?.0),
            opcode::DESTROY => Self::Destroy,
            opcode::FLUSH => Self::Flush(args(body)?.0),
            opcode::GETXATTR => {
                let (args, rest) = args(body)?;
                Self::Getxattr { args, name: name(rest)? }
            }
            opcode::ACCESS => Self::Access(args(body)?.0),
            opcode => Self::Unknown { opcode },
        })
    }
}

fn args<T: FromBytes>(body: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(body).ok()
}

/// A name up to its NUL.
fn name(body: &[u8]) -> Option<&[u8]> {
    let end = body.iter().position(|&byte| byte == 0)?;
    body.get(..end)
}

/// `INIT` grew in 7.36; what an older kernel does not send reads as 0.
fn init(body: &[u8]) -> Option<InitIn> {
    const OLD: usize = 16;
    let mut whole = [0; size_of::<InitIn>()];
    let sent = body.get(..body.len().min(whole.len())).filter(|sent| sent.len() >= OLD)?;
    whole.get_mut(..sent.len())?.copy_from_slice(sent);
    let mut init = InitIn::read_from_bytes(&whole).ok()?;
    if u64::from(init.flags) & init_flags::INIT_EXT == 0 {
        init.flags2 = 0;
    }
    Some(init)
}

fn forgets(body: &[u8]) -> Option<Forgets<'_>> {
    let (head, rest) = args::<BatchForgetIn>(body)?;
    let bytes = usize::try_from(head.count).ok()?.checked_mul(size_of::<ForgetOne>())?;
    rest.get(..bytes).map(Forgets)
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn message(code: u32, parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        let header = InHeader {
            len: u32::try_from(40 + body.len()).unwrap(),
            opcode: code,
            unique: 7,
            nodeid: 3,
            uid: 1000,
            gid: 1001,
            pid: 42,
            ..InHeader::default()
        };
        [header.as_bytes(), &body].concat()
    }

    /// A SET_STATUS ioctl byte by byte, so that a mistake in the structures cannot hide in the test as well.
    #[test]
    fn an_ioctl_is_read_byte_by_byte() {
        let bytes: [u8; 73] = {
            let mut b = [0; 73];
            b[0] = 73;
            b[4] = 39;
            b[8] = 0x2a;
            b[16] = 5;
            b[24..26].copy_from_slice(&[0xe8, 3]);
            b[28..30].copy_from_slice(&[0xe9, 3]);
            b[32..34].copy_from_slice(&[0x39, 0x30]);
            b[40] = 9;
            b[52..56].copy_from_slice(&0x4001_AF72_u32.to_ne_bytes());
            b[56..64].copy_from_slice(&0x7fff_dead_beef_u64.to_ne_bytes());
            b[64] = 1;
            b[72] = 0xf;
            b
        };
        let request = Request::decode(&bytes).unwrap();
        assert_eq!(
            (request.header.unique, request.header.nodeid, request.header.uid, request.header.gid),
            (42, 5, 1000, 1001)
        );
        assert_eq!(request.header.pid, 12345);
        let Operation::Ioctl { args, input } = request.operation else { panic!("{request:?}") };
        assert_eq!((args.fh, args.flags, args.cmd, args.arg), (9, 0, 0x4001_AF72, 0x7fff_dead_beef));
        assert_eq!((args.in_size, args.out_size, input), (1, 0, &[0xf][..]));
    }

    #[test]
    fn names_end_at_their_nul() {
        let bytes = message(opcode::LOOKUP, &[b"vdpa0\0garbage"]);
        assert_eq!(Request::decode(&bytes).unwrap().operation, Operation::Lookup { name: b"vdpa0" });
        let bytes = message(opcode::LOOKUP, &[b"endless"]);
        assert_eq!(
            Request::decode(&bytes),
            Err(DecodeError::Arguments { unique: 7, opcode: opcode::LOOKUP, got: 7 })
        );
    }

    #[test]
    fn init_of_an_old_kernel_has_no_flags2() {
        let old = [7u32, 31, 0, u32::MAX];
        let bytes = message(opcode::INIT, &[old.as_bytes()]);
        let Operation::Init(init) = Request::decode(&bytes).unwrap().operation else { panic!() };
        assert_eq!((init.major, init.minor, init.flags2), (7, 31, 0));
        let mut new = [0u32; 16];
        new[..5].copy_from_slice(&[7, 45, 0, 1 << 30, 0x80]);
        let bytes = message(opcode::INIT, &[new.as_bytes()]);
        let Operation::Init(init) = Request::decode(&bytes).unwrap().operation else { panic!() };
        assert_eq!(init.flags2, 0x80);
    }

    #[test]
    fn a_batch_forget_has_as_many_entries_as_its_count() {
        let one = [5u64, 1, 6, 2];
        let bytes = message(opcode::BATCH_FORGET, &[[2u32, 0].as_bytes(), one.as_bytes()]);
        let Operation::BatchForget(forgets) = Request::decode(&bytes).unwrap().operation else { panic!() };
        let seen: Vec<_> = forgets.iter().map(|one| (one.nodeid, one.nlookup)).collect();
        assert_eq!(seen, [(5, 1), (6, 2)]);
        let bytes = message(opcode::BATCH_FORGET, &[[3u32, 0].as_bytes(), one.as_bytes()]);
        assert!(matches!(Request::decode(&bytes), Err(DecodeError::Arguments { .. })));
        let bytes = message(opcode::BATCH_FORGET, &[[u32::MAX, 0].as_bytes(), one.as_bytes()]);
        assert!(matches!(Request::decode(&bytes), Err(DecodeError::Arguments { .. })));
    }

    #[test]
    fn data_longer_than_the_message_is_refused() {
        let args = WriteIn { size: 73, ..WriteIn::default() };
        let bytes = message(opcode::WRITE, &[args.as_bytes(), &[0; 72]]);
        assert!(matches!(Request::decode(&bytes), Err(DecodeError::Arguments { .. })));
    }

    #[test]
    fn a_wrong_length_is_refused_with_the_unique_number() {
        let mut bytes = message(opcode::STATFS, &[]);
        bytes[0] = 41;
        let error = Request::decode(&bytes).unwrap_err();
        assert_eq!((error, error.unique()), (DecodeError::Length { unique: 7, said: 41, got: 40 }, Some(7)));
        assert_eq!(Request::decode(&bytes[..39]), Err(DecodeError::NoHeader { got: 39 }));
    }

    /// One message of each kind. With `VDPA_WRITE_SEEDS` they are written as seeds of the fuzz target `fuse_wire`.
    #[test]
    fn every_known_request_is_decoded() {
        let ioctl = IoctlIn { cmd: 0x4008_af00, in_size: 8, ..IoctlIn::default() };
        let write = WriteIn { size: 72, ..WriteIn::default() };
        let getxattr = GetxattrIn::default();
        let messages: Vec<(u32, Vec<&[u8]>)> = vec![
            (opcode::INIT, vec![&[7; 64]]),
            (opcode::CUSE_INIT, vec![&[7; 16]]),
            (opcode::LOOKUP, vec![b"vhost-vdpa-0\0"]),
            (opcode::BATCH_FORGET, vec![&[1, 0, 0, 0, 0, 0, 0, 0], &[1; 16]]),
            (opcode::IOCTL, vec![ioctl.as_bytes(), &[1; 8]]),
            (opcode::WRITE, vec![write.as_bytes(), &[2; 72]]),
            (opcode::GETXATTR, vec![getxattr.as_bytes(), b"security.capability\0"]),
            (opcode::SETATTR, vec![&[0; 88]]),
            (opcode::READ, vec![&[0; 40]]),
            (opcode::READDIR, vec![&[0; 40]]),
            (opcode::POLL, vec![&[0; 24]]),
            (opcode::RELEASE, vec![&[0; 24]]),
            (opcode::OPEN, vec![&[0; 8]]),
            (opcode::STATFS, vec![]),
            (opcode::DESTROY, vec![]),
        ];
        for (code, parts) in messages {
            let bytes = message(code, &parts);
            assert!(Request::decode(&bytes).is_ok(), "opcode {code}");
            if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
                let dir = std::path::Path::new(&dir).join("fuse_wire");
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(dir.join(format!("opcode-{code}")), bytes).unwrap();
            }
        }
    }

    /// Every opcode with every body length, filled with the bytes most likely to overflow a sum.
    #[test]
    fn no_bytes_make_decode_panic() {
        for code in 0..64 {
            for len in 0..160 {
                for fill in [0, 1, 0x7f, 0xff] {
                    let bytes = message(code, &[&vec![fill; len]]);
                    drop(Request::decode(&bytes));
                    drop(Request::decode(&bytes[..bytes.len() / 2]));
                }
            }
        }
    }
}
