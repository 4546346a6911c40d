//! A disk whose file was opened by whoever has asked for the device: the daemon needs no right to it.
//!
//! The holder keeps that one open file, and each process that serves the disk uses it: none could open it anew. So its locks stay while one
//! process follows the other, and do not tell whether requests of the former one have ended. The ring of the thread has to.

use std::fs::File;
use std::path::Path;

use rustix::fs::{OFlags, fcntl_getfl};
use vdpa_control::api::CtlError;
use vdpa_core::Errno;

use super::options::Options;
use crate::devices::Kept;

/// The file that came with the request, or that is kept of it.
///
/// # Errors
/// `EINVAL` for anything but one descriptor that is open as `options` need it; `ENOENT` when it is not kept; `EBUSY` when requests of the
/// former process may be in flight. Each error says what would be right.
pub(super) fn file(path: &Path, options: &Options, kept: &Kept) -> Result<File, CtlError> {
    if kept.is_restored() {
        return restored(path, kept);
    }
    let mut passed = kept.passed().unwrap_or_default();
    let (Some(fd), true) = (passed.pop(), passed.is_empty()) else {
        let count = if passed.is_empty() {
            "no descriptor".into()
        } else {
            format!("{} descriptors", passed.len() + 1)
        };
        return Err(CtlError::new(Errno::INVAL, format!("{count} came with the request for {}", path.display()))
            .with_hint("One of the open disk is right, sent with the request over the control socket: vdpactl dev add does it."));
    };
    let flags = fcntl_getfl(&fd).map_err(|error| {
        CtlError::new(
            Errno::from_raw(error.raw_os_error()),
            format!("the descriptor of {}: {error}", path.display()),
        )
    })?;
    match unsuitable(flags, options) {
        None => Ok(File::from(fd)),
        Some((what, right)) => {
            Err(CtlError::new(Errno::INVAL, format!("the descriptor of {} {what}", path.display()))
                .with_hint(right))
        }
    }
}

fn restored(path: &Path, kept: &Kept) -> Result<File, CtlError> {
    let path = path.display();
    let held = kept
        .lock()
        .ok_or_else(|| CtlError::new(Errno::NOENT, format!("the descriptor of {path} is gone")))?;
    if !kept.is_settled() {
        // To wait would not help: the ring was waited for.
        let what = format!("requests of the former daemon on {path} may be in flight");
        return Err(CtlError::new(Errno::IO, what)
            .with_hint("Its ring cannot be taken over, and the lock of a passed descriptor does not tell."));
    }
    let again = held.try_clone().map_err(|error| {
        CtlError::new(
            Errno::from_raw(error.raw_os_error().unwrap_or(0)),
            format!("the descriptor of {path}: {error}"),
        )
    })?;
    Ok(File::from(again))
}

/// Why a file with these flags cannot be the disk, and what would be right.
fn unsuitable(flags: OFlags, options: &Options) -> Option<(&'static str, &'static str)> {
    let write_only = flags.contains(OFlags::WRONLY) && !flags.contains(OFlags::RDWR);
    if flags.contains(OFlags::PATH) {
        Some(("is of a path only (O_PATH)", "Open the file itself."))
    } else if write_only || !options.read_only && !flags.contains(OFlags::RDWR) {
        Some((
            "is not open for reading and writing",
            "Open it with O_RDWR, or give readonly on for a disk that is only read.",
        ))
    } else if flags.contains(OFlags::APPEND) {
        Some(("appends (O_APPEND)", "Every write would go to the end of the file: open it without."))
    } else if flags.contains(OFlags::DIRECT) != options.direct {
        Some((
            "does not agree with the attribute direct",
            "Open it with O_DIRECT for direct on, and without for direct off.",
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use vdpa_control::api::Attrs;

    use super::*;

    fn options(extra: &[(&str, &str)]) -> Options {
        let mut attrs = Attrs::new();
        for (name, value) in [&[("path", "/d"), ("passed", "on")], extra].concat() {
            attrs.insert(name, value).unwrap();
        }
        Options::parse("t", &attrs).unwrap()
    }

    #[test]
    fn a_file_is_open_as_the_attributes_say() {
        let (disk, reader) = (options(&[]), options(&[("readonly", "on")]));
        let direct = options(&[("direct", "on")]);
        let refused = |flags, options| unsuitable(flags, options).map_or("", |(what, _)| what);
        assert_eq!(refused(OFlags::RDWR, &disk), "");
        assert_eq!((refused(OFlags::RDONLY, &reader), refused(OFlags::RDWR, &reader)), ("", ""));
        assert!(refused(OFlags::RDONLY, &disk).contains("reading and writing"));
        assert!(refused(OFlags::WRONLY, &reader).contains("reading and writing"));
        assert!(refused(OFlags::RDWR | OFlags::APPEND, &disk).contains("O_APPEND"));
        assert!(refused(OFlags::PATH, &reader).contains("O_PATH"));
        assert!(refused(OFlags::RDWR | OFlags::DIRECT, &disk).contains("direct"));
        assert!(refused(OFlags::RDWR, &direct).contains("direct"));
        assert_eq!(refused(OFlags::RDWR | OFlags::DIRECT, &direct), "");
    }

    /// What cannot be known to have ended may write into memory that its client uses for something else.
    #[test]
    fn a_file_is_used_on_only_when_the_former_requests_have_ended() {
        let file = tempfile::tempfile().unwrap();
        let again = |settled| {
            let kept = Kept::restored(None, None).with_lock(file.try_clone().map(Into::into).ok());
            super::file(Path::new("/d"), &options(&[]), &kept.with_settled(settled)).map(drop)
        };
        assert_eq!(again(true), Ok(()));
        assert_eq!(again(false).unwrap_err().errno, Errno::IO);
        let gone = super::file(Path::new("/d"), &options(&[]), &Kept::restored(None, None)).unwrap_err();
        assert_eq!(gone.errno, Errno::NOENT);
    }
}
