//! The mappings (VMAs) of a process, looked up through an open `/proc/TID/maps`.
//!
//! The descriptor is bound to the address space, not to the process: after an exec it still shows the
//! old one, or nothing.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use vdpa_core::Errno;

use crate::errno;
use crate::uapi::proc::{
    PROCMAP_QUERY, PROCMAP_QUERY_VMA_READABLE, PROCMAP_QUERY_VMA_SHARED, PROCMAP_QUERY_VMA_WRITABLE,
    ProcmapQuery,
};

/// One mapping of a process, from which fragments of guest memory are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `VM_READ`.
    pub readable: bool,
    /// `VM_WRITE`.
    pub writable: bool,
    /// `VM_MAYSHARE`: a shared mapping. Shows whether the memory survives its process; the inode does not, since the
    /// first System V segment has inode 0.
    pub shared: bool,
    /// Offset of `start` in the object, in bytes.
    pub offset: u64,
    /// Device of the object's file system.
    pub dev: (u32, u32),
    /// Inode of the object.
    pub inode: u64,
}

/// The mapping at `addr`; `None` for a hole, and when the address space no longer exists.
///
/// # Errors
/// What reading the file reports; `EIO` for an unexpected text.
pub fn vma_at(maps: impl AsFd, addr: u64) -> Result<Option<Vma>, Errno> {
    match query(&maps, addr) {
        // Linux before 6.11 does not know the request.
        Err(Errno::NOTTY) => by_text(maps, addr),
        result => result,
    }
}

/// Opens the mappings of this process.
///
/// # Errors
/// Of opening `/proc/self/maps`.
pub fn own() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(errno::from_rustix)
}

fn query(maps: impl AsFd, addr: u64) -> Result<Option<Vma>, Errno> {
    let mut query =
        ProcmapQuery { size: size_of::<ProcmapQuery>() as u64, query_addr: addr, ..ProcmapQuery::default() };
    match PROCMAP_QUERY.update(maps, &mut query) {
        Ok(()) => {}
        Err(Errno::NOENT | errno::SRCH) => return Ok(None),
        Err(error) => return Err(error),
    }
    let has = |flag| query.vma_flags & flag != 0;
    Ok(Some(Vma {
        start: query.vma_start,
        end: query.vma_end,
        readable: has(PROCMAP_QUERY_VMA_READABLE),
        writable: has(PROCMAP_QUERY_VMA_WRITABLE),
        shared: has(PROCMAP_QUERY_VMA_SHARED),
        offset: query.vma_offset,
        dev: (query.dev_major, query.dev_minor),
        inode: query.inode,
    }))
}

/// As [`query`], from the text of the file.
fn by_text(maps: impl AsFd, addr: u64) -> Result<Option<Vma>, Errno> {
    let mut text = Vec::new();
    let mut chunk = [0; 16384];
    // pread, because the position is shared with every other user of the descriptor.
    loop {
        match rustix::io::pread(&maps, &mut chunk[..], text.len() as u64) {
            Ok(0) => break,
            Ok(count) => text.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(errno::from_rustix(error)),
        }
    }
    for line in String::from_utf8_lossy(&text).lines() {
        let vma = parse(line).ok_or(Errno::IO)?;
        if vma.start <= addr && addr < vma.end {
            return Ok(Some(vma));
        }
    }
    Ok(None)
}

/// One line: `start-end rwxp offset major:minor inode  name`.
fn parse(line: &str) -> Option<Vma> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let flags = words.next()?.as_bytes();
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    Some(Vma {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        readable: flags.first()? == &b'r',
        writable: flags.get(1)? == &b'w',
        shared: flags.get(3)? == &b's',
        offset: u64::from_str_radix(offset, 16).ok()?,
        dev: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode: words.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmap::{Prot, SharedMap};

    #[test]
    fn query_and_text_agree() {
        let fd = crate::memfd::create(c"vma", 16384, None).unwrap();
        let map = SharedMap::map(&fd, 8192, 8192, Prot::RO, false).unwrap();
        let maps = own().unwrap();
        for addr in [map.addr() as u64, map.addr() as u64 + 8191, &raw const fd as u64, 0] {
            assert_eq!(query(&maps, addr).unwrap(), by_text(&maps, addr).unwrap(), "{addr:#x}");
        }
        let vma = vma_at(&maps, map.addr() as u64).unwrap().unwrap();
        assert!(vma.shared && vma.readable && !vma.writable);
        assert_eq!(vma.offset + (map.addr() as u64 - vma.start), 8192);
        assert_eq!(vma.inode, rustix::fs::fstat(&fd).unwrap().st_ino);
        assert_eq!(vma_at(&maps, 0).unwrap(), None);
    }

    #[test]
    fn lines_without_a_name_are_parsed_and_malformed_lines_are_not() {
        let vma = parse("7f00-8000 rw-s 00001000 00:0f 0").unwrap();
        assert_eq!((vma.start, vma.end, vma.dev, vma.inode, vma.shared), (0x7f00, 0x8000, (0, 15), 0, true));
        for line in ["", "12", "1-2 rw", "1-2 rwxs 0 0:0 x", "x-2 rwxs 0 0:0 1"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
