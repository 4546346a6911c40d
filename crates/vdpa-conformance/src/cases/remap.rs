//! A case about REMAP to other memory than that which is mapped, as shadow rings use it. The live-update series leaves it to the client.

use vdpa_core::features::BackendFeatures;
use vdpa_core::types::iotlb_type;

use crate::blk_driver::{BlkDriver, remap_message};
use crate::case::{Case, Ctx, Need, Outcome, check, prepare};
use crate::device::MESSAGE_SIZE;
use crate::memory::PAGE;
use crate::request::Request;

pub(super) const CASES: &[Case] = &[Case {
    id: "remap.other-memory",
    spec: "8.5",
    covers: &[Request::IOTLB_REMAP],
    needs: &[
        Need::Backend(BackendFeatures::IOTLB_REMAP),
        Need::Backend(BackendFeatures::SUSPEND),
        Need::Backend(BackendFeatures::RESUME),
        Need::DeviceId(2),
        Need::RingSize(8),
    ],
    run: other_memory,
}];

/// The ring goes on in the other memory, which has what the first one had, and the first one is not touched any more.
fn other_memory(ctx: &mut Ctx<'_>) -> Outcome {
    const SIZE: usize = 0x1000;
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.read_sector("in the first memory")?;
    let pages = 0..usize::try_from(driver.region.size() / PAGE).unwrap_or(0);
    for round in ["there", "back", "there again"] {
        let other = BlkDriver::memory()?;
        prepare("VHOST_VDPA_SUSPEND", driver.device.call(Request::SUSPEND))?;
        for page in pages.clone() {
            other.write(page * SIZE, &driver.region.read::<SIZE>(page * SIZE)?)?;
        }
        let mapped = Ok(MESSAGE_SIZE);
        check("BATCH_BEGIN", driver.device.message_of_type(0, iotlb_type::BATCH_BEGIN), mapped)?;
        let message = remap_message(other.uaddr(), other.size());
        check(&format!("REMAP to other memory, {round}"), driver.device.message(0, message), mapped)?;
        check("BATCH_END", driver.device.message_of_type(0, iotlb_type::BATCH_END), mapped)?;
        prepare("VHOST_VDPA_RESUME", driver.device.call(Request::RESUME))?;
        let before = std::mem::replace(&mut driver.region, other);
        let mut left = Vec::new();
        for page in pages.clone() {
            left.push(before.read::<SIZE>(page * SIZE)?);
        }
        driver.read_sector(&format!("in the other memory, {round}"))?;
        for (page, bytes) in pages.clone().zip(left) {
            let same = before.read::<SIZE>(page * SIZE)? == bytes;
            check(&format!("page {page} of the memory before is as it was, {round}"), same, true)?;
        }
    }
    Ok(())
}
