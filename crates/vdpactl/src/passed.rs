//! What a device needs, opened here and passed to the daemon: `dev add ... passed on`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use vdpa_control::api::{AddRequest, Attrs, CtlError};
use vdpa_core::Errno;
use vdpa_sys::tap;

use crate::failure::Failure;

/// Most pairs of queues of a network card.
const PAIRS_MAX: u64 = 8;

/// Opens what the device needs, with the rights of this process. Nothing unless the request says that descriptors come.
pub(crate) fn open(request: &AddRequest) -> Result<Vec<OwnedFd>, Failure> {
    let attrs = &request.attrs;
    match attrs.get("tap") {
        _ if !attrs.is_passed() => Ok(Vec::new()),
        Some(interface) => queues(interface, attrs),
        None => disk(attrs),
    }
}

/// The disk at `path`, as its attributes want it.
fn disk(attrs: &Attrs) -> Result<Vec<OwnedFd>, Failure> {
    // The daemon says what is wrong with a request without a path.
    let Some(path) = attrs.get("path") else { return Ok(Vec::new()) };
    let is_on = |name| attrs.get(name) == Some("on");
    let direct = if is_on("direct") { OFlags::DIRECT } else { OFlags::empty() };
    let mut open = File::options();
    open.read(true).write(!is_on("readonly")).custom_flags(direct.bits().cast_signed());
    let file = open.open(path).map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
        CtlError::new(errno, format!("cannot open {path}: {error}"))
            .with_hint("With passed on, vdpactl opens it with the rights of its caller.")
    })?;
    Ok(vec![file.into()])
}

/// The queues of an interface, one for each pair.
fn queues(interface: &str, attrs: &Attrs) -> Result<Vec<OwnedFd>, Failure> {
    // Whatever else is wrong, the daemon says.
    let pairs = attrs.number("max_vqp", 1, PAIRS_MAX).ok().flatten().unwrap_or(1);
    let pairs = u16::try_from(pairs).unwrap_or(1);
    let create = attrs.get("create") == Some("on");
    let failed = |errno: Errno| {
        CtlError::new(errno, format!("cannot open {interface}: {errno}"))
            .with_hint("With passed on, vdpactl opens it with the rights of its caller: those of the interface's user, or CAP_NET_ADMIN.")
    };
    let queues: Result<Vec<_>, _> =
        (0..pairs).map(|number| tap::open_one(interface, number, pairs, create)).collect();
    let queues = queues.map_err(failed)?;
    if create {
        let mtu =
            attrs.number("mtu", 0, u16::MAX.into()).ok().flatten().and_then(|mtu| u16::try_from(mtu).ok());
        tap::bring_up(interface, mtu.unwrap_or(1500)).map_err(failed)?;
    }
    Ok(queues)
}
