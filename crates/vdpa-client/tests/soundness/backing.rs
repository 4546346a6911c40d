// Unsound: E0599
#![forbid(unsafe_code)]
//! A disk that reads into the memory of a `Vec`: once this overwrote the bytes behind a live slice.
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::memory::Memory;
use vdpa_client::types::Perm;

fn main() {
    let bytes = vec![0x55_u8; 8192];
    let slice = &bytes[..];
    #[cfg(unsound)]
    let backing = Backing::HostAddress(slice.as_ptr().addr() as u64);
    #[cfg(not(unsound))]
    let backing = Backing::Memory(Memory::anonymous("memory", 4096).unwrap(), 0);
    let spec =
        RegionSpec { name: "vec".into(), backing, iova: 0, size: 4096, perm: Perm::RW, populate: false };
    println!("{spec:?} {slice:?}");
}
