//! A program that drives a disk and replaces itself by exec, with requests in flight each time.
//!
//! `cargo run -p vdpa-client --example driver -- /run/vdpa/dev/vhost-vdpa-0 5`: five updates; each image writes eight
//! blocks and leaves it to the next one to hear that they are written. The disk is overwritten.

#[path = "support/blk.rs"]
mod blk;

use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{self, Devices, Image, Plan, Via};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use blk::{BLOCK, Disk, Result, SLOTS};

/// What this program carries over itself: how many updates were made.
const SECTION: &str = "example/driver";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: driver DEVICE UPDATES")?;
    let wanted: u8 = args.next().ok_or("usage: driver DEVICE UPDATES")?.parse()?;

    let (mut disk, made) = match update::restore::<VhostVdpaFd>()? {
        None => (Disk::<VhostVdpaFd>::open(&path)?, 0),
        Some(restored) => go_on(restored)?,
    };
    if made == wanted {
        println!("{made} updates, nothing lost");
        return Ok(());
    }

    for slot in 0..SLOTS {
        disk.begin_write(slot, slot, &[made; BLOCK])?;
    }
    // From here to the next image nobody drives the disk, and it goes on by itself.
    let devices = Devices::one("disk", disk.session);
    let plan = Plan::new().section(Section::json(SECTION, 1, &made)?);
    let failed =
        plan.prepare(&devices, Via::Exec(Image::new("/proc/self/exe")))?.switch(devices, Sections::new());
    match failed {
        Ok(_) => Err("an exec does not return".into()),
        // A real program would go on with `failed.devices`, which work as before.
        Err(failed) => Err(failed.error.into()),
    }
}

/// The first thing a new image does: hears what was in flight, and looks whether it is all there.
fn go_on(restored: update::Restored<VhostVdpaFd>) -> Result<(Disk<VhostVdpaFd>, u8)> {
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
    // Now that the disk is driven again, whoever looks after the daemon may know.
    let _ = report.report_to_server("disk", &disk.session);
    println!("{report}");
    Ok((disk, made + 1))
}
