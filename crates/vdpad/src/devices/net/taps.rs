//! [`Taps`]: the queues of a TAP interface.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_core::features::{Bit, Features};
use vdpa_core::net::card::Effects;
use vdpa_sys::tap::{self, is_device, offload};

use crate::devices::{Kept, busy};

/// An offload of the driver, and what the kernel calls it.
const OFFLOADS: [(Bit, u32); 6] = [
    (Features::NET_GUEST_CSUM, offload::CSUM),
    (Features::NET_GUEST_TSO4, offload::TSO4),
    (Features::NET_GUEST_TSO6, offload::TSO6),
    (Features::NET_GUEST_ECN, offload::TSO_ECN),
    (Features::NET_GUEST_USO4, offload::USO4),
    (Features::NET_GUEST_USO6, offload::USO6),
];

/// The queues of a TAP interface, one for each pair of queues of the device.
#[derive(Debug)]
pub(super) struct Taps {
    queues: Vec<Arc<OwnedFd>>,
    /// It has no carrier that a program sets: that of macvtap is the one of the card below it.
    fixed_carrier: bool,
}

impl Taps {
    /// Opens the interface `name`, or the one whose character device that is, with `pairs` queues, or makes it. Of a device that is made again, the queues that were kept.
    pub(super) fn open(
        name: &str,
        create: bool,
        pairs: u16,
        mtu: u16,
        kept: &Kept,
    ) -> Result<Self, CtlError> {
        let fixed_carrier = is_device(name);
        if let Some(queues) = kept.taps() {
            let is_queue = |queue: &Arc<OwnedFd>| {
                if fixed_carrier { tap::is_queue(queue) } else { tap::is_queue_of(queue, name) }
            };
            let intact = queues.len() == usize::from(pairs)
                && queues.iter().all(|queue| is_queue(queue).unwrap_or(false));
            return if intact {
                Ok(Self { queues, fixed_carrier })
            } else {
                Err(CtlError::new(Errno::NODEV, format!("the interface {name} is gone")))
            };
        }
        let failed = |errno| refused(name, create, pairs, errno);
        let queues = match kept.passed() {
            Some(passed) => adopt(name, pairs, passed)?,
            None => {
                let queue = |number| {
                    let open = || tap::open_one(name, number, pairs, create);
                    busy::wait(|errno| errno == Errno::BUSY, open).map(Arc::new)
                };
                (0..pairs).map(queue).collect::<Result<Vec<_>, _>>().map_err(failed)?
            }
        };
        let this = Self { queues, fixed_carrier };
        // Packets are spread over the queues of pairs that the driver uses.
        this.use_pairs(1).map_err(failed)?;
        if create && !kept.is_passed() {
            tap::bring_up(name, mtu).map_err(failed)?;
        }
        kept.keep_taps(&this.queues);
        Ok(this)
    }

    /// The queue of a pair.
    pub(super) fn queue(&self, pair: u16) -> Option<&Arc<OwnedFd>> {
        self.queues.get(usize::from(pair))
    }

    /// Has the interface hand over what a driver takes that has these features.
    pub(super) fn take(&self, features: Features) -> Result<(), Errno> {
        let first = self.queue(0).ok_or(Errno::NODEV)?;
        let offloads =
            OFFLOADS.iter().filter(|(bit, _)| features.has(*bit)).fold(0, |all, (_, one)| all | one);
        tap::set_offloads(first, offloads)
    }

    /// Spreads packets over the queues of the first `pairs` pairs.
    pub(super) fn use_pairs(&self, pairs: u16) -> Result<(), Errno> {
        for (index, queue) in self.queues.iter().enumerate().skip(1) {
            match tap::set_attached(queue, index < usize::from(pairs)) {
                // It is in that state.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Sets the carrier that the host sees, where it is that of the card.
    pub(super) fn set_carrier(&self, carrier: bool) -> Result<(), Errno> {
        if self.fixed_carrier {
            return Ok(());
        }
        tap::set_carrier(self.queue(0).ok_or(Errno::NODEV)?, carrier)
    }
}

impl Effects for &Taps {
    fn set_pairs(&mut self, pairs: u16) -> bool {
        self.use_pairs(pairs).is_ok()
    }

    fn set_offloads(&mut self, offloads: Features) -> bool {
        self.take(offloads).is_ok()
    }
}

/// Takes the queues that have come with the request. Whoever has opened them had the right to; this daemon needs none.
fn adopt(name: &str, pairs: u16, passed: Vec<OwnedFd>) -> Result<Vec<Arc<OwnedFd>>, CtlError> {
    if passed.len() != usize::from(pairs) {
        let what = format!("{} descriptors came for {pairs} pairs of queues", passed.len());
        return Err(
            CtlError::new(Errno::INVAL, what).with_hint("One of the interface for each pair is right.")
        );
    }
    for (number, queue) in passed.iter().enumerate() {
        let is_queue = if is_device(name) { tap::is_queue(queue) } else { tap::is_queue_of(queue, name) };
        let wrong = match is_queue {
            Ok(true) => tap::adopt(queue).err().map(|errno| errno.to_string()),
            Ok(false) => Some("it is none".to_owned()),
            Err(errno) => Some(errno.to_string()),
        };
        if let Some(why) = wrong {
            let what = format!("descriptor {number} is not used as a queue of {name}: {why}");
            return Err(CtlError::new(Errno::INVAL, what).with_hint(
                "A TAP with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR is right, of the interface that tap names.",
            ));
        }
    }
    Ok(passed.into_iter().map(Arc::new).collect())
}

fn refused(name: &str, create: bool, pairs: u16, errno: Errno) -> CtlError {
    if is_device(name) {
        let message = format!("{name} cannot be used: {errno}");
        return CtlError::new(errno, message).with_hint(
            "A queue of a macvtap interface is right: /dev/tapN, with the index of the interface.",
        );
    }
    let queues = if pairs > 1 { " multi_queue" } else { "" };
    let (message, hint) = match errno {
        Errno::NODEV => (
            format!("there is no persistent interface {name}"),
            format!("Make it with \"ip tuntap add {name} mode tap{queues}\", or give create on."),
        ),
        Errno::EXIST => (
            format!("the interface {name} is there already"),
            "Leave create out, or choose another name.".into(),
        ),
        Errno::BUSY | Errno::TOOBIG => (
            format!("the interface {name} is in use"),
            "Another program, or another device, has all its queues open.".into(),
        ),
        Errno::INVAL if !create => (
            format!("{name} is no TAP interface{}", if pairs > 1 { " with several queues" } else { "" }),
            format!("One that is made with \"ip tuntap add {name} mode tap{queues}\" is right."),
        ),
        Errno::PERM => (
            format!("the interface {name} may not be used by this daemon"),
            "It needs CAP_NET_ADMIN, or an interface of its own user: \"ip tuntap add ... user USER\"."
                .into(),
        ),
        Errno::NOENT | Errno::ACCESS => {
            (format!("/dev/net/tun cannot be opened: {errno}"), "The kernel module tun makes it.".into())
        }
        _ => (format!("the interface {name} cannot be used: {errno}"), "See the log of the kernel.".into()),
    };
    // A device that is made again waits while something is busy; here nothing will change.
    CtlError::new(errno, message).with_hint(hint)
}

/// The offloads of a driver that this kernel has: those of UDP came with Linux 6.2. Asked by the version, because an interface that is in
/// use cannot be tried.
pub(super) fn possible_offloads() -> Features {
    let uname = rustix::system::uname();
    let all = OFFLOADS.iter().fold(Features::NONE, |all, (bit, _)| all.with(*bit));
    if version(uname.release().to_str().unwrap_or_default()) >= (6, 2) {
        all
    } else {
        all.without(Features::NET_GUEST_USO4).without(Features::NET_GUEST_USO6)
    }
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(
            version("6.12.1-generic") > version("6.2.0") && version("5.19") < (6, 2) && version("") == (0, 0)
        );
        assert_eq!(version("6.2.0-rc1"), (6, 2));
    }
}
