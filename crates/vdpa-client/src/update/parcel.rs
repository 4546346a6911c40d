//! Saved state and its descriptors, for transports of the caller.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use vdpa_core::Errno;

use super::Cause;
use super::save::Table;
use crate::state::v2;

/// State of an update as a program carries it itself: bytes, and descriptors by name.
///
/// The names are made of the caller's: `disk0/device`, `disk0/queue/1/kick`, `disk0/queue/1/call`, `memory/0/ram`, `own/log`. They
/// are unique, and the same for every parcel of one update. A program may pass the descriptors by any means that keeps the open
/// files: over a socket, over an exec, through the store of an orchestrator.
#[derive(Debug)]
#[non_exhaustive]
pub struct Parcel {
    /// The state. Its format is that of the crate, with a version and a checksum.
    pub bytes: Vec<u8>,
    /// The descriptors that the state refers to, close-on-exec.
    pub descriptors: Vec<(String, OwnedFd)>,
}

impl Parcel {
    /// A parcel with copies of the descriptors in `table`, of which `known` has the indexes.
    pub(super) fn new(bytes: Vec<u8>, known: &v2::Prepared, table: &Table) -> Result<Self, Cause> {
        let fds = table.fds();
        let mut descriptors = Vec::with_capacity(fds.len());
        for (name, number) in names(known) {
            let fd = usize::try_from(number).ok().and_then(|at| fds.get(at)).copied();
            let missing = || Cause::Invalid { what: name.clone(), reason: "it has no descriptor".to_owned() };
            let fd = fd.ok_or_else(missing)?.try_clone_to_owned();
            let source = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(0));
            let fd = fd.map_err(|e| Cause::Descriptor { name: name.clone(), source: source(e) })?;
            descriptors.push((name, fd));
        }
        Ok(Self { bytes, descriptors })
    }
}

/// The descriptors by the indexes that the state has for them; those that are not given are missing.
pub(super) fn by_index(
    state: &v2::Prepared,
    descriptors: impl IntoIterator<Item = (String, OwnedFd)>,
) -> Result<Vec<Option<OwnedFd>>, Cause> {
    let mut given: HashMap<String, OwnedFd> = descriptors.into_iter().collect();
    let mut table = Vec::new();
    for (name, number) in names(state) {
        let invalid =
            |reason: &str| Cause::Invalid { what: format!("descriptor {name}"), reason: reason.to_owned() };
        let at = usize::try_from(number).map_err(|_| invalid("its number is negative"))?;
        if at > u16::MAX.into() {
            return Err(invalid("its number is too great"));
        }
        let fd = given.remove(&name).ok_or_else(|| invalid("it was not given"))?;
        if table.len() <= at {
            table.resize_with(at + 1, || None);
        }
        if let Some(place) = table.get_mut(at) {
            *place = Some(fd);
        }
    }
    Ok(table)
}

/// Name and number of each descriptor of the state.
fn names(state: &v2::Prepared) -> Vec<(String, i32)> {
    let mut names = Vec::new();
    for (at, memory) in state.memory.memories.iter().enumerate() {
        names.push((format!("memory/{at}/{}", memory.name), memory.fd));
    }
    for device in &state.devices.devices {
        let name = &device.name;
        names.extend(device.fd.map(|fd| (format!("{name}/device"), fd)));
        let ours = device.queues.iter().map(|q| (q.index, q.kick_fd, q.call_fd));
        let guests = device.guest_queues.iter().map(|q| (q.index, q.kick_fd, q.call_fd));
        for (index, kick, call) in ours.chain(guests) {
            names.push((format!("{name}/queue/{index}/kick"), kick));
            names.push((format!("{name}/queue/{index}/call"), call));
        }
    }
    for descriptor in &state.descriptors.descriptors {
        names.push((format!("own/{}", descriptor.name), descriptor.fd));
    }
    names
}
