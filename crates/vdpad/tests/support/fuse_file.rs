//! [`FuseFile`]: a file that a thread of this process serves, mounted over a regular one. What it does with data is its user's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_sys::fuse::{BUFFER_SIZE, Connection, MountOptions, Operation, Readiness, Request, mount, unmount};
use vdpa_sys::uapi::fuse::{Attr, AttrOut, OpenOut, ROOT_ID, open_flags};
use zerocopy::IntoBytes as _;

const S_IFREG: u32 = 0o100_000;

pub(crate) struct FuseFile {
    path: PathBuf,
    ends: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

/// The requests to a file, for its thread.
pub(crate) struct Requests {
    pub(crate) connection: Connection,
    ends: Arc<AtomicBool>,
    size: u64,
}

impl FuseFile {
    /// Creates the file `path` with `size` bytes, whose thread runs `serve`.
    pub(crate) fn new(
        path: &Path,
        fsname: &str,
        size: u64,
        serve: impl FnOnce(&Requests) + Send + 'static,
    ) -> Self {
        File::create(path).unwrap();
        let options =
            MountOptions { fsname: fsname.into(), rootmode: S_IFREG | 0o666, ..MountOptions::default() };
        let (connection, ends) = (mount(path, &options).unwrap(), Arc::new(AtomicBool::new(false)));
        let requests = Requests { connection, ends: Arc::clone(&ends), size };
        let server = std::thread::spawn(move || serve(&requests));
        Self { path: path.into(), ends, server: Some(server) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let _ = unmount(&self.path);
        let _ = self.server.take().unwrap().join();
    }
}

impl Requests {
    /// Calls `between` before each request, and every 2 ms without one, and `answer` for each; requests that it does not take (it
    /// returns `false`) and that have nothing to do with data are answered here. Returns when the file ends.
    pub(crate) fn serve(&self, mut between: impl FnMut(), mut answer: impl FnMut(&Request<'_>) -> bool) {
        let mut buffer = vec![0; BUFFER_SIZE];
        while !self.ends.load(Ordering::SeqCst) {
            between();
            match self.connection.wait(None, Duration::from_millis(2)) {
                Ok(Readiness::Request) => {}
                Ok(_) => continue,
                Err(_) => return,
            }
            let Ok(read) = self.connection.read_request(&mut buffer) else { return };
            let Some(len) = read else { continue };
            let request = Request::decode(&buffer[..len]).unwrap();
            if !answer(&request) {
                self.answer(&request);
            }
        }
    }

    fn answer(&self, request: &Request<'_>) {
        let unique = request.header.unique;
        let size = self.size;
        let attr =
            Attr { ino: ROOT_ID, size, mode: S_IFREG | 0o666, nlink: 1, blksize: 4096, ..Attr::default() };
        // Each read is a request of its own.
        let open = OpenOut { open_flags: open_flags::DIRECT_IO, ..OpenOut::default() };
        let out = AttrOut { attr, ..AttrOut::default() };
        let _ = match request.operation {
            Operation::Getattr(_) | Operation::Setattr(_) => {
                self.connection.reply(unique, Ok(&[out.as_bytes()]))
            }
            Operation::Open(_) => self.connection.reply(unique, Ok(&[open.as_bytes()])),
            Operation::Release(_) | Operation::Flush(_) | Operation::Access(_) => {
                self.connection.reply(unique, Ok(&[]))
            }
            Operation::Forget(_) | Operation::BatchForget(_) | Operation::Interrupt(_) => Ok(()),
            _ => self.connection.reply(unique, Err(Errno::NOSYS)),
        };
    }
}
