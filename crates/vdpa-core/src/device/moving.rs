//! The state of a device that moves to another host: saved where its queues rest, loaded into a device that was reset.
//!
//! The bytes are the [records](crate::device::state) of the daemon's saved state, as far as another host has a use for
//! them:
//!
//! | record | what of it counts |
//! |---|---|
//! | `device` | the virtio id, and how many queues, groups, address spaces and bytes of configuration space there must be |
//! | `features` | the features in force, which the other device must offer |
//! | `status` | the status, whose DRIVER_OK the client sets again |
//! | `group` | the address space of each group |
//! | `vring` | size, addresses, position, and whether it is enabled |
//! | `parent` | what the device keeps besides: cache mode, control queue |
//! | `config` | the configuration space, which must be the same, but for the status of a network device |
//!
//! There are no requests in flight in it: a queue that rests has none. Memory, events and the owner are the client's, which
//! has others at the other host.

use thiserror::Error;

use crate::device::Device;
use crate::device::state::{
    DecodeError, EncodeError, Image, Record, RestoreError, Shape, VringState, check_group, check_shape,
    check_vring, decode_all, encode_all, ensure, kind, require,
};
use crate::errno::Errno;
use crate::features::{Features, Status};
use crate::host::Caller;
use crate::net::NetConfig;
use crate::parent::{Parent, Profile};
use crate::types::{GroupIndex, QueueIndex};
use crate::vq::QueueState;

/// Longest state in bytes that is read. One of the largest device has a fraction of it.
pub const STATE_MAX: usize = 1 << 20;

/// Virtio id of a network device.
const NET: u32 = 1;

/// Why a state cannot be saved or loaded. Nothing has changed, or the device is reset as before.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MoveError {
    /// The device has no such requests.
    #[error("this device cannot move: its state stays where it is")]
    Unsupported,
    /// Somebody else than the owner asks.
    #[error("the caller is not the owner of the device: {0}")]
    Owner(Errno),
    /// Its queues do not rest.
    #[error("queue {index} runs: suspend the device first")]
    Running {
        /// The first queue that runs.
        index: QueueIndex,
    },
    /// What is behind it was taken away.
    #[error("what was behind the device has been taken away, so its state is not complete")]
    Failed,
    /// A state is loaded into a device that somebody uses, or nobody.
    #[error("the device has the status {status}, and is {}open: a client has to open it and reset it first", if *.open { "" } else { "not " })]
    NotReset {
        /// Its status.
        status: Status,
        /// Whether a client has it open.
        open: bool,
    },
    /// The state does not fit.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Longer than any.
    #[error("a state of {len} bytes; at most {STATE_MAX} are accepted")]
    TooLong {
        /// Its bytes.
        len: usize,
    },
    /// The bytes are not records.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The records are not a state of this device.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// The configuration space is another one than the driver has read.
    #[error(
        "the configuration space differs at byte {offset}: {saved:#04x} was saved, and it is {present:#04x} here; make the device with the same attributes, on a disk of the same size"
    )]
    Config {
        /// The first byte that differs.
        offset: usize,
        /// Its saved value.
        saved: u8,
        /// Its value here.
        present: u8,
    },
}

impl MoveError {
    /// What a client gets.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Unsupported => Errno::NOTTY,
            Self::Owner(errno) => *errno,
            Self::Running { .. } | Self::NotReset { .. } => Errno::BUSY,
            Self::Failed => Errno::IO,
            Self::Encode(_) | Self::TooLong { .. } => Errno::TOOBIG,
            Self::Decode(_) | Self::State(_) | Self::Config { .. } => Errno::INVAL,
        }
    }
}

impl<P: Parent> Device<P> {
    /// `VDPA_STATE_SAVE`: the state, for [`state_load`](Self::state_load) of another device. Changes nothing.
    ///
    /// # Errors
    /// [`MoveError::Owner`] with `EPERM` unless the caller is the owner; as [`save_to_move`](Self::save_to_move).
    pub fn state_save(&mut self, caller: &dyn Caller<P::Host>) -> Result<Vec<u8>, MoveError> {
        self.check_owner(caller).map_err(MoveError::Owner)?;
        self.save_to_move()
    }

    /// `VDPA_STATE_LOAD`: makes a device that was reset what another one was, up to FEATURES_OK.
    ///
    /// # Errors
    /// [`MoveError::Owner`] with `EPERM` unless the caller is the owner; as [`load_moved`](Self::load_moved).
    pub fn state_load(&mut self, caller: &dyn Caller<P::Host>, state: &[u8]) -> Result<(), MoveError> {
        self.check_owner(caller).map_err(MoveError::Owner)?;
        self.load_moved(state)
    }

    /// As [`state_save`](Self::state_save), for the management side.
    ///
    /// # Errors
    /// [`MoveError::Unsupported`], [`Running`](MoveError::Running), [`Failed`](MoveError::Failed),
    /// [`Encode`](MoveError::Encode).
    pub fn save_to_move(&self) -> Result<Vec<u8>, MoveError> {
        if !self.parent.profile().moves {
            return Err(MoveError::Unsupported);
        }
        if self.failed {
            return Err(MoveError::Failed);
        }
        let mut runs = (0..).map(QueueIndex).zip(&self.vrings).filter(|(_, vring)| vring.runs());
        if let Some((index, _)) = runs.next() {
            return Err(MoveError::Running { index });
        }
        let mut records = vec![
            Record::Device(Shape::of(self.parent.profile(), self.backend_features())),
            Record::Features { in_force: self.features, base: self.base_features },
            Record::Status {
                status: self.status,
                suspended: self.suspended,
                paused: self.paused,
                ring_max: self.num_max,
            },
        ];
        let groups = (0..).map(GroupIndex).zip(&self.group_asids);
        records.extend(groups.map(|(group, &asid)| Record::Group { group, asid }));
        for (index, vring) in (0..).map(QueueIndex).zip(&self.vrings) {
            let group = self.parent.profile().group_of(index);
            records.push(Record::Vring(vring.save_to_move(index, group)));
        }
        records.push(Record::Parent { bytes: self.parent.save_state() });
        records.push(Record::Config { bytes: self.whole_config() });
        Ok(encode_all(&records)?)
    }

    /// As [`state_load`](Self::state_load), for the management side: into a device that a client has open and has reset, whose
    /// mappings stay.
    ///
    /// # Errors
    /// [`MoveError`]. Where it does not depend on the device itself, nothing has changed; otherwise the device is reset.
    pub fn load_moved(&mut self, state: &[u8]) -> Result<(), MoveError> {
        if !self.parent.profile().moves {
            return Err(MoveError::Unsupported);
        }
        let (status, open) = (self.status, self.opened);
        if status != Status::RESET || !open || self.quiesced {
            return Err(MoveError::NotReset { status, open });
        }
        let moved = self.check_moved(state)?;
        let before = (self.features, self.base_features);
        if let Err(error) = self.take_moved(&moved) {
            self.parent.reset();
            self.group_asids.iter_mut().for_each(|asid| asid.0 = 0);
            (self.features, self.base_features) = before;
            return Err(error);
        }
        self.base_features = moved.base;
        self.status = Status(moved.status.0 & !Status::DRIVER_OK.0);
        for saved in &moved.vrings {
            if let Some(vring) = self.vrings.get_mut(usize::from(saved.index.0)) {
                vring.load(saved);
            }
        }
        self.touch_all();
        self.parent.moved();
        Ok(())
    }

    /// Reads a state, and checks all that can be checked without a change of this device.
    fn check_moved(&self, state: &[u8]) -> Result<Moved, MoveError> {
        if state.len() > STATE_MAX {
            return Err(MoveError::TooLong { len: state.len() });
        }
        let records = decode_all(state)?;
        let image = Image::of(&records).map_err(RestoreError::from)?;
        let known = [
            kind::DEVICE,
            kind::FEATURES,
            kind::STATUS,
            kind::GROUP,
            kind::VRING,
            kind::PARENT,
            kind::CONFIG,
        ];
        if let Some(stray) = records.iter().map(Record::kind).find(|kind| !known.contains(kind)) {
            return Err(RestoreError::Stray { kind: stray.name }.into());
        }
        ensure(image.records().len() == records.len(), &kind::DEVICE, "a part of the device is there twice")?;
        let profile = self.parent.profile();
        let present = Shape::of(profile, self.backend_features());
        let (features, base, status) = words(&image)?;
        let Record::Device(saved) = *require(&image, &kind::DEVICE)? else {
            return Err(missing(&kind::DEVICE));
        };
        let wanted = Shape {
            // What counts of features is what was negotiated. How memory is reached is each host's own affair.
            features: features.unwrap_or(Features::NONE) | base,
            backend_features: present.backend_features,
            address_mode: present.address_mode,
            iova_range: present.iova_range,
            ..saved
        };
        check_shape(&wanted, &present)?;
        let client = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
        ensure((client | Status::FAILED).contains(status), &kind::STATUS, "a bit that no driver sets")?;
        let vrings = rings(&image, saved.queues, features.unwrap_or(Features::NONE), profile)?;
        let groups = image.parts(&kind::GROUP).count();
        ensure(u32::try_from(groups) == Ok(saved.groups), &kind::GROUP, "not one for each group")?;
        let Record::Parent { bytes: parent } = require(&image, &kind::PARENT)?.clone() else {
            return Err(missing(&kind::PARENT));
        };
        let Record::Config { bytes: config } = require(&image, &kind::CONFIG)?.clone() else {
            return Err(missing(&kind::CONFIG));
        };
        let whole = u32::try_from(config.len()) == Ok(saved.config_size);
        ensure(whole, &kind::CONFIG, "not all of configuration space")?;
        Ok(Moved { features, base, status, vrings, parent, config, image })
    }

    /// Gives the parent what it has to know.
    fn take_moved(&mut self, moved: &Moved) -> Result<(), MoveError> {
        let refused = |what| move |errno| RestoreError::Parent { what, errno };
        if let Some(word) = moved.features {
            match self.parent.negotiate(word) {
                Ok(in_force) if in_force == word => {}
                // An early GET_CONFIG sets the empty word even where the parent refuses it.
                Err(_) if word == Features::NONE => {}
                Ok(_) => return Err(refused("features")(Errno::INVAL).into()),
                Err(errno) => return Err(refused("features")(errno).into()),
            }
        }
        self.features = moved.features;
        let profile = self.parent.profile();
        moved.vrings.iter().try_for_each(|vring| check_group(vring, profile))?;
        // As the driver has: what it has written is also kept where a second client may open the device.
        let present = self.whole_config();
        for ((offset, &saved), present) in (0..).zip(&moved.config).zip(present) {
            if saved != present {
                self.parent.write_config(offset, &[saved]);
            }
        }
        self.parent.restore_state(&moved.parent).map_err(refused("own state"))?;
        self.restore_groups(&moved.image)?;
        self.check_config_space(&moved.config)
    }

    /// Checks that the driver finds in configuration space what it has read. The status of a network device, with
    /// its link and its announcements, is a thing of the present.
    fn check_config_space(&self, saved: &[u8]) -> Result<(), MoveError> {
        let own = if self.parent.profile().device_id == NET { NetConfig::STATUS } else { 0..0 };
        let both = saved.iter().zip(self.whole_config()).enumerate();
        let mut others = both.filter(|(offset, (saved, present))| !own.contains(offset) && *saved != present);
        match others.next() {
            Some((offset, (&saved, present))) => Err(MoveError::Config { offset, saved, present }),
            None => Ok(()),
        }
    }

    fn whole_config(&self) -> Vec<u8> {
        let size = usize::try_from(self.parent.profile().config_size).unwrap_or(0);
        let mut bytes = vec![0; size];
        if size > 0 {
            self.parent.read_config(0, &mut bytes);
        }
        bytes
    }
}

/// A state that was checked.
struct Moved {
    features: Option<Features>,
    base: Features,
    status: Status,
    vrings: Vec<VringState>,
    parent: Vec<u8>,
    config: Vec<u8>,
    image: Image,
}

/// Features in force, those that decide the encoding of positions, and the status.
fn words(image: &Image) -> Result<(Option<Features>, Features, Status), RestoreError> {
    let Record::Features { in_force: features, base } = *require(image, &kind::FEATURES)? else {
        return Err(RestoreError::Missing { kind: kind::FEATURES.name });
    };
    let Record::Status { status, .. } = *require(image, &kind::STATUS)? else {
        return Err(RestoreError::Missing { kind: kind::STATUS.name });
    };
    Ok((features, base, status))
}

/// The queues, each of which a device can have, and which rest.
fn rings(
    image: &Image,
    count: u16,
    features: Features,
    profile: &Profile,
) -> Result<Vec<VringState>, RestoreError> {
    let mut vrings = Vec::with_capacity(count.into());
    for part in image.parts(&kind::VRING) {
        let Record::Vring(saved) = part else { continue };
        let index = saved.index;
        let wrong = |what| Err(RestoreError::Vring { index, what });
        check_vring(saved, profile)?;
        if saved.running || saved.started.is_some() {
            return wrong("it runs, so its position is not known");
        }
        if saved.call_installed || [saved.kick, saved.call, saved.err].iter().any(Option::is_some) {
            return wrong("it has an event, which cannot move");
        }
        let packed = features.has(Features::RING_PACKED);
        let fits = match saved.state {
            None => true,
            Some(QueueState::Split { .. }) => !packed,
            Some(QueueState::Packed { last_avail_idx, last_used_idx, .. }) => {
                packed && last_avail_idx < saved.num && last_used_idx < saved.num
            }
        };
        if saved.enabled && !fits {
            return wrong("its position is not one of its ring");
        }
        vrings.push(saved.clone());
    }
    let all = vrings.iter().map(|vring| vring.index.0).eq(0..count);
    ensure(all, &kind::VRING, "not one for each queue")?;
    Ok(vrings)
}

const fn missing(kind: &kind::Kind) -> MoveError {
    MoveError::State(RestoreError::Missing { kind: kind.name })
}
