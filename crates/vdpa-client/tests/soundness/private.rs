// Unsound: E0277
#![forbid(unsafe_code)]
//! Private memory is given by what owns it.
use vdpa_client::memory::Memory;
use vdpa_client::mmap::PrivateMap;

fn main() {
    let mut bytes = vec![0x55_u8; 8192];
    #[cfg(unsound)]
    let map = &mut bytes[..];
    #[cfg(not(unsound))]
    let map = PrivateMap::new(4096).unwrap();
    println!("{:?}", Memory::private("memory", map));
    bytes.clear();
}
