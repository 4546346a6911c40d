//! The side that takes the device.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::QueueIndex;
use vdpa_sys::eventfd::EventFd;

use super::error::{MachineError, Malformed, MigrateError, Unfit, request};
use super::offer::{Offer, RegionOffer, Switched};
use super::pages::{Area, Receiver};
use super::source::missing;
use super::wire::{self, Kind, Message};
use super::{DEVICE, SWITCHED, Step};
use crate::device::{Device, PresentQueue, set_status};
use crate::dma::{Backing, RegionSpec, map_all};
use crate::session::Session;
use crate::state::{self, Sections};
use crate::vring::GuestRing;

/// The machine that takes the place of another one, as the program that will run it sees it. All calls come from the thread that
/// calls the methods of [`Arrival`] and [`Prepared`].
pub trait Target {
    /// Memory for a region: zeros, which become what the region has at the source.
    ///
    /// # Errors
    /// Any: the source is told, and the machine runs on there.
    fn memory(&mut self, region: &RegionOffer) -> Result<Backing, MachineError>;

    /// Loads what [`Machine::save`](super::Machine::save) gave. All memory is there, the device is loaded and does not run; the
    /// processors must not run either. This is the last chance to refuse.
    ///
    /// # Errors
    /// Any: the source is told, and the machine runs on there.
    fn load(&mut self, sections: Sections) -> Result<(), MachineError>;

    /// A step was done.
    fn step(&mut self, _step: Step) {}
}

/// A migration that was offered.
#[derive(Debug)]
pub struct Arrival<S> {
    stream: S,
    offer: Offer,
}

impl<S: Read + Write> Arrival<S> {
    /// Reads the offer of a source. Blocks until it is there.
    ///
    /// # Errors
    /// [`MigrateError::Stream`], [`MigrateError::Malformed`]; the source is told where that is possible.
    pub fn accept(mut stream: S) -> Result<Self, MigrateError> {
        let offer = wire::expect(&mut stream, Kind::Offer).and_then(|message| message.parse());
        let checked = offer.and_then(|offer: Offer| offer.check().map(|()| offer));
        match checked {
            Ok(offer) => Ok(Self { stream, offer }),
            Err(error) => Err(refuse(&mut stream, error)),
        }
    }

    /// What would move.
    #[must_use]
    pub const fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Tells the source that this side does not want it. The machine runs on there.
    ///
    /// # Errors
    /// [`MigrateError::Stream`].
    pub fn refuse(mut self, reason: &str) -> Result<(), MigrateError> {
        wire::write_json(&mut self.stream, Kind::Refused, &reason)
    }

    /// Makes the memory, maps it for `device`, which nobody has set up yet, and tells the source to begin. With `early` the mappings are
    /// made now, while the machine runs at the source, and `IOTLB_PERSIST` keeps them when the device is reset to load its
    /// state. Without, or on a device that does not offer that, they are made while the machine stands still.
    ///
    /// # Errors
    /// [`MigrateError`]; the source has been told.
    pub fn prepare<D: VdpaOps<Event = EventFd>>(
        mut self,
        device: Device<D>,
        early: bool,
        target: &mut dyn Target,
    ) -> Result<Prepared<D, S>, MigrateError> {
        target.step(Step::OfferRead);
        match self.make(device, early, target) {
            Ok((session, mapped)) => {
                target.step(Step::Mapped);
                wire::write(&mut self.stream, Kind::Ready, &[])?;
                target.step(Step::ReadySent);
                Ok(Prepared { session, mapped, stream: self.stream, offer: self.offer })
            }
            Err(error) => Err(refuse(&mut self.stream, error)),
        }
    }

    fn make<D: VdpaOps<Event = EventFd>>(
        &self,
        device: Device<D>,
        early: bool,
        target: &mut dyn Target,
    ) -> Result<(Session<D>, bool), MigrateError> {
        let offered = device.offered()?;
        let Offer { device_id, features, regions, .. } = &self.offer;
        if offered.device_id != *device_id {
            let (offered, present) = (*device_id, offered.device_id);
            return Err(Unfit::OtherDevice { offered, present }.into());
        }
        if let Some(missing) = missing(*features, offered.features) {
            return Err(Unfit::Features { used: *features, missing }.into());
        }
        if !offered.backend_features.has(BackendFeatures::DEVICE_STATE) {
            return Err(Unfit::NoState.into());
        }
        let mut session = device.negotiate(*features)?;
        let early = early && session.backend_features().has(BackendFeatures::IOTLB_PERSIST);
        let mut specs = Vec::with_capacity(regions.len());
        for region in regions {
            let RegionOffer { name, iova, size, perm } = region.clone();
            let backing = target.memory(region).map_err(MigrateError::machine("making memory"))?;
            specs.push(RegionSpec { name, backing, iova, size, perm, populate: false });
        }
        if early {
            session.map(specs)?;
        } else {
            specs.into_iter().try_for_each(|spec| session.add_region(spec))?;
        }
        Ok((session, early))
    }
}

/// Tells the source why it goes on alone.
fn refuse<S: Read + Write>(stream: &mut S, error: MigrateError) -> MigrateError {
    // It may be gone, or may have ended it itself.
    let _ = wire::write_json(stream, Kind::Refused, &error.text());
    error
}

/// Memory and mappings are made; nothing has arrived yet.
#[derive(Debug)]
pub struct Prepared<D, S> {
    session: Session<D>,
    /// Whether the device has the mappings.
    mapped: bool,
    stream: S,
    offer: Offer,
}

/// What has come of it.
#[derive(Debug)]
pub enum Arrived<D> {
    /// The device runs here.
    Landed(Landed<D>),
    /// Everything is here, and the source was not heard of any more before it has let go.
    Waiting(Waiting<D>),
}

/// The device runs here. The processors have to be started.
#[derive(Debug)]
#[non_exhaustive]
pub struct Landed<D> {
    /// The device, with new events for its rings ([`GuestQueue::kick`](crate::vring::GuestQueue::kick)), which were signalled
    /// once: an interrupt or a kick that was on its way is not lost.
    ///
    /// A driver of a network device that has agreed to announce itself does so after an interrupt for a change of configuration, which the
    /// program has to make.
    pub session: Session<D>,
    /// Name of the migration.
    pub id: String,
    /// From the arrival of the state until it was loaded.
    pub load: Duration,
    /// From the commit until the device ran.
    pub start: Duration,
}

/// A device with everything, which does not run. Either side may run the machine from now on, not both.
#[derive(Debug)]
#[must_use = "the machine runs nowhere if its source is gone"]
pub struct Waiting<D> {
    session: Session<D>,
    id: String,
    running: bool,
    load: Duration,
    /// Why the source is not heard of any more.
    pub reason: MigrateError,
}

impl<D: VdpaOps<Event = EventFd>> Waiting<D> {
    /// Name of the migration, to [ask](super::ask) the source.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts the device here: it is certain that it does not run at the source, and will not.
    ///
    /// # Errors
    /// [`MigrateError::Device`]; nothing of it has run then.
    pub fn start(mut self, target: &mut dyn Target) -> Result<Landed<D>, MigrateError> {
        let begun = Instant::now();
        start(&mut self.session, self.running)?;
        target.step(Step::Started);
        let Self { session, id, load, .. } = self;
        Ok(Landed { session, id, load, start: begun.elapsed() })
    }

    /// Gives it up: the machine runs at the source.
    pub fn abandon(self) {
        drop(self.session);
    }
}

impl<D, S> Prepared<D, S>
where
    D: VdpaOps<Event = EventFd>,
    S: Read + Write,
{
    /// Takes what the source sends, until the device runs here, or the source goes on alone. Blocks as long as that takes; a stream
    /// with a time limit for reading keeps it from waiting for a source that hangs.
    ///
    /// # Errors
    /// [`MigrateError`]: the machine is the source's, which has been told where that was possible, and the device here is closed.
    pub fn receive(mut self, target: &mut dyn Target) -> Result<Arrived<D>, MigrateError> {
        let loaded = self.until_loaded(target);
        let (running, load) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => return Err(refuse(&mut self.stream, error)),
        };
        let told = wire::write(&mut self.stream, Kind::Loaded, &[]);
        let commit = told.and_then(|()| {
            target.step(Step::LoadedSent);
            wire::expect(&mut self.stream, Kind::Commit)
        });
        match commit {
            Ok(_) => {}
            // The source may be alive and go on, or dead.
            Err(reason @ MigrateError::Stream(_)) => {
                let Self { session, offer: Offer { id, .. }, .. } = self;
                return Ok(Arrived::Waiting(Waiting { session, id, running, load, reason }));
            }
            Err(error) => return Err(refuse(&mut self.stream, error)),
        }
        target.step(Step::CommitRead);
        let begun = Instant::now();
        if let Err(error) = start(&mut self.session, running) {
            return Err(refuse(&mut self.stream, error));
        }
        let start = begun.elapsed();
        target.step(Step::Started);
        // A source that does not hear it has let go all the same.
        let _ = wire::write(&mut self.stream, Kind::Running, &[]);
        target.step(Step::RunningSent);
        let Self { session, offer: Offer { id, .. }, .. } = self;
        Ok(Arrived::Landed(Landed { session, id, load, start }))
    }

    /// Takes memory and state; whether the device is to run, and how long it took to load it.
    fn until_loaded(&mut self, target: &mut dyn Target) -> Result<(bool, Duration), MigrateError> {
        let areas: Option<Vec<Area>> = self.session.regions().iter().map(Area::of).collect();
        let areas = areas.ok_or(Unfit::MemoryChanged)?;
        let mut receiver = Receiver::new(self.offer.page_size);
        loop {
            let message = wire::read(&mut self.stream)?;
            match message.kind {
                Kind::Pages => {
                    receiver.take(&mut self.stream, &message.payload, &areas)?;
                }
                Kind::Round => wire::write(&mut self.stream, Kind::RoundDone, &[])?,
                Kind::State => {
                    target.step(Step::StateRead);
                    let begun = Instant::now();
                    let running = self.load(&message, target)?;
                    target.step(Step::Loaded);
                    return Ok((running, begun.elapsed()));
                }
                Kind::Abort => return Err(MigrateError::Refused { reason: message.parse()? }),
                kind => {
                    return Err(
                        Malformed::Unexpected { found: kind.name(), wanted: Kind::State.name() }.into()
                    );
                }
            }
        }
    }

    /// Makes the device what it was at the source. It does not run yet.
    fn load(&mut self, message: &Message, target: &mut dyn Target) -> Result<bool, MigrateError> {
        let (switched, device, sections) = sections(&message.payload)?;
        let (ops, setup) = self.session.parts();
        // It may have been negotiated with other features since the offer.
        set_status(ops, Status::RESET)?;
        if !self.mapped {
            map_all(ops, setup.regions.pieces_from(0), setup.batch())?;
        }
        ops.state_load(&device).map_err(request("VDPA_STATE_LOAD"))?;
        self.session.set_features(switched.features);
        for ring in &switched.queues {
            let (kick, call) = (event()?, event()?);
            let (ops, _) = self.session.parts();
            let index = QueueIndex(ring.index);
            ops.set_vring_kick(index, Some(&kick)).map_err(request("VHOST_SET_VRING_KICK"))?;
            ops.set_vring_call(index, Some(&call)).map_err(request("VHOST_SET_VRING_CALL"))?;
            let place =
                GuestRing { size: ring.size, desc: ring.desc, driver: ring.driver, device: ring.device };
            let enabled = ring.enabled;
            self.session.add_present_queue(PresentQueue { index, ring: place, kick, call, enabled })?;
        }
        target.load(sections).map_err(MigrateError::machine("loading the machine"))?;
        Ok(switched.running)
    }
}

/// The sections of a message of state: those of the library, and those of the caller.
pub(super) fn sections(payload: &[u8]) -> Result<(Switched, Vec<u8>, Sections), MigrateError> {
    let mut sections = state::decode(payload)?;
    let switched: Switched = sections.require(SWITCHED)?.parse(1)?;
    let device = sections.require(DEVICE)?;
    if device.version != 1 {
        let (name, found) = (device.name, device.version);
        return Err(state::StateError::SectionVersion { name, found, supported: 1 }.into());
    }
    sections.end_of_own()?;
    Ok((switched, device.payload, sections))
}

fn event() -> Result<EventFd, MigrateError> {
    EventFd::new().map_err(request("eventfd"))
}

/// Sets DRIVER_OK where it was set at the source.
fn start<D: VdpaOps<Event = EventFd>>(session: &mut Session<D>, running: bool) -> Result<(), MigrateError> {
    if !running {
        return Ok(());
    }
    session.start()?;
    for vring in session.parts().1.vrings() {
        vring.kick.signal();
        vring.call.signal();
    }
    Ok(())
}
