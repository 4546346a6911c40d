//! The keeper's own process.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, IovaRange, QueueIndex, VringAddr};
use vdpa_holder::packet;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::rlimit;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use super::protocol::{
    Answer, CONFIG_MAX, Enter, KeptMapping, MAPPINGS_MAX, PACKET_MAX, Request, VERSION, Value,
};

/// For what is no request.
const BADMSG: Errno = Errno::from_raw(74);
/// For a daemon in whose place another one is.
const STALE: Errno = Errno::from_raw(116);

/// Carries out requests on a device until nobody has the other end of `lobby`, and closes the device then. `device` is its name, for
/// the log. Blocks; one request at a time.
///
/// # Errors
/// Those of `poll(2)`.
pub fn run(lobby: impl AsFd, device: &str) -> io::Result<()> {
    // What the daemon is called, it was started as; this is how the kernel and ps know it.
    let _ = rustix::thread::set_name(c"vdpad-keeper");
    let mut kept = Kept { device: None, mapped: BTreeMap::new(), in_charge: None };
    let mut connections: BTreeMap<u64, OwnedFd> = BTreeMap::new();
    let mut next = 0;
    loop {
        let mut fds = vec![PollFd::new(&lobby, PollFlags::IN)];
        fds.extend(connections.values().map(|socket| PollFd::new(socket, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let numbers: Vec<u64> = connections.keys().copied().collect();
        for (number, _) in numbers.into_iter().zip(ready.iter().skip(1)).filter(|(_, ready)| **ready) {
            let ended = connections.get(&number).is_none_or(|socket| kept.serve(number, socket));
            if ended {
                connections.remove(&number);
            }
        }
        if ready.first() == Some(&true) {
            match packet::receive::<PACKET_MAX>(&lobby, false) {
                Ok(None) => {
                    tracing::info!(device, "no daemon has it any more: the device is closed");
                    return Ok(());
                }
                Ok(Some((bytes, fds))) => {
                    connections.extend(kept.enter(&bytes, fds).map(|socket| (next, socket)));
                    next += 1;
                }
                Err(_) => {}
            }
        }
    }
}

/// A device, and what was asked of it that cannot be read from it.
struct Kept {
    device: Option<VhostVdpaFd>,
    mapped: BTreeMap<(Asid, u64), KeptMapping>,
    /// The connection that may change the device.
    in_charge: Option<u64>,
}

impl Kept {
    /// Who has entered the lobby: the connection that came along. With the first one comes the device.
    fn enter(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Option<OwnedFd> {
        serde_json::from_slice::<Enter>(bytes).ok()?;
        let mut fds = fds.into_iter();
        let socket = fds.next()?;
        if let Some(device) = fds.next().filter(|_| self.device.is_none() && self.in_charge.is_none()) {
            self.device = Some(VhostVdpaFd::from_fd(device));
        }
        Some(socket)
    }

    /// Answers one request; returns whether the connection has ended.
    fn serve(&mut self, number: u64, socket: &OwnedFd) -> bool {
        let (bytes, fds) = match packet::receive::<PACKET_MAX>(socket, false) {
            Ok(Some(came)) => came,
            Ok(None) => return true,
            Err(Errno::AGAIN) => return false,
            Err(_) => return true,
        };
        let request = serde_json::from_slice::<Request>(&bytes).map_err(|_| BADMSG);
        let answer: Answer =
            request.and_then(|request| self.execute(number, request, fds)).map_err(Errno::raw);
        let bytes = serde_json::to_vec(&answer).unwrap_or_default();
        packet::send(socket, &bytes, &[]).is_err()
    }

    fn execute(&mut self, number: u64, request: Request, fds: Vec<OwnedFd>) -> Result<Value, Errno> {
        if !request.only_asks() && self.in_charge != Some(number) {
            return Err(STALE);
        }
        match request {
            Request::Hello { version } => return Ok(Value::Number(version.min(VERSION).into())),
            Request::Take => {
                self.in_charge = Some(number);
                return Ok(Value::Nothing);
            }
            Request::Close => {
                self.device = None;
                self.mapped.clear();
                return Ok(Value::Nothing);
            }
            Request::Mappings { asid, above } => return Ok(self.mappings(asid, above)),
            Request::Map { asid, mapping } => return self.map_all(asid, &[mapping], &fds),
            Request::MapAll { asid, mappings } => return self.map_all(asid, &mappings, &fds),
            Request::Unmap { asid, range } => return self.unmap_all(asid, &[range]),
            Request::UnmapAll { asid, ranges } => return self.unmap_all(asid, &ranges),
            _ => {}
        }
        let device = self.device.as_ref().ok_or(Errno::NODEV)?;
        let object = fds.into_iter().next();
        match request {
            Request::SetConfigCall
            | Request::SetVringKick { .. }
            | Request::SetVringCall { .. }
            | Request::SetVringErr { .. } => {
                let event = object.map(EventFd::from_peer).transpose().map_err(|_| Errno::INVAL)?;
                set_event(device, &request, event.as_ref()).map(|()| Value::Nothing)
            }
            request => {
                ask(device, &request).unwrap_or_else(|| change(device, request).map(|()| Value::Nothing))
            }
        }
    }

    fn map_all(&mut self, asid: Asid, mappings: &[KeptMapping], objects: &[OwnedFd]) -> Result<Value, Errno> {
        let device = self.device.as_ref().ok_or(Errno::NODEV)?;
        // Some are missing where this process may have no more descriptors.
        if objects.len() != mappings.len() {
            return Err(BADMSG);
        }
        for (mapping, object) in mappings.iter().zip(objects) {
            map(device, asid, mapping, object)?;
            self.mapped.insert((asid, mapping.range.first()), *mapping);
        }
        Ok(Value::Nothing)
    }

    fn unmap_all(&mut self, asid: Asid, ranges: &[IovaRange]) -> Result<Value, Errno> {
        let device = self.device.as_ref().ok_or(Errno::NODEV)?;
        for &range in ranges {
            device.dma_unmap(asid, range.first(), size(range)?)?;
            self.mapped.remove(&(asid, range.first()));
        }
        Ok(Value::Nothing)
    }

    fn mappings(&self, asid: Asid, above: Option<u64>) -> Value {
        let all = self.mapped.range((asid, 0)..=(asid, u64::MAX));
        let rest = all.filter(|((_, first), _)| above.is_none_or(|above| *first > above));
        Value::Mappings(rest.map(|(_, mapping)| *mapping).take(MAPPINGS_MAX).collect())
    }
}

/// What a message can say: not the whole 64 bits.
fn size(range: IovaRange) -> Result<u64, Errno> {
    (range.last() - range.first()).checked_add(1).ok_or(Errno::INVAL)
}

/// Maps memory in this process and tells the device its address. It stays as long as the device has it.
fn map(device: &VhostVdpaFd, asid: Asid, mapping: &KeptMapping, object: &OwnedFd) -> Result<(), Errno> {
    let &KeptMapping { range, perm, object: id } = mapping;
    let bytes = size(range)?;
    let len = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    let prot = if perm.write() { Prot::RW } else { Prot::RO };
    let (map, start) = SharedMap::map_around(object, id.offset, len, prot)?;
    let address = (map.addr() + start) as u64;
    device.dma_map(asid, range.first(), bytes, address, perm).inspect_err(|errno| {
        // The device gives no other errno, whatever the reason.
        let limit = rlimit::memlock().soft;
        tracing::warn!(%asid, %range, %errno, memlock = ?limit, "the device behind refuses a mapping; if it pins memory, \
            RLIMIT_MEMLOCK of the daemon limits all of it");
    })
}

fn set_event(device: &VhostVdpaFd, request: &Request, event: Option<&EventFd>) -> Result<(), Errno> {
    match *request {
        Request::SetConfigCall => device.set_config_call(event),
        Request::SetVringKick { index } => device.set_vring_kick(index, event),
        Request::SetVringCall { index } => device.set_vring_call(index, event),
        Request::SetVringErr { index } => device.set_vring_err(index, event),
        _ => Err(BADMSG),
    }
}

/// Requests with an answer; `None` for others.
fn ask(device: &VhostVdpaFd, request: &Request) -> Option<Result<Value, Errno>> {
    let number = |result: Result<u64, Errno>| result.map(Value::Number);
    Some(match *request {
        Request::DeviceId => number(device.device_id().map(u64::from)),
        Request::Status => number(device.status().map(|status| status.0.into())),
        Request::Features => number(device.features().map(|features| features.0)),
        Request::BackendFeatures => number(device.backend_features().map(|features| features.0)),
        Request::VqsCount => number(device.vqs_count().map(u64::from)),
        Request::GroupNum => number(device.group_num().map(u64::from)),
        Request::AsNum => number(device.as_num().map(u64::from)),
        Request::IovaRange => device.iova_range().map(Value::Range),
        Request::ConfigSize => number(device.config_size().map(u64::from)),
        Request::Config { offset, len } if len <= CONFIG_MAX => {
            let mut bytes = vec![0; len];
            device.config(offset, &mut bytes).map(|()| Value::Bytes(bytes))
        }
        Request::Config { .. } => Err(Errno::INVAL),
        Request::VringNum => number(device.vring_num().map(u64::from)),
        Request::VringBase { index } => number(device.vring_base(index).map(u64::from)),
        Request::VringGroup { index } => number(device.vring_group(index).map(|group| group.0.into())),
        Request::VringDescGroup { index } => {
            number(device.vring_desc_group(index).map(|group| group.0.into()))
        }
        Request::VringSize { index } => number(device.vring_size(index).map(u64::from)),
        _ => return None,
    })
}

/// Requests without an answer.
fn change(device: &VhostVdpaFd, request: Request) -> Result<(), Errno> {
    match request {
        Request::SetOwner => device.set_owner(),
        Request::SetStatus { status } => device.set_status(Status(status)),
        Request::SetFeatures { features } => device.set_features(Features(features)),
        Request::SetBackendFeatures { features } => device.set_backend_features(BackendFeatures(features)),
        Request::BatchBegin { asid } => device.batch_begin(asid),
        Request::BatchEnd { asid } => device.batch_end(asid),
        Request::SetConfig { offset, data } => device.set_config(offset, &data),
        Request::SetVringNum { index, num } => device.set_vring_num(index, num),
        Request::SetVringAddr { index, flags, desc, used, avail, log } => {
            device.set_vring_addr(index, &VringAddr { flags, desc, used, avail, log })
        }
        Request::SetVringBase { index, num } => device.set_vring_base(index, num),
        Request::SetVringEnable { index, enable } => device.set_vring_enable(index, enable),
        Request::SetGroupAsid { group, asid } => device.set_group_asid(group, asid),
        Request::Suspend => device.suspend(),
        Request::Resume => device.resume(),
        Request::UnbindEvents => unbind_events(device),
        _ => Err(BADMSG),
    }
}

fn unbind_events(device: &VhostVdpaFd) -> Result<(), Errno> {
    let queues = u16::try_from(device.vqs_count()?).unwrap_or(u16::MAX);
    for index in (0..queues).map(QueueIndex) {
        device.set_vring_kick(index, None)?;
        device.set_vring_call(index, None)?;
        device.set_vring_err(index, None)?;
    }
    Ok(())
}
