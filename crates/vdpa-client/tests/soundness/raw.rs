// Unsound: E0133
#![forbid(unsafe_code)]
//! An address becomes memory by a promise of the caller, which is unsafe.
use vdpa_client::memory::Memory;
use vdpa_client::mmap::{PrivateMap, SharedMap};

fn main() {
    let bytes = vec![0x55_u8; 8192];
    #[cfg(unsound)]
    let map = SharedMap::from_raw_parts(bytes.as_ptr().addr(), 4096);
    #[cfg(not(unsound))]
    let map = SharedMap::from(PrivateMap::new(4096).unwrap());
    println!("{:?} {bytes:?}", Memory::private("memory", map));
}
