//! What a daemon tells its [watchdog](super::watchdog) over their pipe: that it lives, and what there is to end when it
//! does not.
//!
//! Words ended by a NUL: `.` for a beat, `z` for a rest, `q` when all has ended in order, `+` or `-` and a [`Guarded`].

use std::ffi::OsStr;
use std::io::PipeWriter;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{debug, error, warn};
use vdpa_sys::fuse::Connections;
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
    /// Nothing is in progress and no beat will follow before there is: what the kernel says of requests that wait counts
    /// until then.
    Rest,
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
            Self::Rest => b"z".to_vec(),
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
            (b'z', []) => Some(Self::Rest),
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
    /// Whether the watchdog can see requests that wait, so that beats are needed only while some are in progress.
    may_rest: bool,
    last: Mutex<Last>,
}

/// What was said last, besides changes.
#[derive(Clone, Copy, Debug)]
enum Last {
    Nothing,
    Beat(Instant),
    Rest,
}

impl Lifeline {
    /// Beats go out at most once per `interval`; without a pipe nothing does.
    ///
    /// # Errors
    /// Those of making the pipe non-blocking: a watchdog that is stopped must not stop the daemon.
    pub(super) fn new(pipe: Option<PipeWriter>, interval: Duration) -> std::io::Result<Self> {
        let mut may_rest = true;
        if let Some(pipe) = &pipe {
            rustix::io::ioctl_fionbio(pipe, true)?;
            // The watchdog has the same rights.
            may_rest = Connections::open()
                .inspect_err(|errno| debug!(%errno, "the kernel's list of connections cannot be read; a beat every {interval:?}"))
                .is_ok();
        }
        Ok(Self { pipe: Mutex::new(pipe), interval, may_rest, last: Mutex::new(Last::Nothing) })
    }

    /// How often [`Lifeline::beat`] is to be called at least.
    pub(super) const fn interval(&self) -> Duration {
        self.interval
    }

    /// Says that the reader lives, unless that was said a short time ago.
    pub(super) fn beat(&self) {
        let mut last = self.last.lock();
        if !matches!(*last, Last::Beat(said) if said.elapsed() < self.interval) {
            *last = Last::Beat(Instant::now());
            self.say(&Word::Beat);
        }
    }

    /// Says that nothing is in progress; `false` when the watchdog needs a beat all the same.
    pub(super) fn rest(&self) -> bool {
        let mut last = self.last.lock();
        if !self.may_rest || matches!(*last, Last::Rest) {
            return self.may_rest;
        }
        // One that does not hear of it waits for the next beat.
        let heard = self.say(&Word::Rest);
        if heard {
            *last = Last::Rest;
        }
        heard
    }

    /// Whether it has reached the watchdog, if there is one. Does not block.
    pub(super) fn say(&self, word: &Word) -> bool {
        let mut pipe = self.pipe.lock();
        let Some(open) = &*pipe else { return true };
        let bytes = word.encode();
        if bytes.len() > WORD_MAX {
            warn!(?word, "too long for the watchdog, which will not know of it");
            return false;
        }
        match rustix::io::write(open, &bytes) {
            Ok(_) => return true,
            // A full pipe: the watchdog is slow, not we. These come again; others do not.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR)
                if matches!(word, Word::Beat | Word::Rest) => {}
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                warn!(?word, "the watchdog does not listen and will not know of it");
            }
            Err(error) => {
                error!(%error, "the watchdog is gone: a daemon that stops will hold its clients");
                *pipe = None;
            }
        }
        false
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
            Word::Rest,
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
    fn a_watchdog_that_does_not_listen_gets_beats_and_no_rest() {
        let (_read, write) = std::io::pipe().unwrap();
        let lifeline = Lifeline::new(Some(write), Duration::from_secs(1)).unwrap();
        if !lifeline.may_rest {
            // Only root sees the kernel's list.
            assert!(!lifeline.rest());
            return;
        }
        assert!(lifeline.rest() && lifeline.rest());
        while lifeline.say(&Word::Beat) {}
        assert!(lifeline.rest(), "that was heard");
        lifeline.beat();
        assert!(!lifeline.rest(), "that was not");
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
