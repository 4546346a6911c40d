//! [`LateFile`]: a file whose first write is done late, by a server that answers direct I/O whenever it likes: as a disk behind a
//! network does. The process that has made the write can end before.

#[path = "fuse_file.rs"]
mod fuse_file;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use vdpa_sys::fuse::{MAX_WRITE, Operation};
use vdpa_sys::uapi::fuse::{InitOut, WriteOut};
use zerocopy::IntoBytes as _;

use fuse_file::{FuseFile, Requests};

/// `FUSE_ASYNC_DIO`, `FUSE_BIG_WRITES`: direct I/O does not keep the thread that makes it.
const FLAGS: u32 = 1 << 15 | 1 << 5;

#[derive(Default)]
struct State {
    /// Writes that wait.
    waiting: AtomicUsize,
    /// Writes that were done.
    done: AtomicUsize,
    /// The first write is done, too.
    released: AtomicBool,
}

/// A file of zeros.
pub(crate) struct LateFile {
    pub(crate) path: PathBuf,
    state: Arc<State>,
    _file: FuseFile,
}

impl LateFile {
    pub(crate) fn new(path: &Path, size: usize) -> Self {
        let state = Arc::new(State::default());
        let own = Arc::clone(&state);
        let file = FuseFile::new(path, "late", size as u64, move |requests| serve(requests, &own, size));
        Self { path: file.path().into(), state, _file: file }
    }

    pub(crate) fn waiting(&self) -> usize {
        self.state.waiting.load(Ordering::SeqCst)
    }

    /// Writes that were done.
    pub(crate) fn done(&self) -> usize {
        self.state.done.load(Ordering::SeqCst)
    }

    /// Does the write that waits.
    pub(crate) fn release(&self) {
        self.state.released.store(true, Ordering::SeqCst);
    }
}

/// What the file holds, and the write that waits.
struct Contents {
    bytes: Vec<u8>,
    late: Option<(u64, usize, Vec<u8>)>,
    first: bool,
}

fn serve(requests: &Requests, state: &State, size: usize) {
    let connection = &requests.connection;
    let contents = RefCell::new(Contents { bytes: vec![0; size], late: None, first: true });
    let write = |bytes: &mut [u8], unique, at: usize, data: &[u8]| {
        bytes[at..at + data.len()].copy_from_slice(data);
        state.done.fetch_add(1, Ordering::SeqCst);
        let size = u32::try_from(data.len()).unwrap();
        let _ = connection.reply(unique, Ok(&[WriteOut { size, ..WriteOut::default() }.as_bytes()]));
    };
    let between = || {
        let Contents { bytes, late, .. } = &mut *contents.borrow_mut();
        if let Some((unique, at, data)) = late.take_if(|_| state.released.load(Ordering::SeqCst)) {
            state.waiting.store(0, Ordering::SeqCst);
            write(bytes, unique, at, &data);
        }
    };
    requests.serve(between, |request| {
        let unique = request.header.unique;
        let Contents { bytes, late, first } = &mut *contents.borrow_mut();
        match request.operation {
            Operation::Init(init) => {
                let out = InitOut {
                    major: 7,
                    minor: init.minor.min(38),
                    flags: FLAGS & init.flags,
                    max_background: 16,
                    congestion_threshold: 16,
                    max_write: MAX_WRITE,
                    time_gran: 1,
                    ..InitOut::default()
                };
                let _ = connection.reply(unique, Ok(&[out.as_bytes()]));
            }
            Operation::Read(args) => {
                let at = usize::try_from(args.offset).unwrap().min(size);
                let end = (at + args.size as usize).min(size);
                let _ = connection.reply(unique, Ok(&[&bytes[at..end]]));
            }
            Operation::Write { args, data } => {
                let at = usize::try_from(args.offset).unwrap();
                if std::mem::take(first) {
                    *late = Some((unique, at, data.to_vec()));
                    state.waiting.store(1, Ordering::SeqCst);
                } else {
                    write(bytes, unique, at, data);
                }
            }
            _ => return false,
        }
        true
    });
}
