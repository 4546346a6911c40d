//! [`HangingFile`]: a file whose reads, writes and flushes block until they are released, as those of a disk that has been
//! disconnected.

#[path = "fuse_file.rs"]
mod fuse_file;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vdpa_sys::fuse::{Connection, Operation};
use vdpa_sys::uapi::fuse::WriteOut;
use zerocopy::IntoBytes;

use fuse_file::{FuseFile, Requests};

/// `FUSE_FSYNC`, which the daemon's own files do not support.
const FSYNC: u32 = 20;

/// A file of zeros.
pub(crate) struct HangingFile {
    pub(crate) path: PathBuf,
    state: Arc<State>,
    _file: FuseFile,
}

struct State {
    hangs: AtomicBool,
    waiting: AtomicUsize,
    /// Requests at these offsets are answered although others hang.
    released: Mutex<Vec<u64>>,
    flushes: AtomicUsize,
}

/// A request that waits.
struct Held {
    unique: u64,
    offset: u64,
    answer: Answer,
}

/// The answer.
enum Answer {
    /// This number of bytes.
    Read(usize),
    /// A count of bytes.
    Written(u32),
    Flushed,
}

impl Held {
    fn answer(&self, connection: &Connection) {
        let _ = match self.answer {
            Answer::Read(len) => connection.reply(self.unique, Ok(&[&vec![0; len]])),
            Answer::Written(size) => {
                connection.reply(self.unique, Ok(&[WriteOut { size, ..WriteOut::default() }.as_bytes()]))
            }
            Answer::Flushed => connection.reply(self.unique, Ok(&[])),
        };
    }
}

impl HangingFile {
    /// Creates the file `path` with `size` bytes. Its requests block from the beginning.
    pub(crate) fn new(path: &Path, size: u64) -> Self {
        let state = Arc::new(State {
            hangs: AtomicBool::new(true),
            waiting: AtomicUsize::new(0),
            released: Mutex::default(),
            flushes: AtomicUsize::new(0),
        });
        let own = Arc::clone(&state);
        let file = FuseFile::new(path, "hanging", size, move |requests| serve(requests, &own));
        Self { path: file.path().into(), state, _file: file }
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.state.waiting.load(Ordering::SeqCst)
    }

    /// Flushes (fsync, fdatasync) that have arrived, including those that wait.
    pub(crate) fn flushes(&self) -> usize {
        self.state.flushes.load(Ordering::SeqCst)
    }

    /// Answers the requests at byte `offset` of the file, now and later.
    pub(crate) fn release(&self, offset: u64) {
        self.state.released.lock().unwrap().push(offset);
    }

    /// Lets requests block again from now on.
    pub(crate) fn hang(&self) {
        self.state.hangs.store(true, Ordering::SeqCst);
    }

    /// Answers all requests, now and later.
    pub(crate) fn recover(&self) {
        self.state.hangs.store(false, Ordering::SeqCst);
    }
}

fn serve(requests: &Requests, state: &State) {
    let connection = &requests.connection;
    connection.handshake(Duration::from_secs(10)).unwrap();
    let held: RefCell<Vec<Held>> = RefCell::default();
    let between = || {
        let released = state.released.lock().unwrap().clone();
        let goes = |held: &Held| !state.hangs.load(Ordering::SeqCst) || released.contains(&held.offset);
        let mut held = held.borrow_mut();
        held.extract_if(.., |held| goes(held)).for_each(|held| held.answer(connection));
        state.waiting.store(held.len(), Ordering::SeqCst);
    };
    requests.serve(between, |request| {
        let (offset, answer) = match request.operation {
            Operation::Read(args) => (args.offset, Answer::Read(args.size as usize)),
            Operation::Write { args, .. } => (args.offset, Answer::Written(args.size)),
            Operation::Unknown { opcode: FSYNC } => {
                state.flushes.fetch_add(1, Ordering::SeqCst);
                (0, Answer::Flushed)
            }
            _ => return false,
        };
        held.borrow_mut().push(Held { unique: request.header.unique, offset, answer });
        true
    });
}
