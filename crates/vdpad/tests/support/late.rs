//! [`LateFile`]: a file whose first write is done late, by a server that answers direct I/O whenever it likes: as a disk behind a
//! network does. The process that has made the write can end before.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_sys::fuse::{
    BUFFER_SIZE, Connection, MAX_WRITE, MountOptions, Operation, Readiness, Request, mount, unmount,
};
use vdpa_sys::uapi::fuse::{Attr, AttrOut, InitOut, OpenOut, ROOT_ID, WriteOut, open_flags};
use zerocopy::IntoBytes as _;

const S_IFREG: u32 = 0o100_000;
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
    ends: AtomicBool,
}

/// A file of zeros, served by a thread of this process.
pub(crate) struct LateFile {
    pub(crate) path: PathBuf,
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

impl LateFile {
    pub(crate) fn new(path: &Path, size: usize) -> Self {
        File::create(path).unwrap();
        let options =
            MountOptions { fsname: "late".into(), rootmode: S_IFREG | 0o666, ..MountOptions::default() };
        let connection = mount(path, &options).unwrap();
        let state = Arc::new(State::default());
        let own = Arc::clone(&state);
        let server = std::thread::spawn(move || serve(&connection, &own, size));
        Self { path: path.into(), state, server: Some(server) }
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

impl Drop for LateFile {
    fn drop(&mut self) {
        self.state.ends.store(true, Ordering::SeqCst);
        let _ = unmount(&self.path);
        let _ = self.server.take().unwrap().join();
    }
}

fn serve(connection: &Connection, state: &State, size: usize) {
    let size_of = size as u64;
    let attr = Attr {
        ino: ROOT_ID,
        size: size_of,
        mode: S_IFREG | 0o666,
        nlink: 1,
        blksize: 4096,
        ..Attr::default()
    };
    let open = OpenOut { open_flags: open_flags::DIRECT_IO, ..OpenOut::default() };
    let mut contents = vec![0; size];
    let mut buffer = vec![0; BUFFER_SIZE];
    let mut late: Option<(u64, usize, Vec<u8>)> = None;
    let mut first = true;
    while !state.ends.load(Ordering::SeqCst) {
        if let Some((unique, at, data)) = late.take_if(|_| state.released.load(Ordering::SeqCst)) {
            contents[at..at + data.len()].copy_from_slice(&data);
            state.waiting.store(0, Ordering::SeqCst);
            state.done.fetch_add(1, Ordering::SeqCst);
            let size = u32::try_from(data.len()).unwrap();
            let _ = connection.reply(unique, Ok(&[WriteOut { size, ..WriteOut::default() }.as_bytes()]));
        }
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
                connection.reply(unique, Ok(&[out.as_bytes()]))
            }
            Operation::Getattr(_) | Operation::Setattr(_) => connection.reply(unique, Ok(&[out.as_bytes()])),
            Operation::Open(_) => connection.reply(unique, Ok(&[open.as_bytes()])),
            Operation::Release(_) | Operation::Flush(_) | Operation::Access(_) => {
                connection.reply(unique, Ok(&[]))
            }
            Operation::Read(args) => {
                let at = usize::try_from(args.offset).unwrap().min(size);
                let end = (at + args.size as usize).min(size);
                connection.reply(unique, Ok(&[&contents[at..end]]))
            }
            Operation::Write { args, data } => {
                let at = usize::try_from(args.offset).unwrap();
                if std::mem::take(&mut first) {
                    late = Some((unique, at, data.to_vec()));
                    state.waiting.store(1, Ordering::SeqCst);
                    Ok(())
                } else {
                    contents[at..at + data.len()].copy_from_slice(data);
                    state.done.fetch_add(1, Ordering::SeqCst);
                    connection
                        .reply(unique, Ok(&[WriteOut { size: args.size, ..WriteOut::default() }.as_bytes()]))
                }
            }
            Operation::Forget(_) | Operation::BatchForget(_) | Operation::Interrupt(_) => Ok(()),
            _ => connection.reply(unique, Err(Errno::NOSYS)),
        };
    }
}
