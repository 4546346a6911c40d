//! What is saved outside of the records of a device, as each version has saved it: read for ever.
//!
//! `VDPA_WRITE_GOLDEN=1` writes the files of the present version where there are none. An existing one never changes.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use vdpa_sys::process::Spaces;
use vdpa_sys::{journal, memfd};

use super::front::{DeviceFront, SharedFront, SuccessorFront};
use super::journal::{DeviceLog, LogError};
use super::objects::tests::Keys;
use super::objects::{Decoded, RestoredSpaces, decode};
use super::{Held, Kind, key};
use crate::front::fuse::{Completed, IoctlReply, Opener};

fn golden(name: &str, present: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, present()).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn front() -> DeviceFront {
    let reply = IoctlReply { result: 0, out: vec![7, 0, 0, 0, 42, 0, 0, 0] };
    DeviceFront {
        opener: Some(Opener { handle: 0x100_0000_0001, uid: 1000, tid: 4242, flags: 0o2 }),
        owned_since_ns: 1_764_000_000_123_456_789,
        last: Some((0x1234, Completed::Ioctl(reply))),
        shared: None,
    }
}

#[test]
fn the_device_file_of_version_1_is_read() {
    let bytes = golden("device-front-v1.bin", || {
        let mut bytes = Vec::new();
        front().encode(&mut bytes);
        bytes
    });
    assert_eq!(DeviceFront::decode(&bytes), Some((front(), &[][..])));
}

#[test]
fn the_device_file_of_version_2_is_read() {
    let opener = Opener { handle: 0x100_0000_0002, uid: 0, tid: 4243, flags: 0o2 };
    let process = Some((4243, "qemu-system-x86".into()));
    let successor = SuccessorFront { handle: 5, opener, since_ns: 1_764_000_000_000_000_001, process };
    let shared = SharedFront { handle: 4, successor: Some(successor), superseded: vec![1, 2] };
    let front = DeviceFront { shared: Some(shared), ..front() };
    let bytes = golden("device-front-v2.bin", || {
        let mut bytes = Vec::new();
        front.encode(&mut bytes);
        bytes
    });
    assert_eq!(DeviceFront::decode(&bytes), Some((front, &[][..])));
}

#[test]
fn the_journal_of_version_1_is_read() {
    let bytes = golden("journal-v1.bin", || {
        let mut journal = journal::Journal::create(c"golden", 64, 1 << 16).unwrap();
        journal.append(1, b"before the checkpoint").unwrap();
        journal.checkpoint([(1, &b"state"[..])]).unwrap();
        journal.append(1, b"change").unwrap();
        let path = format!("/proc/self/fd/{}", journal.as_fd().as_raw_fd());
        let mut bytes = Vec::new();
        std::fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    });
    let contents = journal::Journal::open(file_of(&bytes), 1 << 16).unwrap().1;
    let payloads: Vec<&[u8]> = contents.records.iter().map(|record| record.payload.as_slice()).collect();
    assert_eq!((payloads, contents.generation, contents.damage), (vec![&b"state"[..], b"change"], 2, None));
}

#[test]
fn the_names_of_held_objects_of_version_1_are_read() {
    let bytes = golden("object-file-v1.bin", || {
        let id = super::objects::FileId { dev: (0, 1), inode: 77, created_ns: 123, write: true };
        super::objects::encode_file(id)
    });
    let Some(Decoded::File(id)) = decode(&bytes) else { panic!("{bytes:?}") };
    assert_eq!((id.dev, id.inode, id.created_ns, id.write), ((0, 1), 77, 123, true));
    let bytes = golden("object-space-v1.bin", || {
        super::objects::encode_space(vdpa_sys::space::SpaceRecord {
            pid: 4242,
            random_addr: 0x7ffd_0000_1230,
        })
    });
    let Some(Decoded::Space(space)) = decode(&bytes) else { panic!("{bytes:?}") };
    assert_eq!((space.pid, space.random_addr), (4242, 0x7ffd_0000_1230));
}

/// A program that knows less does not take the device over.
#[test]
fn a_journal_of_a_later_version_is_refused() {
    let held = |payload: &[u8]| {
        let mut journal = journal::Journal::create(c"later", 4096, 1 << 16).unwrap();
        journal.append(1, payload).unwrap();
        let fd = journal.as_fd().try_clone_to_owned().unwrap();
        Held { key: key(1, 0), kind: Kind::Memory, record: Vec::new(), fd }
    };
    let mut bytes = Vec::new();
    front().encode(&mut bytes);
    let reopen = |held| {
        let (store, spaces) = (Arc::new(Keys::default()), RestoredSpaces::default());
        DeviceLog::reopen(1, store, vec![held], &spaces, &Spaces::new())
    };
    assert!(reopen(held(&bytes)).is_ok());
    bytes[0] = u8::MAX;
    assert!(matches!(reopen(held(&bytes)), Err(LogError::Damaged)));
}

fn file_of(bytes: &[u8]) -> OwnedFd {
    let fd = memfd::create(c"golden", 0, None).unwrap();
    std::fs::File::from(fd.try_clone().unwrap()).write_all(bytes).unwrap();
    fd
}
