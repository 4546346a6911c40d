//! The file or block device behind a block device.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{OFlags, StatxFlags, fstatfs, ioctl_blksszget, statx};
use vdpa_core::Errno;
use vdpa_core::blk::SECTOR;

use super::lock::{self, Locks};
use super::options::Options;
use super::size::Capacity;
use super::{discard, format, passed};
use crate::devices::{DiskFacts, Kept};
use vdpa_control::api::CtlError;

/// Alignment of O_DIRECT transfers where the kernel does not report one: every file system accepts it.
const DIRECT_ALIGN: u32 = 4096;

/// How the thread that serves a disk reads from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadMode {
    /// By io_uring.
    Queued,
    /// By io_uring, which reads the page cache without blocking. The exception is a read that is the only request: queueing it
    /// costs more than reading it, if the data is in the page cache.
    InlineIfOnly,
    /// On the thread itself: io_uring would use another thread for each read.
    Inline,
}

/// An open backing file and its properties.
#[derive(Clone, Debug)]
pub(super) struct Backing {
    pub(super) file: Arc<OwnedFd>,
    pub(super) capacity: Arc<Capacity>,
    /// Logical block size in bytes: the unit of transfers with O_DIRECT.
    pub(super) block_size: u32,
    /// Alignment of memory for O_DIRECT, in bytes.
    pub(super) memory_align: u32,
    pub(super) direct: bool,
    pub(super) read_only: bool,
    pub(super) locks: Arc<Locks>,
    pub(super) is_block: bool,
    /// What discards may be offered.
    pub(super) discard: bool,
    /// Its file system may block a caller that requests not to block (`IOCB_NOWAIT`): FUSE, and every type that is not known.
    pub(super) may_block: bool,
    /// The fastest way to read.
    pub(super) reads: ReadMode,
    /// The thread that serves the disk writes itself, as long as no write is slow.
    pub(super) inline_writes: bool,
}

impl Backing {
    /// Opens and locks the file. The exclusive lock of a disk that is written is given to its next process only when nothing of
    /// the former one is in flight. The lock of a disk that is read only, or that others write too, is shared, and does not tell: there, that
    /// process waits for the end of the [mark](vdpa_sys::open_mark) of `kept`, since a late read would overwrite memory that its client
    /// uses for something else by then. A file that was [passed](super::passed) is the same open file in each process. With `served`
    /// another process serves the disk and has the lock: it is [taken](Self::lock) later. A disk that is made again is what it was,
    /// whatever the file is by now.
    ///
    /// # Errors
    /// The errno of open(2); `EINVAL` for anything but a file or block device of at least one sector, and for an image of another
    /// format than raw; `EBUSY` for a file that is locked. Each error names the file and what would be right.
    pub(super) fn open(path: &Path, options: &Options, kept: &Kept, served: bool) -> Result<Self, CtlError> {
        let file = if options.passed { passed::file(path, options, kept)? } else { open(path, options)? };
        let io = |error: std::io::Error| CtlError::new(errno(&error), format!("{}: {error}", path.display()));
        let file_type = file.metadata().map_err(io)?.file_type();
        let is_block = file_type.is_block_device();
        if !is_block && !file_type.is_file() {
            return Err(CtlError::new(
                Errno::INVAL,
                format!("{} is neither a file nor a block device", path.display()),
            )
            .with_hint("Give a regular file or a block device."));
        }
        let (block_size, memory_align) = alignment(&file, is_block, options.direct);
        let may_block = !is_block && !supports_nowait(&file);
        let facts = match kept.disk() {
            Some(facts) => facts,
            None => {
                let sectors = whole_sectors(path, size(&file, is_block).map_err(io)?, block_size)?;
                DiskFacts { sectors, discard: kept.is_restored() || discard::works(&file, is_block) }
            }
        };
        let locks = Locks::new(&file, options, kept.mark(), kept.lock());
        if !served && locks.take(&file).is_err() {
            return Err(lock::refusal(path, &file));
        }
        if !options.raw && !kept.is_restored() {
            format::check(path, &file, may_block || is_block, options.passed)?;
        }
        kept.keep_disk(facts, locks.bytes());
        let reads = match (options.direct || may_block, !is_block && is_tmpfs(&file)) {
            (true, _) => ReadMode::Queued,
            (false, true) => ReadMode::Inline,
            (false, false) => ReadMode::InlineIfOnly,
        };
        Ok(Self {
            file: Arc::new(file.into()),
            capacity: Arc::new(Capacity::new(facts.sectors)),
            block_size,
            memory_align,
            direct: options.direct,
            read_only: options.read_only,
            locks: Arc::new(locks),
            is_block,
            discard: facts.discard,
            may_block,
            reads,
            inline_writes: !options.direct && !may_block,
        })
    }

    /// Locks the file for this process.
    ///
    /// # Errors
    /// `EBUSY` when it stays locked by another one.
    pub(super) fn lock(&self) -> Result<(), Errno> {
        self.locks.take(&*self.file)
    }

    /// Lets the next process of this disk lock the file.
    pub(super) fn unlock(&self) {
        self.locks.give_away(&*self.file);
    }
}

/// Sectors of 512 bytes in the whole blocks of a file of `bytes` bytes.
///
/// # Errors
/// `EINVAL` when there is none.
fn whole_sectors(path: &Path, bytes: u64, block_size: u32) -> Result<u64, CtlError> {
    let block = u64::from(block_size).max(SECTOR);
    if bytes < block {
        return Err(CtlError::new(
            Errno::INVAL,
            format!("{} has {bytes} bytes, a disk needs at least {block}", path.display()),
        )
        .with_hint("Make it larger, for example with \"truncate -s 1G FILE\"."));
    }
    Ok(bytes / block * (block / SECTOR))
}

/// Bytes of a file or block device.
///
/// # Errors
/// Those of its file system.
pub(super) fn size(file: &File, is_block: bool) -> std::io::Result<u64> {
    if is_block { seek_end(file) } else { file.metadata().map(|meta| meta.len()) }
}

fn open(path: &Path, options: &Options) -> Result<File, CtlError> {
    let direct = if options.direct { OFlags::DIRECT } else { OFlags::empty() };
    let mut open = File::options();
    open.read(true).write(!options.read_only).custom_flags((direct | OFlags::CLOEXEC).bits().cast_signed());
    open.open(path).map_err(|error| open_error(path, options, &error))
}

fn open_error(file: &Path, options: &Options, error: &std::io::Error) -> CtlError {
    let path = file.display();
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => "Create it first, for example with \"truncate -s 1G FILE\".",
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            "Let the daemon's user open it, use readonly on, or open it for the daemon: passed on."
        }
        std::io::ErrorKind::InvalidInput if options.direct => {
            "Its file system has no O_DIRECT; use direct off."
        }
        std::io::ErrorKind::IsADirectory => "Give a regular file or a block device.",
        _ => "The daemon must be able to open it.",
    };
    CtlError::new(errno(error), format!("cannot open {path}: {error}")).with_hint(hint)
}

/// Logical block size and memory alignment for transfers.
fn alignment(file: &File, is_block: bool, direct: bool) -> (u32, u32) {
    let sector = 512;
    let logical = if is_block { ioctl_blksszget(file).unwrap_or(sector).max(sector) } else { sector };
    if !direct {
        return (logical, 1);
    }
    // STATX_DIOALIGN, Linux 6.1.
    let reported = statx(file, "", rustix::fs::AtFlags::EMPTY_PATH, StatxFlags::from_bits_retain(0x2000))
        .ok()
        .filter(|stat| stat.stx_mask & 0x2000 != 0 && stat.stx_dio_offset_align > 0);
    match reported {
        Some(stat) => (stat.stx_dio_offset_align.max(sector), stat.stx_dio_mem_align.max(1)),
        None => (logical.max(DIRECT_ALIGN), DIRECT_ALIGN),
    }
}

const TMPFS: u32 = 0x0102_1994;

/// Whether the file system is known to honour `IOCB_NOWAIT`: it completes or refuses a request without blocking. A write to such
/// a file system nearly always ends in the page cache.
fn supports_nowait(file: &File) -> bool {
    /// ext2 to ext4, XFS, btrfs, tmpfs, F2FS: `statfs(2)`.
    const KNOWN: [u32; 5] = [0xef53, 0x5846_5342, 0x9123_683e, TMPFS, 0xf2f5_2010];
    has_fs_type(file, &KNOWN)
}

/// Whether the file is on tmpfs. io_uring hands every read of tmpfs to a thread, while it reads the page cache of other file
/// systems inline.
fn is_tmpfs(file: &File) -> bool {
    has_fs_type(file, &[TMPFS])
}

fn has_fs_type(file: &File, types: &[u32]) -> bool {
    // The type of `f_type` differs between C libraries.
    fstatfs(file).is_ok_and(|stat| u32::try_from(stat.f_type).is_ok_and(|kind| types.contains(&kind)))
}

fn seek_end(file: &File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdpa_control::api::Attrs;

    fn open(path: &Path, extra: &[(&str, &str)]) -> Result<Backing, CtlError> {
        let mut attrs = Attrs::new();
        attrs.insert("path", path.to_str().unwrap()).unwrap();
        extra.iter().for_each(|(name, value)| attrs.insert(*name, *value).unwrap());
        Backing::open(path, &Options::parse("t", &attrs).unwrap(), &Kept::default(), false)
    }

    #[test]
    fn refusals_name_the_file_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let small = dir.path().join("small");
        std::fs::write(&small, [0; 511]).unwrap();
        for (path, errno, words) in [
            (dir.path().join("absent"), Errno::NOENT, "absent"),
            (small.clone(), Errno::INVAL, "511 bytes"),
            (dir.path().to_owned(), Errno::from_raw(21), "cannot open"),
            ("/dev/null".into(), Errno::INVAL, "neither a file nor a block device"),
        ] {
            let error = open(&path, &[]).unwrap_err();
            assert_eq!(error.errno, errno, "{error}");
            assert!(error.message.contains(words) && error.hint.is_some(), "{error:?}");
        }
    }

    #[test]
    fn a_disk_has_one_writer_or_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096 + 100]).unwrap();
        let writer = open(&path, &[]).unwrap();
        assert_eq!((writer.capacity.sectors(), writer.block_size), (8, 512));
        assert_eq!(open(&path, &[("readonly", "on")]).unwrap_err().errno, Errno::BUSY);
        drop(writer);
        let reader = open(&path, &[("readonly", "on")]).unwrap();
        assert!(reader.read_only && open(&path, &[("readonly", "on")]).is_ok());
        assert_eq!(open(&path, &[]).unwrap_err().errno, Errno::BUSY);
    }

    #[test]
    fn a_disk_between_whose_daemons_a_client_moves_has_writers_that_say_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let one = open(&path, &[("shared", "on")]).unwrap();
        assert!(!open(&path, &[("shared", "on")]).unwrap().read_only);
        let refused = open(&path, &[]).unwrap_err();
        assert_eq!((refused.errno, refused.hint.unwrap().contains("shared on")), (Errno::BUSY, true));
        drop(one);
        let alone = open(&path, &[]).unwrap();
        assert_eq!(open(&path, &[("shared", "on")]).unwrap_err().errno, Errno::BUSY);
        drop(alone);
    }

    /// As long as anything of the former process refers to the open file, as a read in flight does.
    #[test]
    fn a_reader_waits_for_the_former_process_and_for_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let mut attrs = Attrs::new();
        attrs.insert("path", path.to_str().unwrap()).unwrap();
        attrs.insert("readonly", "on").unwrap();
        let options = Options::parse("t", &attrs).unwrap();
        let (one, other) = (Kept::new().unwrap(), Kept::new().unwrap());
        let again = || Kept::restored(one.mark(), None);
        let former = Backing::open(&path, &options, &one, false).unwrap();
        let in_flight = Arc::clone(&former.file);
        drop(former);
        assert_eq!(Backing::open(&path, &options, &again(), false).unwrap_err().errno, Errno::BUSY);
        let neighbour = Backing::open(&path, &options, &other, false).unwrap();
        drop(in_flight);
        assert!(Backing::open(&path, &options, &again(), false).is_ok());
        drop(neighbour);
    }

    /// QEMU's locks stay with the open file that the holder keeps, while nobody else has the file.
    #[test]
    fn no_neighbour_gets_between_two_processes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let mut attrs = Attrs::new();
        attrs.insert("path", path.to_str().unwrap()).unwrap();
        let options = Options::parse("t", &attrs).unwrap();
        let kept = Kept::new().unwrap();
        drop(Backing::open(&path, &options, &kept, false).unwrap());
        assert_eq!(open(&path, &[]).unwrap_err().errno, Errno::BUSY);
        let again = Kept::restored(kept.mark(), None).with_lock(kept.lock().unwrap().try_clone().ok());
        drop(kept);
        let next = Backing::open(&path, &options, &again, false).unwrap();
        assert_eq!(open(&path, &[]).unwrap_err().errno, Errno::BUSY);
        drop((next, again));
        assert!(open(&path, &[]).is_ok());
    }

    #[test]
    fn an_image_of_another_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let mut image = vec![0; 4096];
        image[..4].copy_from_slice(b"QFI\xfb");
        std::fs::write(&path, image).unwrap();
        let error = open(&path, &[]).unwrap_err();
        assert_eq!(error.errno, Errno::INVAL);
        assert!(error.message.contains("is a qcow2 image"), "{error}");
        assert!(error.hint.unwrap().contains("qemu-img convert -f qcow2 -O raw"));
        assert!(open(&path, &[("format", "raw")]).is_ok());
        // A guest may have written it while the device was in use.
        let mut attrs = Attrs::new();
        attrs.insert("path", path.to_str().unwrap()).unwrap();
        let options = Options::parse("t", &attrs).unwrap();
        assert!(Backing::open(&path, &options, &Kept::restored(None, None), false).is_ok());
    }
}
