//! What administrators are told of a device and its clients.

use std::time::{SystemTime, UNIX_EPOCH};

use vdpa_backend::front::vhost::{AnyParent, PendingSuccessor};
use vdpa_control::api::{DevState, Dirty, LastUpdate, Owner, QueueInfo, Successor};
use vdpa_core::device::Device;
use vdpa_core::dirty::Tracked;
use vdpa_core::features::Status;
use vdpa_core::host::PAGE_SIZE;
use vdpa_core::parent::{Parent, PinLimit};
use vdpa_core::types::QueueIndex;
use vdpa_sys::process::{Caller, OwnerSpace};
use vdpa_sys::rlimit;
use vdpa_sys::uapi::report::UpdateReport;

pub(super) fn state(
    device: &Device<AnyParent>,
    since: Option<SystemTime>,
    successor: Option<PendingSuccessor>,
) -> DevState {
    let owner = device.owner();
    let queues = device.vring_infos().zip(0..).map(|(info, index)| {
        let stats = device.parent().queue_stats(QueueIndex(index));
        QueueInfo {
            index,
            size: info.size,
            enabled: info.enabled,
            running: info.running,
            requests: stats.requests,
            bytes: stats.bytes,
            errors: stats.errors,
            poison: stats.poison,
        }
    });
    DevState {
        open: device.is_open(),
        status: device.status(),
        suspended: device.suspended(),
        owner: owner.map(|space| describe_owner(space, since)),
        successor: successor.map(describe_successor),
        negotiated_features: device
            .negotiated_features()
            .filter(|_| device.status().contains(Status::FEATURES_OK)),
        pinned_pages: device.pinned_pages(),
        memlock_limit_pages: owner.and_then(|space| pin_limit(device, space)),
        mappings: device.mapped().entries as u64,
        max_iotlb_entries: device.profile().max_iotlb_entries as u64,
        dirty: device.dirty_tracked().map(|tracked| describe_dirty(&tracked)),
        queues: queues.collect(),
    }
}

fn describe_dirty(Tracked { page_size, ranges }: &Tracked) -> Dirty {
    let bytes = ranges.iter().map(|tracked| tracked.range.last() - tracked.range.first() + 1);
    Dirty {
        page_size: *page_size,
        ranges: ranges.len() as u64,
        pages: bytes.map(|bytes| bytes / page_size).sum(),
    }
}

/// The limit on pages pinned for the owner; `None` without one.
fn pin_limit(device: &Device<AnyParent>, owner: &OwnerSpace) -> Option<u64> {
    match device.profile().pin_limit {
        PinLimit::Pages(u64::MAX) => None,
        PinLimit::Pages(pages) => Some(pages),
        PinLimit::Rlimit => Some(rlimit::memlock_of(owner.pid()).ok()?.soft? / PAGE_SIZE),
    }
}

/// Seconds since 1970.
pub(super) fn unix(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

pub(super) fn last_update(report: &UpdateReport, at: SystemTime) -> LastUpdate {
    let name = |names: &[&str], at: u8| names.get(usize::from(at)).copied().unwrap_or("unknown").to_owned();
    let phases = [
        ("suspend", report.suspend),
        ("save", report.save),
        ("transfer", report.transfer),
        ("load", report.load),
        ("new_owner", report.new_owner),
        ("vrings", report.vrings),
        ("remap", report.remap),
        ("resume", report.resume),
        ("commit", report.commit),
    ];
    LastUpdate {
        at: unix(at),
        way: name(&["exec", "fork", "hand-over"], report.way),
        strategy: name(&["live", "resume", "reset", "reopen"], report.strategy),
        outcome: name(&["done", "rolled back"], report.outcome),
        reason: report.reason(),
        predecessor: report.predecessor,
        successor: report.successor,
        total_ns: report.total,
        prepare_ns: report.prepare,
        phases_ns: phases.into_iter().map(|(phase, ns)| (phase.to_owned(), ns)).collect(),
        mappings: report.mappings,
        queues: report.queues,
    }
}

pub(super) fn describe_owner(space: &OwnerSpace, since: Option<SystemTime>) -> Owner {
    let comm = Caller::new(space.pid()).map(|caller| caller.comm()).unwrap_or_default();
    Owner { pid: space.pid().unsigned_abs(), comm, since: since.map_or(0, unix) }
}

fn describe_successor(PendingSuccessor { process, since, status, mappings }: PendingSuccessor) -> Successor {
    let (pid, comm) = process.unzip();
    Successor {
        pid: pid.map(i32::unsigned_abs),
        comm: comm.unwrap_or_default(),
        since: unix(since),
        status,
        mappings: mappings as u64,
    }
}
