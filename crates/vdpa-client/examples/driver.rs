//! A program that drives a disk and replaces itself by exec, each time with requests in flight.
//!
//! `cargo run -p vdpa-client --example driver -- /run/vdpad/dev/vhost-vdpa-0 5` makes five updates. Each image submits writes
//! of eight blocks, and the next image receives their completions. The disk is overwritten.

#[path = "support/blk.rs"]
mod blk;

use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{self, Devices, Image, Plan, Via};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use blk::{BLOCK, Disk, Result, SLOTS};

/// Section with the program's own state: the number of updates made.
const SECTION: &str = "example/driver";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: driver DEVICE UPDATES")?;
    let wanted: u8 = args.next().ok_or("usage: driver DEVICE UPDATES")?.parse()?;

    let (mut disk, made) = match update::restore::<VhostVdpaFd>()? {
        None => (Disk::<VhostVdpaFd>::open(&path)?, 0),
        Some(restored) => resume(restored)?,
    };
    if made == wanted {
        println!("{made} updates, nothing lost");
        return Ok(());
    }

    for slot in 0..SLOTS {
        disk.begin_write(slot, slot, &[made; BLOCK])?;
    }
    // From here until the next image starts, no program drives the disk; the device continues with the submitted requests.
    let devices = Devices::one("disk", disk.session);
    let plan = Plan::new().section(Section::json(SECTION, 1, &made)?);
    let failed =
        plan.prepare(&devices, Via::Exec(Image::new("/proc/self/exe")))?.switch(devices, Sections::new());
    match failed {
        Ok(_) => Err("an exec does not return".into()),
        // A real program would continue with `failed.devices`, which work as before.
        Err(failed) => Err(failed.error.into()),
    }
}

/// Takes the disk over in a new image: receives the completions of the requests in flight and checks that none is missing.
fn resume(restored: update::Restored<VhostVdpaFd>) -> Result<(Disk<VhostVdpaFd>, u8)> {
    let (session, mut sections, report) = restored.into_one().map_err(|_| "there is one disk")?;
    let made: u8 = sections.take(SECTION).ok_or("no section of this program")?.parse(1)?;
    sections.ensure_consumed()?;
    let mut disk = Disk { session };
    let mut done: Vec<u64> = (0..SLOTS).map(|_| disk.next_done()).collect::<Result<_>>()?;
    done.sort_unstable();
    if done != (0..SLOTS).collect::<Vec<_>>() {
        return Err(format!("answered: {done:?}").into());
    }
    for block in 0..SLOTS {
        if disk.read(block)? != [made; BLOCK] {
            return Err(format!("block {block} is not as it was written").into());
        }
    }
    // Reports the update to the daemon. The disk is driven again by now, so the report does not add to the downtime.
    let _ = report.report_to_server("disk", &disk.session);
    println!("{report}");
    Ok((disk, made + 1))
}
