// Unsound: E0277
#![forbid(unsafe_code)]
//! Memory that the caller has mapped is given by what owns the mapping.
use vdpa_client::memory::Memory;
use vdpa_client::memfd;
use vdpa_client::mmap::{Prot, SharedMap};

fn main() {
    let bytes = vec![0x55_u8; 8192];
    let fd = memfd::create(c"memory", 4096, None).unwrap();
    #[cfg(unsound)]
    let map = bytes.as_ptr().addr() as u64;
    #[cfg(not(unsound))]
    let map = SharedMap::map(&fd, 0, 4096, Prot::RW, false).unwrap();
    println!("{:?} {bytes:?}", Memory::from_mapping("memory", fd, 0, map));
}
