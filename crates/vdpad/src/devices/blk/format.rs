//! Images of other formats than raw, told by their first bytes: served as they are, a guest would find a disk that it has never
//! seen, and would destroy the image by writing to it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_sys::uring::AlignedBuf;

/// Bytes that are examined.
const HEAD: usize = 512;

/// Bytes that are read, and the alignment of where: every file system accepts it.
const BLOCK: usize = 4096;

/// How long a file system may take to read them that may block.
const LIMIT: Duration = Duration::from_secs(2);

/// Offset, magic bytes, and the name that qemu-img has for the format.
const MAGICS: [(usize, &[u8], &str); 12] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
];

/// The format that a disk with these first bytes has; `None` for raw data.
fn detect(head: &[u8]) -> Option<&'static str> {
    let has = |&(at, magic, _): &(usize, &[u8], _)| head.get(at..at + magic.len()) == Some(magic);
    MAGICS.iter().find(|magic| has(magic)).map(|(.., name)| *name)
}

/// Refuses a file that has the header of a format that is not served. `may_block`: of a file system whose reads may hang. `passed`: it
/// may not be possible to open it once more.
///
/// # Errors
/// `EINVAL` for such a file, `ETIMEDOUT` for one that does not answer; both texts say what to do.
pub(super) fn check(path: &Path, file: &File, may_block: bool, passed: bool) -> Result<(), CtlError> {
    // Once more, so that a read that hangs does not keep the locks of that one.
    let own = || File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let head = if passed { file.try_clone() } else { own() };
    let head = head.and_then(|file| if may_block { head_in_time(file) } else { read_head(&file) });
    let path = path.display();
    let head = head.map_err(|error| {
        let errno = error.raw_os_error().map_or(Errno::TIMEDOUT, Errno::from_raw);
        CtlError::new(errno, format!("{path} cannot be read: {error}"))
            .with_hint("With format raw it is not examined, and served as it is.")
    })?;
    let Some(format) = detect(&head) else { return Ok(()) };
    let to_do = match format {
        "luks" => "Open it with \"cryptsetup open\" and give the block device that this makes".into(),
        format => format!("Make a raw image with \"qemu-img convert -f {format} -O raw {path} {path}.raw\""),
    };
    Err(CtlError::new(Errno::INVAL, format!("{path} is a {format} image, not a raw one")).with_hint(format!(
        "{to_do}; or give format raw if these bytes are the disk itself, as when a guest has encrypted all of it."
    )))
}

fn read_head(file: &File) -> io::Result<Vec<u8>> {
    // As O_DIRECT needs it.
    let mut block =
        AlignedBuf::new(BLOCK, BLOCK).map_err(|errno| io::Error::from_raw_os_error(errno.raw()))?;
    loop {
        match file.read_at(&mut block, 0) {
            Ok(read) => return Ok(block.get(..read.min(HEAD)).unwrap_or_default().to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// As [`read_head`], on a thread that is left behind if it hangs.
fn head_in_time(file: File) -> io::Result<Vec<u8>> {
    let (done, head) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("format".into()).spawn(move || {
        let _ = done.send(read_head(&file));
    })?;
    head.recv_timeout(LIMIT)
        .unwrap_or_else(|_| Err(io::Error::other(format!("no answer within {} s", LIMIT.as_secs()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_from_raw_data() {
        for (at, magic, name) in MAGICS {
            let mut head = vec![0; HEAD];
            head[at..at + magic.len()].copy_from_slice(magic);
            assert_eq!(detect(&head), Some(name));
            head.truncate(at + magic.len() - 1);
            assert!(matches!(detect(&head), None | Some("qcow2")), "{name}");
        }
        assert_eq!(detect(&[]), None);
        assert_eq!(detect(&[0; HEAD]), None);
        // A partition table.
        let mut head = [0; HEAD];
        head[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(detect(&head), None);
    }
}
