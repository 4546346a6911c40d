//! A keeper: the process that has a vhost-vdpa device of somebody else open, and makes the requests on it for the daemon.
//!
//! The kernel binds such a device to the address space of its owner (`vhost_dev_check_owner()`, `VHOST_SET_OWNER`) and knows client
//! memory by addresses of it. So the owner must not change and must not end while the device runs, and a daemon does both. A keeper
//! does neither: it is started for one device, carries out what it is asked, and ends when nobody has its socket any more.
//!
//! ```text
//!   daemon --- connection ---> keeper ---> /dev/vhost-vdpa-N
//!     |                          ^
//!   holder --- lobby ------------'         by which the next daemon gets a connection of its own
//! ```
//!
//! The data path does not pass it either: the rings are in client memory, and the events are those of the client.

mod client;
mod protocol;
mod server;

pub(crate) use client::{Keeper, KeeperError};
pub(crate) use protocol::KeptMapping;
pub use server::run;

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::sync::Arc;
    use std::thread::{self, JoinHandle};

    use vdpa_core::Errno;
    use vdpa_core::features::Status;
    use vdpa_core::ops::VdpaOps as _;
    use vdpa_holder::packet;
    use vdpa_sys::memfd;

    use super::{Keeper, run};

    /// A keeper of a file that is no device, on a thread.
    fn keeper() -> (Keeper, JoinHandle<std::io::Result<()>>) {
        let (lobby, theirs) = packet::pair().unwrap();
        let runs = thread::spawn(move || run(theirs, "test"));
        let device = memfd::create(c"no-device", 4096, None).unwrap();
        (Keeper::enter(Arc::new(lobby), Some(device)).unwrap(), runs)
    }

    #[test]
    fn one_daemon_changes_the_device_and_the_others_ask() {
        const STALE: Errno = Errno::from_raw(116);
        let (first, runs) = keeper();
        assert_eq!(first.set_status(Status::RESET), Err(STALE), "nobody has taken it");
        first.take().unwrap();
        // It is carried out, on what is no device.
        assert_eq!(first.set_status(Status::RESET), Err(Errno::NOTTY));
        let second = Keeper::join(Arc::clone(first.lobby())).unwrap();
        assert_eq!(second.status(), Err(Errno::NOTTY), "asking changes nothing");
        assert_eq!(second.suspend(), Err(STALE));
        assert_eq!(first.suspend(), Err(Errno::NOTTY));
        second.take().unwrap();
        assert_eq!((first.suspend(), second.suspend()), (Err(STALE), Err(Errno::NOTTY)));
        second.close().unwrap();
        assert_eq!(second.status(), Err(Errno::NODEV));
        let lobby = Arc::clone(first.lobby());
        drop((first, second));
        assert!(!runs.is_finished(), "it waits for the next daemon as long as somebody has the lobby");
        assert!(Keeper::join(Arc::clone(&lobby)).is_ok());
        drop(lobby);
        runs.join().unwrap().unwrap();
    }

    #[test]
    fn what_is_no_request_is_answered_with_an_error() {
        let (lobby, theirs) = packet::pair().unwrap();
        let runs = thread::spawn(move || run(theirs, "test"));
        packet::send(&lobby, b"nonsense", &[]).unwrap();
        packet::send(&lobby, b"{}", &[]).unwrap();
        let (ours, connection): (OwnedFd, OwnedFd) = packet::pair().unwrap();
        packet::send(&lobby, b"{}", &[std::os::fd::AsFd::as_fd(&connection)]).unwrap();
        for (request, answer) in [
            (&b"nonsense"[..], r#"{"Err":74}"#),
            (br#""take""#, r#"{"Ok":"nothing"}"#),
            // No object comes along; and there is no device.
            (br#"{"set-vring-kick":{"index":0}}"#, r#"{"Err":19}"#),
            (br#"{"hello":{"version":1}}"#, r#"{"Ok":{"number":1}}"#),
            (br#"{"hello":{"version":7}}"#, r#"{"Ok":{"number":2}}"#),
            (br#"{"unmap-all":{"asid":0,"ranges":[[0,4095]]}}"#, r#"{"Err":19}"#),
            (br#"{"mappings":{"asid":0,"above":null}}"#, r#"{"Ok":{"mappings":[]}}"#),
        ] {
            packet::send(&ours, request, &[]).unwrap();
            let (bytes, _) = packet::receive::<4096>(&ours, true).unwrap().unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), answer);
        }
        drop((lobby, ours));
        runs.join().unwrap().unwrap();
    }
}
