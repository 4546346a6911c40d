//! [`HangingFile`]: a file whose reads, writes and flushes block until they are released, as those of a disk that has been
//! disconnected.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_sys::fuse::{BUFFER_SIZE, Connection, MountOptions, Operation, Readiness, Request, mount, unmount};
use vdpa_sys::uapi::fuse::{Attr, AttrOut, OpenOut, ROOT_ID, WriteOut, open_flags};
use zerocopy::IntoBytes;

const S_IFREG: u32 = 0o100_000;
/// `FUSE_FSYNC`, which the daemon's own files do not support.
const FSYNC: u32 = 20;

/// A file of zeros, served by a thread of this process, mounted over a file.
pub(crate) struct HangingFile {
    pub(crate) path: PathBuf,
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

struct State {
    hangs: AtomicBool,
    waiting: AtomicUsize,
    /// Requests at these offsets are answered although others hang.
    released: Mutex<Vec<u64>>,
    flushes: AtomicUsize,
    ends: AtomicBool,
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
        File::create(path).unwrap();
        let options =
            MountOptions { fsname: "hanging".into(), rootmode: S_IFREG | 0o666, ..MountOptions::default() };
        let connection = mount(path, &options).unwrap();
        let state = Arc::new(State {
            hangs: AtomicBool::new(true),
            waiting: AtomicUsize::new(0),
            released: Mutex::default(),
            flushes: AtomicUsize::new(0),
            ends: AtomicBool::new(false),
        });
        let own = Arc::clone(&state);
        let server = std::thread::spawn(move || serve(&connection, &own, size));
        Self { path: path.into(), state, server: Some(server) }
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

impl Drop for HangingFile {
    fn drop(&mut self) {
        self.state.ends.store(true, Ordering::SeqCst);
        let _ = unmount(&self.path);
        let _ = self.server.take().unwrap().join();
    }
}

fn serve(connection: &Connection, state: &State, size: u64) {
    connection.handshake(Duration::from_secs(10)).unwrap();
    let attr = Attr { ino: ROOT_ID, size, mode: S_IFREG | 0o666, nlink: 1, blksize: 4096, ..Attr::default() };
    // Each read is a request of its own.
    let open = OpenOut { open_flags: open_flags::DIRECT_IO, ..OpenOut::default() };
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut held: Vec<Held> = Vec::new();
    while !state.ends.load(Ordering::SeqCst) {
        let released = state.released.lock().unwrap().clone();
        let goes = |held: &Held| !state.hangs.load(Ordering::SeqCst) || released.contains(&held.offset);
        held.extract_if(.., |held| goes(held)).for_each(|held| held.answer(connection));
        state.waiting.store(held.len(), Ordering::SeqCst);
        match connection.wait(None, Duration::from_millis(2)) {
            Ok(Readiness::Request) => {}
            Ok(_) => continue,
            Err(_) => return,
        }
        let Ok(read) = connection.read_request(&mut buffer) else { return };
        let Some(len) = read else { continue };
        let request = Request::decode(&buffer[..len]).unwrap();
        let unique = request.header.unique;
        let out = AttrOut { attr, ..AttrOut::default() };
        let _ = match request.operation {
            Operation::Getattr(_) | Operation::Setattr(_) => connection.reply(unique, Ok(&[out.as_bytes()])),
            Operation::Open(_) => connection.reply(unique, Ok(&[open.as_bytes()])),
            Operation::Release(_) | Operation::Flush(_) | Operation::Access(_) => {
                connection.reply(unique, Ok(&[]))
            }
            Operation::Read(args) => {
                held.push(Held { unique, offset: args.offset, answer: Answer::Read(args.size as usize) });
                Ok(())
            }
            Operation::Write { args, .. } => {
                held.push(Held { unique, offset: args.offset, answer: Answer::Written(args.size) });
                Ok(())
            }
            Operation::Unknown { opcode: FSYNC } => {
                state.flushes.fetch_add(1, Ordering::SeqCst);
                held.push(Held { unique, offset: 0, answer: Answer::Flushed });
                Ok(())
            }
            Operation::Forget(_) | Operation::BatchForget(_) | Operation::Interrupt(_) => Ok(()),
            _ => connection.reply(unique, Err(Errno::NOSYS)),
        };
    }
}
