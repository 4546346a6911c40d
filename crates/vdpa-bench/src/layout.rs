//! [`Layout`]: the places of ring, request headers and data buffers in guest memory.

use vdpa_client::queue::RingLayout;
use vdpa_core::blk::SECTOR;

use super::block::STAMP_BYTES;
use super::engine::LoadError;
use super::wire::ClientConfig;

/// Bytes of a request's slot, which has its header and its status byte.
pub(super) const SLOT_BYTES: u64 = 64;

/// Offsets in guest memory, in bytes from its start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) slots: u64,
    pub(super) data: u64,
    pub(super) buffers: u64,
    pub(super) block_size: u64,
    pub(super) read_percent: u64,
    pub(super) queue_depth: u16,
    pub(super) ring_size: u16,
}

impl Layout {
    pub(super) fn new(config: &ClientConfig) -> Result<Self, LoadError> {
        let invalid = |what: String| Err(LoadError::Config { what });
        let block_size = u64::from(config.block_size);
        if block_size == 0 || !block_size.is_multiple_of(SECTOR) || block_size < STAMP_BYTES as u64 {
            return invalid(format!("a block of {block_size} bytes: a multiple of 512 is required"));
        }
        if config.queue_depth == 0 || config.queue_depth > 256 {
            return invalid(format!("a queue depth of {}: 1 to 256 are possible", config.queue_depth));
        }
        // Three descriptors per request.
        let ring_size = (config.queue_depth * 3).next_power_of_two();
        let slots = RingLayout::at(0, ring_size).end().next_multiple_of(SLOT_BYTES);
        let data =
            (slots + SLOT_BYTES * u64::from(config.queue_depth)).next_multiple_of(block_size.max(4096));
        let buffers = config.memory.saturating_sub(data) / block_size;
        let least = 4 * u64::from(config.queue_depth);
        if buffers < least || !config.memory.is_multiple_of(config.pages.bytes()) {
            let least = (data + least * block_size).next_multiple_of(4096);
            return invalid(format!(
                "{} bytes of memory: a multiple of {} from {least} on is required",
                config.memory,
                config.pages.bytes()
            ));
        }
        let read_percent = u64::from(config.read_percent.min(100));
        Ok(Self {
            slots,
            data,
            buffers,
            block_size,
            read_percent,
            queue_depth: config.queue_depth,
            ring_size,
        })
    }
}
