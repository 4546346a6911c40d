//! What a daemon tells its [watchdog](super::watchdog) over their pipe: that it lives, and what there is to end when it
//! does not.
//!
//! Words ended by a NUL: `.` for a beat, `q` when all has ended in order, `+` or `-` and a [`Guarded`].

use std::ffi::OsStr;
use std::io::PipeWriter;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{error, warn};
use vdpa_sys::fuse::cuse::Number;

/// Longest word: a longer one would not be written in one piece (`PIPE_BUF`).
const WORD_MAX: usize = 4096;

/// What holds clients as long as its server does not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Guarded {
    /// A FUSE mount, over a directory or a file: absolute and free of symbolic links.
    Mount(PathBuf),
    /// A character device.
    Device { name: String, number: Number },
}

impl Guarded {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Mount(path) => [b"m", path.as_os_str().as_bytes()].concat(),
            Self::Device { name, number: Number { major, minor } } => {
                format!("d{major}:{minor}:{name}").into_bytes()
            }
        }
    }

    fn decode(word: &[u8]) -> Option<Self> {
        match word.split_first()? {
            (b'm', path) => Some(Self::Mount(OsStr::from_bytes(path).into())),
            (b'd', rest) => {
                let mut parts = str::from_utf8(rest).ok()?.splitn(3, ':');
                let (major, minor) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
                Some(Self::Device { name: parts.next()?.to_owned(), number: Number { major, minor } })
            }
            _ => None,
        }
    }
}

/// One word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// The reader makes progress. The first one arms the watchdog.
    Beat,
    /// Everything has ended in order: whatever is mounted there from now on is somebody else's.
    Farewell,
    /// There is, or is about to be, this.
    Guard(Guarded),
    /// It has ended in order.
    Release(Guarded),
}

impl Word {
    fn encode(&self) -> Vec<u8> {
        let mut word = match self {
            Self::Beat => b".".to_vec(),
            Self::Farewell => b"q".to_vec(),
            Self::Guard(guarded) => [b"+", &*guarded.encode()].concat(),
            Self::Release(guarded) => [b"-", &*guarded.encode()].concat(),
        };
        word.push(0);
        word
    }

    fn decode(word: &[u8]) -> Option<Self> {
        match word.split_first()? {
            (b'.', []) => Some(Self::Beat),
            (b'q', []) => Some(Self::Farewell),
            (b'+', rest) => Guarded::decode(rest).map(Self::Guard),
            (b'-', rest) => Guarded::decode(rest).map(Self::Release),
            _ => None,
        }
    }
}

/// The words in a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct Words(Vec<u8>);

impl Words {
    /// Takes more bytes and returns the words that are complete now. What is none is left out.
    pub(super) fn read(&mut self, bytes: &[u8]) -> Vec<Word> {
        self.0.extend_from_slice(bytes);
        let Some(end) = self.0.iter().rposition(|byte| *byte == 0) else { return Vec::new() };
        let rest = self.0.split_off(end + 1);
        let whole = std::mem::replace(&mut self.0, rest);
        whole.split(|byte| *byte == 0).filter_map(Word::decode).collect()
    }
}

/// The daemon's end of the pipe.
#[derive(Debug)]
pub(super) struct Lifeline {
    pipe: Mutex<Option<PipeWriter>>,
    interval: Duration,
    last: Mutex<Option<Instant>>,
}

impl Lifeline {
    /// Beats go out at most once per `interval`; without a pipe nothing does.
    ///
    /// # Errors
    /// Those of making the pipe non-blocking: a watchdog that is stopped must not stop the daemon.
    pub(super) fn new(pipe: Option<PipeWriter>, interval: Duration) -> std::io::Result<Self> {
        if let Some(pipe) = &pipe {
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        Ok(Self { pipe: Mutex::new(pipe), interval, last: Mutex::default() })
    }

    /// How often [`Lifeline::beat`] is to be called at least.
    pub(super) const fn interval(&self) -> Duration {
        self.interval
    }

    /// Says that the reader lives, unless that was said a short time ago.
    pub(super) fn beat(&self) {
        let mut last = self.last.lock();
        if last.is_none_or(|last| last.elapsed() >= self.interval) {
            *last = Some(Instant::now());
            self.say(&Word::Beat);
        }
    }

    /// Does not block.
    pub(super) fn say(&self, word: &Word) {
        let mut pipe = self.pipe.lock();
        let Some(open) = &*pipe else { return };
        let bytes = word.encode();
        if bytes.len() > WORD_MAX {
            return warn!(?word, "too long for the watchdog, which will not know of it");
        }
        match rustix::io::write(open, &bytes) {
            Ok(_) => {}
            // A full pipe: the watchdog is slow, not we. Another beat follows; the rest does not come again.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if *word == Word::Beat => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                warn!(?word, "the watchdog does not listen and will not know of it");
            }
            Err(error) => {
                error!(%error, "the watchdog is gone: a daemon that stops will hold its clients");
                *pipe = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Vec<Word> {
        let mount = Guarded::Mount("/run/a q.:/-+".into());
        let device =
            Guarded::Device { name: "vhost-vdpa/a:b".into(), number: Number { major: 511, minor: 3 } };
        vec![
            Word::Guard(mount.clone()),
            Word::Beat,
            Word::Guard(device.clone()),
            Word::Release(mount),
            Word::Release(device),
            Word::Farewell,
        ]
    }

    #[test]
    fn words_arrive_however_the_pipe_cuts_them() {
        let bytes: Vec<u8> = words().iter().flat_map(Word::encode).collect();
        for size in 1..=bytes.len() {
            let mut reader = Words::default();
            let got: Vec<Word> = bytes.chunks(size).flat_map(|chunk| reader.read(chunk)).collect();
            assert_eq!(got, words(), "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_word_is_left_out() {
        let mut reader = Words::default();
        let bytes = b"x\0\0..\0+\0+d1\0+d1:x:n\0-z\0q\0";
        assert_eq!(reader.read(bytes), [Word::Farewell]);
    }

    #[test]
    fn a_path_too_long_for_one_write_is_not_cut() {
        use std::io::Read;
        let (mut read, write) = std::io::pipe().unwrap();
        let lifeline = Lifeline::new(Some(write), Duration::from_secs(1)).unwrap();
        lifeline.say(&Word::Guard(Guarded::Mount("x".repeat(WORD_MAX).into())));
        lifeline.say(&Word::Farewell);
        drop(lifeline);
        let mut all = Vec::new();
        read.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"q\0");
    }
}
