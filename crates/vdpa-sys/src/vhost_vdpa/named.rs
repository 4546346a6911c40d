//! Requests whose arguments name memory that a device may write: `SET_MEM_TABLE`, `SET_LOG_BASE`, and those of dirty tracking.

use zerocopy::FromBytes;

use super::dirty;
use crate::dma::{self, Named};
use crate::mmap::SharedMap;
use crate::uapi::dirty::Request;
use crate::uapi::vhost as uapi;

/// The memory that an argument of any bytes names, to be kept for as long as the device may write it; `None` when it is not memory that
/// devices may be told of.
pub(super) fn named(cmd: u32, request: Option<Request>, bytes: &[u8]) -> Option<Named> {
    match cmd {
        uapi::VHOST_SET_MEM_TABLE => table(bytes).map(Named::Table),
        uapi::VHOST_SET_LOG_BASE => {
            let Ok((base, _)) = u64::read_from_prefix(bytes) else { return Some(Named::Nothing) };
            // A device writes no more than what is mapped there as one.
            if dma::is_memory(base, 1) { dma::hold(base, 1).map(Named::Log) } else { Some(Named::Nothing) }
        }
        _ => dirty::is_harmless(request, bytes).then_some(Named::Nothing),
    }
}

/// The memory of all regions. A table that is cut off is refused by whoever reads it, as is one with too many regions.
fn table(bytes: &[u8]) -> Option<Vec<SharedMap>> {
    let mut maps = Vec::new();
    let Ok((header, mut rest)) = uapi::MemoryHeader::read_from_prefix(bytes) else { return Some(maps) };
    for _ in 0..header.nregions {
        let Ok((region, behind)) = uapi::MemoryRegion::read_from_prefix(rest) else { break };
        rest = behind;
        if dma::is_memory(region.userspace_addr, region.memory_size) {
            maps.extend(dma::hold(region.userspace_addr, region.memory_size)?);
        }
    }
    Some(maps)
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;
    use crate::memfd;
    use crate::mmap::Prot;

    fn argument(regions: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = u64::try_from(regions.len()).unwrap().to_le_bytes().to_vec();
        for &(userspace_addr, memory_size) in regions {
            let region = uapi::MemoryRegion { userspace_addr, memory_size, ..uapi::MemoryRegion::default() };
            bytes.extend_from_slice(region.as_bytes());
        }
        bytes
    }

    #[test]
    fn a_table_and_a_log_name_memory_that_was_made_for_devices() {
        let fd = memfd::create(c"named", 0x4000, None).unwrap();
        let map = SharedMap::map(&fd, 0, 0x4000, Prot::RW, false).unwrap();
        let (at, heap) = (map.addr() as u64, vec![0_u8; 0x2000]);
        let other = heap.as_ptr().addr() as u64;
        let table = |regions: &[(u64, u64)]| named(uapi::VHOST_SET_MEM_TABLE, None, &argument(regions));
        assert!(
            matches!(table(&[(at, 0x1000), (at + 0x1000, 0x3000)]), Some(Named::Table(maps)) if maps.len() == 2)
        );
        assert!(table(&[(at, 0x1000), (other, 0x1000)]).is_none());
        assert!(table(&[(at + 0x1000, 1 << 30)]).is_none(), "what is behind it is that of others");
        assert!(matches!(table(&[(0, 0x1000)]), Some(Named::Table(maps)) if maps.is_empty()));
        let cut = &argument(&[(at, 0x1000), (other, 0x1000)])[..60];
        assert!(named(uapi::VHOST_SET_MEM_TABLE, None, cut).is_some(), "it cannot be read");
        let log = |base: u64| named(uapi::VHOST_SET_LOG_BASE, None, base.as_bytes());
        assert!(matches!(log(at + 0x2000), Some(Named::Log(maps)) if maps.len() == 1));
        assert!(log(other).is_none() && matches!(log(0), Some(Named::Nothing)));
        assert!(matches!(named(uapi::VHOST_SET_LOG_FD, None, &[0; 4]), Some(Named::Nothing)));
    }
}
