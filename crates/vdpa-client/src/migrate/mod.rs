//! A machine and its device move to another host.
//!
//! [`send`] at one side, [`Arrival`] at the other, and any byte stream between: a Unix socket, TCP, a tunnel. The memory of the
//! machine is sent while it runs, in rounds, each with what was written in the round before: by the device, which tracks that
//! itself, and by the processors, of which the program knows ([`Machine::written`]). When little is left, the machine is stopped, the
//! rest and the state of the device are sent, and the destination goes on. `docs/migration.md` has the order, the messages,
//! and for each point at which a side can fail where the machine runs afterwards.
//!
//! | step | source | destination |
//! |---|---|---|
//! | 1 | offers memory and device | [`Arrival::accept`]: reads the offer |
//! | 2 | | [`Arrival::prepare`]: makes memory and mappings |
//! | 3 | sends memory in rounds | [`Prepared::receive`]: puts it in its place |
//! | 4 | stops machine and device, sends the rest and the state | loads the state, [`Target::load`] |
//! | 5 | lets go: *commit* | starts the device |
//! | 6 | is done | is done: [`Landed`] |
//!
//! Until the commit the source decides, from then on the destination. A source that fails before goes on with the machine. A
//! destination that has everything and hears no more of its source is [`Waiting`]: somebody who knows that the source is gone can
//! have it start.
//!
//! ```no_run
//! use std::os::unix::net::UnixStream;
//!
//! use vdpa_client::migrate::{self, Machine, Plan};
//! use vdpa_client::session::Session;
//! use vdpa_client::vhost_vdpa::VhostVdpaFd;
//!
//! # fn f(mut session: Session<VhostVdpaFd>, machine: &mut dyn Machine) -> Result<(), Box<dyn std::error::Error>> {
//! let mut stream = UnixStream::connect("/run/migration.sock")?;
//! let report = migrate::send(&mut session, machine, &mut stream, &Plan::default())?;
//! println!("{} rounds, downtime {:?}", report.rounds.len(), report.downtime);
//! drop(session); // It runs there.
//! # Ok(())
//! # }
//! ```

mod destination;
mod error;
mod fate;
mod offer;
mod pages;
mod rounds;
mod source;
#[cfg(test)]
mod tests;
mod wire;

pub use destination::{Arrival, Arrived, Landed, Prepared, Target, Waiting};
pub use error::{MachineError, Malformed, MigrateError, Unfit};
pub use fate::{Fate, answer, ask};
pub use offer::{Offer, RegionOffer};
pub use pages::Sent;
pub use rounds::Plan;
pub use source::{Machine, Report, SendError, resume, send};
pub use wire::PROTOCOL_VERSION;

/// The messages, for fuzz targets and for the test that runs their inputs.
#[cfg(any(test, fuzzing))]
pub mod fuzzing {
    use super::offer::Offer;
    use super::wire::{self, Kind};
    use super::{MigrateError, destination};

    /// Bytes of a page, and pages of the regions that messages of pages are about.
    const PAGES: [u64; 2] = [16, 1];

    /// Reads messages from `bytes` as the sides of a migration do, until one is wrong or there are no more; how many were right.
    ///
    /// # Errors
    /// That of the message that is wrong.
    pub fn messages(mut bytes: &[u8]) -> Result<usize, MigrateError> {
        let mut count = 0;
        while !bytes.is_empty() {
            let message = wire::read(&mut bytes)?;
            match message.kind {
                Kind::Offer => message.parse::<Offer>()?.check()?,
                Kind::Pages => {
                    let runs = wire::runs(&message.payload, &PAGES)?;
                    assert!(runs.iter().all(|run| run.first + run.count <= 16), "inside of their region");
                    let mut again = Vec::new();
                    wire::write_runs(&mut again, &runs)?;
                    assert_eq!(
                        wire::read(&mut &again[..])?.payload,
                        message.payload,
                        "written as they were read"
                    );
                }
                Kind::State => {
                    let (switched, device, sections) = destination::sections(&message.payload)?;
                    assert!(
                        device.len() <= message.payload.len()
                            && switched.queues.len() <= message.payload.len()
                    );
                    assert!(sections.check_names().is_ok());
                }
                Kind::Answer => drop(message.parse::<super::Fate>()?),
                Kind::Refused | Kind::Abort | Kind::Ask => drop(message.parse::<String>()?),
                _ => {}
            }
            count += 1;
        }
        Ok(count)
    }

    /// A message of any kind with a payload, as it is on the wire: fuzz targets do not guess checksums.
    #[must_use]
    pub fn message(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let kinds = Kind::ALL;
        if let Some(kind) = kinds.get(usize::from(kind) % kinds.len()) {
            // One that is too long is none.
            let _ = wire::write(&mut bytes, *kind, payload);
        }
        bytes
    }
}

/// Section with the state of the device, as `VDPA_STATE_SAVE` has given it.
const DEVICE: &str = "vdpa/device-state";
/// Section with what the library knows of the device.
const SWITCHED: &str = "vdpa/switched";

/// What a side has done: the points at which a failure makes a difference, in the order in which they are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Source: the offer was sent.
    Offered,
    /// Destination: the offer was read.
    OfferRead,
    /// Destination: memory and mappings are made.
    Mapped,
    /// Destination: it has said that it is ready.
    ReadySent,
    /// Source: it has heard that.
    Accepted,
    /// Source: what is written is tracked.
    Tracking,
    /// Source: a round was sent, and has arrived.
    Round,
    /// Source: the machine stands still.
    Paused,
    /// Source: the device is suspended.
    Suspended,
    /// Source: all memory was sent.
    LastPages,
    /// Source: the state was saved.
    Saved,
    /// Source: it was sent.
    StateSent,
    /// Destination: it has arrived.
    StateRead,
    /// Destination: it is loaded.
    Loaded,
    /// Destination: it has said so.
    LoadedSent,
    /// Source: it has heard that.
    LoadedHeard,
    /// Source: the commit was sent. From here on only the destination may run the machine.
    Committed,
    /// Destination: it has arrived.
    CommitRead,
    /// Destination: the device runs.
    Started,
    /// Destination: it has said so.
    RunningSent,
    /// Source: it has heard that.
    RunningHeard,
}

impl Step {
    /// All steps, in their order.
    pub const ALL: [Self; 21] = [
        Self::Offered,
        Self::OfferRead,
        Self::Mapped,
        Self::ReadySent,
        Self::Accepted,
        Self::Tracking,
        Self::Round,
        Self::Paused,
        Self::Suspended,
        Self::LastPages,
        Self::Saved,
        Self::StateSent,
        Self::StateRead,
        Self::Loaded,
        Self::LoadedSent,
        Self::LoadedHeard,
        Self::Committed,
        Self::CommitRead,
        Self::Started,
        Self::RunningSent,
        Self::RunningHeard,
    ];

    /// Whether it is a step of the destination.
    #[must_use]
    pub const fn is_of_destination(self) -> bool {
        matches!(
            self,
            Self::OfferRead
                | Self::Mapped
                | Self::ReadySent
                | Self::StateRead
                | Self::Loaded
                | Self::LoadedSent
                | Self::CommitRead
                | Self::Started
                | Self::RunningSent
        )
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Number of the round, from 0 on.
    pub round: u32,
    /// Whether the machine runs.
    pub running: bool,
    /// What was sent in this round.
    pub sent: Sent,
    /// Pages of this round.
    pub total: u64,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Yes.
    Continue,
    /// No: the machine stays where it is.
    Cancel,
}
