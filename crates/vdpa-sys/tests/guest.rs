//! Guest memory: the objects to which the addresses of a client resolve.
#![expect(unsafe_code, reason = "maps memory in every way a client may")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod subject;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect};
use subject::Subject;
use vdpa_core::Errno;
use vdpa_core::host::{AddressSpace, Fragment, MemoryObject};
use vdpa_core::types::Perm;
use vdpa_sys::guest::{GuestMemory, MemoryRecord};
use vdpa_sys::process::{Caller, OwnerSpace, Spaces};

const RW: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
const PAGE: u64 = 4096;

fn this_space() -> OwnerSpace {
    let caller = Caller::new(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
    Spaces::new().adopt(&caller).unwrap()
}

fn memfd(pages: u64) -> OwnedFd {
    vdpa_sys::memfd::create(c"guest", pages * PAGE, None).unwrap()
}

fn map_fd(fd: impl AsFd, pages: u64, prot: ProtFlags, flags: MapFlags) -> u64 {
    let len = usize::try_from(pages * PAGE).unwrap();
    // SAFETY: the kernel picks free addresses.
    unsafe { mmap(ptr::null_mut(), len, prot, flags, fd, 0) }.unwrap().expose_provenance() as u64
}

fn map_anonymous(pages: u64, flags: MapFlags) -> u64 {
    let len = usize::try_from(pages * PAGE).unwrap();
    // SAFETY: the kernel picks free addresses.
    unsafe { mmap_anonymous(ptr::null_mut(), len, RW, flags) }.unwrap().expose_provenance() as u64
}

fn at(addr: u64) -> *mut libc::c_void {
    ptr::with_exposed_provenance_mut(usize::try_from(addr).unwrap())
}

fn poke(addr: u64, bytes: &[u8]) {
    // SAFETY: the tests pass addresses that they mapped writable.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at(addr).cast(), bytes.len()) };
}

fn peek(addr: u64) -> u8 {
    // SAFETY: the tests pass addresses that they mapped readable.
    unsafe { at(addr).cast::<u8>().read_volatile() }
}

fn resolve_one(addr: u64, size: u64, perm: Perm) -> GuestMemory {
    let mut fragments = this_space().resolve(addr, size, perm).unwrap();
    assert_eq!((fragments.len(), fragments[0].size), (1, size));
    fragments.remove(0).memory
}

/// Asserts that `memory` and the memory at `addr` have the same bytes after writes to either.
fn assert_same_bytes(memory: &GuestMemory, addr: u64) {
    let mut byte = [0];
    poke(addr + 1, &[0xa5]);
    memory.read(1, &mut byte).unwrap();
    assert_eq!(byte, [0xa5]);
    memory.write(2, &[0x5a]).unwrap();
    assert_eq!(peek(addr + 2), 0x5a);
}

fn assert_mapped(addr: u64, size: u64) -> GuestMemory {
    let memory = resolve_one(addr, size, Perm::RW);
    assert!(memory.is_shared() && memory.host_addr(0).is_some());
    assert_same_bytes(&memory, addr);
    memory
}

fn assert_copied(addr: u64, size: u64) -> GuestMemory {
    let memory = resolve_one(addr, size, Perm::RW);
    assert!(!memory.is_shared() && memory.host_addr(0).is_none() && memory.pin_pages() == 0);
    assert_same_bytes(&memory, addr);
    memory
}

#[test]
fn shared_objects_of_every_kind_are_mapped() {
    assert_mapped(map_fd(memfd(2), 2, RW, MapFlags::SHARED), 2 * PAGE);
    assert_mapped(map_anonymous(2, MapFlags::SHARED), 2 * PAGE);
    for dir in ["/dev/shm", env!("CARGO_TARGET_TMPDIR")] {
        let file = tempfile::tempfile_in(dir).unwrap();
        file.set_len(2 * PAGE).unwrap();
        assert_mapped(map_fd(&file, 2, RW, MapFlags::SHARED), 2 * PAGE);
    }
}

#[test]
fn system_v_segments_are_mapped_whatever_their_inode() {
    // SAFETY: creates a segment, attaches it at free addresses and marks it for removal.
    let addr = unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, 8192, libc::IPC_CREAT | 0o600);
        assert!(id >= 0);
        let addr = libc::shmat(id, ptr::null(), 0);
        libc::shmctl(id, libc::IPC_RMID, ptr::null_mut());
        addr
    };
    assert_mapped(addr.expose_provenance() as u64, 2 * PAGE);
}

#[test]
fn private_memory_is_copied() {
    assert_copied(map_anonymous(2, MapFlags::PRIVATE), 2 * PAGE);
    assert_copied(map_fd(memfd(2), 2, RW, MapFlags::PRIVATE), 2 * PAGE);
}

#[test]
fn an_object_sealed_against_new_writers_is_copied() {
    let fd = memfd(1);
    let addr = map_fd(&fd, 1, RW, MapFlags::SHARED);
    fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE).unwrap();
    assert_copied(addr, PAGE);
    assert!(resolve_one(addr, PAGE, Perm::RO).is_shared(), "reading needs no new writer");
}

#[test]
fn secret_memory_is_refused() {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
    let fd = i32::try_from(fd).unwrap();
    assert!(fd >= 0, "memfd_secret is needed by this test: boot with secretmem.enable=1");
    // SAFETY: a descriptor just received, owned by nobody else.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    ftruncate(&fd, PAGE).unwrap();
    let addr = map_fd(&fd, 1, RW, MapFlags::SHARED);
    poke(addr, &[1]);
    assert_eq!(this_space().resolve(addr, PAGE, Perm::RW).unwrap_err(), Errno::FAULT);
}

#[test]
fn holes_and_overflows_fault() {
    // In another process, because here the mapping made for the first page could be placed in the hole.
    let mut subject = Subject::start();
    let space = Spaces::new().adopt(&Caller::new(subject.tid).unwrap()).unwrap();
    let addr = subject.run("map with a hole");
    assert_eq!(space.resolve(addr, 3 * PAGE, Perm::RW).unwrap_err(), Errno::FAULT);
    assert_eq!(space.resolve(addr + PAGE, PAGE, Perm::RO).unwrap_err(), Errno::FAULT);
    assert_eq!(space.resolve(u64::MAX - 10, 11, Perm::RO).unwrap_err(), Errno::FAULT);
    assert_eq!(space.resolve(addr, u64::MAX, Perm::RO).unwrap_err(), Errno::FAULT);
    assert!(space.resolve(addr, PAGE, Perm::RW).is_ok());
}

#[test]
fn the_protection_of_the_client_applies_to_the_device() {
    let addr = map_fd(memfd(1), 1, ProtFlags::READ, MapFlags::SHARED);
    let space = this_space();
    assert_eq!(space.resolve(addr, PAGE, Perm::RW).unwrap_err(), Errno::FAULT);
    assert_eq!(space.resolve(addr, PAGE, Perm::WO).unwrap_err(), Errno::FAULT);
    let memory = resolve_one(addr, PAGE, Perm::RO);
    assert!(memory.is_shared() && memory.pin_pages() == 0);
    assert!(memory.read(0, &mut [0]).is_ok() && memory.write(0, &[1]).is_err());
    let none = map_fd(memfd(1), 1, ProtFlags::empty(), MapFlags::SHARED);
    assert_eq!(space.resolve(none, PAGE, Perm::RO).unwrap_err(), Errno::FAULT);
}

#[test]
fn unaligned_ranges_have_the_requested_bounds() {
    let addr = map_fd(memfd(3), 3, RW, MapFlags::SHARED);
    let memory = assert_mapped(addr + PAGE + 100, 5000);
    assert_eq!(memory.pin_pages(), 2);
    let MemoryRecord::Object { object, size, write } = memory.record() else { panic!("{memory:?}") };
    assert_eq!((object.offset, size, write), (PAGE + 100, 5000, true));
    poke(addr + PAGE + 100 + 4999, &[7]);
    let mut byte = [0];
    memory.read(4999, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    assert!(memory.read(5000, &mut byte).is_err() && memory.read(4999, &mut [0; 2]).is_err());
    assert!(memory.host_addr(4999).is_some() && memory.host_addr(5000).is_none());
}

#[test]
fn a_split_object_gives_fragments_of_one_object() {
    let fd = memfd(3);
    let addr = map_fd(&fd, 3, RW, MapFlags::SHARED);
    // SAFETY: a page just mapped, without references into it; the protection is what splits the mapping.
    unsafe {
        mprotect(at(addr + PAGE), 4096, MprotectFlags::READ | MprotectFlags::WRITE | MprotectFlags::EXEC)
    }
    .unwrap();
    let fragments = this_space().resolve(addr, 3 * PAGE, Perm::RW).unwrap();
    assert_eq!(fragments.len(), 3);
    for (index, fragment) in fragments.iter().enumerate() {
        assert_same_bytes(&fragment.memory, addr + index as u64 * PAGE);
    }
    let files: Vec<_> = fragments
        .iter()
        .filter_map(|fragment| fragment.memory.file())
        .map(|file| file.as_fd().as_raw_fd())
        .collect();
    assert!(files.len() == 3 && files.windows(2).all(|pair| pair[0] == pair[1]), "one descriptor: {files:?}");
    let whole = map_fd(&fd, 3, RW, MapFlags::SHARED);
    let second = resolve_one(whole + PAGE, PAGE, Perm::RW);
    assert!(second.same_object(0, &fragments[1].memory, 0));
    assert!(!second.same_object(0, &fragments[0].memory, 0));
}

#[test]
fn adjacent_shared_and_private_mappings_resolve_separately() {
    let addr = map_anonymous(2, MapFlags::PRIVATE);
    let fd = memfd(1);
    // SAFETY: replaces a page of a mapping made above, into which there are no references.
    unsafe { mmap(at(addr), 4096, RW, MapFlags::SHARED | MapFlags::FIXED, &fd, 0) }.unwrap();
    let fragments = this_space().resolve(addr, 2 * PAGE, Perm::RW).unwrap();
    let shared: Vec<_> = fragments.iter().map(|Fragment { memory, .. }| memory.is_shared()).collect();
    assert_eq!(shared, [true, false]);
}

#[test]
fn a_device_file_is_not_opened() {
    let zero = std::fs::File::options().read(true).write(true).open("/dev/zero").unwrap();
    // A private mapping of /dev/zero is anonymous memory; a shared one is a shmem object and not the device.
    assert_copied(map_fd(&zero, 1, RW, MapFlags::PRIVATE), PAGE);
    assert_mapped(map_fd(&zero, 1, RW, MapFlags::SHARED), PAGE);
}

#[test]
fn without_access_to_map_files_a_descriptor_of_the_client_is_used() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let fd = memfd(1);
    let with_fd = map_fd(&fd, 1, RW, MapFlags::SHARED);
    let without_fd = map_anonymous(1, MapFlags::SHARED);
    let mut sets = capabilities(None).unwrap();
    sets.effective.remove(CapabilitySet::SYS_ADMIN | CapabilitySet::CHECKPOINT_RESTORE);
    set_capabilities(None, sets).unwrap();
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    let space = Spaces::new().adopt(&Caller::new(thread).unwrap()).unwrap();
    let link = std::fs::read_dir(format!("/proc/{thread}/map_files")).unwrap().next().unwrap().unwrap();
    assert!(std::fs::metadata(link.path()).is_err(), "this test needs map_files to be refused");
    let mapped = space.resolve(with_fd, PAGE, Perm::RW).unwrap().remove(0).memory;
    assert!(mapped.is_shared());
    assert_same_bytes(&mapped, with_fd);
    let copied = space.resolve(without_fd, PAGE, Perm::RW).unwrap().remove(0).memory;
    assert!(!copied.is_shared());
    assert_same_bytes(&copied, without_fd);
}

#[test]
fn shared_memory_outlives_its_process_and_private_memory_does_not() {
    for end in ["exec", "kill"] {
        let mut subject = Subject::start();
        let space = Spaces::new().adopt(&Caller::new(subject.tid).unwrap()).unwrap();
        let (shared, private) = (subject.run("map shared"), subject.run("map private"));
        let resolve = |addr| space.resolve(addr, 8192, Perm::RW).unwrap().remove(0).memory;
        let (shared, private) = (resolve(shared), resolve(private));
        let mut bytes = [0; 7];
        private.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"subject");
        match end {
            "exec" => assert_eq!(subject.run_id("exec"), subject.tid),
            _ => subject.kill(),
        }
        bytes = [0; 7];
        shared.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"subject", "after {end}");
        assert!(private.read(0, &mut bytes).is_err() && private.write(0, &bytes).is_err(), "after {end}");
        assert_eq!(space.resolve(0x10000, 4096, Perm::RO).unwrap_err(), Errno::FAULT);
    }
}

#[test]
fn a_saved_object_is_mapped_again() {
    let addr = map_fd(memfd(3), 3, RW, MapFlags::SHARED);
    let memory = resolve_one(addr + PAGE + 8, PAGE, Perm::RW);
    let MemoryRecord::Object { object, size, write } = memory.record() else { panic!("{memory:?}") };
    let file = memory.file().unwrap().as_fd().try_clone_to_owned().unwrap();
    let again = GuestMemory::from_object(Arc::new(file.into()), object, size, write).unwrap();
    drop(memory);
    assert_same_bytes(&again, addr + PAGE + 8);
}

#[test]
fn a_truncated_object_faults_and_the_process_survives() {
    let fd = memfd(2);
    let memory = assert_mapped(map_fd(&fd, 2, RW, MapFlags::SHARED), 2 * PAGE);
    ftruncate(&fd, 0).unwrap();
    assert!(memory.write(0, &[1]).is_err());
    assert!(memory.map().unwrap().0.poisoned());
}

#[test]
fn only_guest_mappings_survive_sigbus() {
    let mut subject = Subject::start();
    assert_eq!(subject.run("truncate a guest mapping"), 1);
    assert_eq!(subject.run("truncate a guest mapping"), 1);
    assert_eq!(subject.run_fatal("truncate another mapping"), Some(libc::SIGBUS));
    assert_eq!(Subject::start().run_fatal("send itself SIGBUS"), Some(libc::SIGBUS));
}

#[test]
fn a_ring_works_in_copied_memory_too() {
    use vdpa_core::ring::{Area, Fault};
    let addr = map_anonymous(1, MapFlags::PRIVATE);
    let area = resolve_one(addr, PAGE, Perm::RW).area(16, 64).unwrap();
    poke(addr + 18, &[0x34, 0x12]);
    assert_eq!(area.load_u16(2), Ok(0x1234));
    area.store_u16(62, 0xabcd).unwrap();
    assert_eq!((peek(addr + 78), peek(addr + 79)), (0xcd, 0xab));
    assert_eq!((area.store_u16(63, 0), area.size()), (Err(Fault { addr: 63 }), 64));
}
