//! [`CardState`]: what a driver sets on a network card with its control queue, and what its management side sets: in words that may
//! outlive the process (virtio 1.2 section 5.1.6.5).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::loopback::StatsMemory;
use super::{ANNOUNCE, Ack, ControlHeader, LINK_UP, MAC_BYTES, is_multicast, is_valid_address};
use crate::errno::Errno;
use crate::features::Features;

/// Most pairs of queues of a card.
pub const PAIRS_MAX: u16 = 8;

/// Words that a card needs.
pub const WORDS: usize = 32;

// What each word has.
/// [`VALID`], and the modes of reception, `1 << command` of the class RX.
const MODES: usize = 0;
const MAC: usize = 1;
const PAIRS: usize = 2;
const OFFLOADS: usize = 3;
/// 1 for a link that is down.
const LINK_DOWN: usize = 4;
/// Announcements that the device has asked for, and those that the driver has confirmed.
const ASKED: usize = 5;
const CONFIRMED: usize = 6;
/// The number of VLANs, or [`ALL`]; then four in each word.
const VLANS: usize = 7;
const VLAN: usize = 8;
const VLANS_MAX: usize = 16;
/// Numbers of single addresses in the low half, and of groups in the high half, each of which may be [`ALL`]; then the addresses.
const FILTERS: usize = 12;
const FILTER: usize = 13;
const FILTERS_MAX: usize = PARTS - FILTER;
/// By pair: the packet that is being given to the driver in several buffers. Not saved: only a process that is killed leaves one.
const PARTS: usize = WORDS - PAIRS_MAX as usize;

/// The first byte of what [`CardState::save`] gives: the layout of the words.
const VERSION: u8 = 1;

/// Everything passes: what a driver has set does not fit.
const ALL: u64 = 0xffff;
/// A word that was written.
const VALID: u64 = 1 << 63;

/// Bytes of the longest command that is read: a table of some thousand addresses.
pub const COMMAND_MAX: usize = 16384;

/// Commands of the class RX: `VIRTIO_NET_CTRL_RX_*`.
mod rx {
    pub(super) const PROMISC: u8 = 0;
    pub(super) const ALLMULTI: u8 = 1;
    pub(super) const ALLUNI: u8 = 2;
    pub(super) const NOMULTI: u8 = 3;
    pub(super) const NOUNI: u8 = 4;
    pub(super) const NOBCAST: u8 = 5;
}

/// `VIRTIO_NET_CTRL_*` beside those in [`super::class`].
mod class {
    pub(super) const RX: u8 = super::super::class::RX;
    pub(super) const MAC: u8 = super::super::class::MAC;
    pub(super) const VLAN: u8 = 2;
    pub(super) const ANNOUNCE: u8 = 3;
    pub(super) const MQ: u8 = 4;
    pub(super) const OFFLOADS: u8 = 5;
}

/// A packet that is being given to the driver in several buffers: what a process needs to finish it that finds only some of them given.
/// All but the last are full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Requests of the ring that were in flight when none of the buffers was given.
    pub in_flight: u16,
    /// Number of buffers, at least 2.
    pub buffers: u16,
    /// Bytes in the last one, below 2^31.
    pub last: u32,
}

impl Parts {
    const fn word(self) -> u64 {
        VALID | (self.last as u64) << 32 | (self.buffers as u64) << 16 | self.in_flight as u64
    }

    #[expect(clippy::cast_possible_truncation, reason = "the parts of a word")]
    fn of(word: u64) -> Option<Self> {
        let (in_flight, buffers, last) =
            (word as u16, (word >> 16) as u16, (word >> 32) as u32 & 0x7fff_ffff);
        (word & VALID != 0).then_some(Self { in_flight, buffers, last })
    }

    /// The buffers that are still to be given when so many requests are in flight: their number, 0 if none of them was given, or all.
    #[must_use]
    pub const fn left(self, in_flight: u16) -> u16 {
        let given = self.in_flight.saturating_sub(in_flight);
        if given == 0 || given >= self.buffers { 0 } else { self.buffers - given }
    }
}

/// What a command changes beside the state. Called by the thread that executes the command.
pub trait Effects {
    /// Pairs `0..pairs` are used from now on; `false` if that cannot be.
    fn set_pairs(&mut self, pairs: u16) -> bool;

    /// The driver takes these offloads from now on, bits of features; `false` if that cannot be.
    fn set_offloads(&mut self, offloads: Features) -> bool;
}

/// The state of a card. Clones share it. The control side and the thread of the card may use it at the same time.
#[derive(Clone)]
pub struct CardState {
    memory: StatsMemory,
}

impl fmt::Debug for CardState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CardState")
            .field("mac", &self.mac())
            .field("pairs", &self.pairs())
            .finish_non_exhaustive()
    }
}

/// The features that are offloads of the driver: those of `CTRL_GUEST_OFFLOADS_SET`.
pub const GUEST_OFFLOADS: Features = Features::of(&[
    Features::NET_GUEST_CSUM,
    Features::NET_GUEST_TSO4,
    Features::NET_GUEST_TSO6,
    Features::NET_GUEST_ECN,
    Features::NET_GUEST_USO4,
    Features::NET_GUEST_USO6,
]);

impl CardState {
    /// A card with this address, in memory of its own.
    #[must_use]
    pub fn new(mac: [u8; MAC_BYTES]) -> Self {
        let memory: Arc<[AtomicU64]> = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        Self::within(Arc::new(memory), mac)
    }

    /// A card in `memory`, of [`WORDS`] words: what is in there, or a new one with this address if nothing is.
    #[must_use]
    pub fn within(memory: StatsMemory, mac: [u8; MAC_BYTES]) -> Self {
        let this = Self { memory };
        if !this.is_known() {
            this.set_mac(mac);
            this.reset();
        }
        this
    }

    /// Whether the memory has a state.
    fn is_known(&self) -> bool {
        self.memory.load(MODES) & VALID != 0
    }

    /// The driver has reset the device: what it has set is forgotten, but for its address. As QEMU's card, it receives everything until
    /// a driver says what it wants.
    pub fn reset(&self) {
        for word in [PAIRS, OFFLOADS, VLANS, FILTERS] {
            self.memory.store(word, 0);
        }
        (0..PAIRS_MAX).for_each(|pair| self.note_parts(pair, None));
        self.memory.store(CONFIRMED, self.memory.load(ASKED));
        self.memory.store(MODES, VALID | 1 << rx::PROMISC);
    }

    /// The address.
    #[must_use]
    pub fn mac(&self) -> [u8; MAC_BYTES] {
        address(self.memory.load(MAC))
    }

    /// Sets the address.
    pub fn set_mac(&self, mac: [u8; MAC_BYTES]) {
        self.memory.store(MAC, word(mac));
    }

    /// Pairs that are used; 1 before the driver has said so.
    #[must_use]
    pub fn pairs(&self) -> u16 {
        u16::try_from(self.memory.load(PAIRS)).unwrap_or(1).max(1)
    }

    /// The offloads that the driver takes, given those that it has negotiated.
    #[must_use]
    pub fn offloads(&self, negotiated: Features) -> Features {
        let set = self.memory.load(OFFLOADS);
        let all = negotiated & GUEST_OFFLOADS;
        if set & VALID == 0 { all } else { all & Features(set) }
    }

    /// Whether the link is up.
    #[must_use]
    pub fn is_link_up(&self) -> bool {
        self.memory.load(LINK_DOWN) == 0
    }

    /// Sets the link. One that comes up again asks the driver to announce itself.
    pub fn set_link(&self, up: bool) {
        if up && !self.is_link_up() {
            self.announce();
        }
        self.memory.store(LINK_DOWN, (!up).into());
    }

    /// Asks the driver to announce itself.
    pub fn announce(&self) {
        self.memory.store(ASKED, self.memory.load(ASKED).wrapping_add(1));
    }

    /// The status in configuration space, for a driver that has negotiated `features`.
    #[must_use]
    pub fn status(&self, features: Features) -> u16 {
        let announce = features.has(Features::NET_GUEST_ANNOUNCE)
            && self.memory.load(ASKED) != self.memory.load(CONFIRMED);
        let link = if self.is_link_up() { LINK_UP } else { 0 };
        if announce { link | ANNOUNCE } else { link }
    }

    /// Notes that the packet for `pair` is being given to the driver in several buffers, or that this is over. A pair beyond [`PAIRS_MAX`]
    /// has no note.
    #[inline]
    pub fn note_parts(&self, pair: u16, parts: Option<Parts>) {
        if pair < PAIRS_MAX {
            self.memory.store(PARTS + usize::from(pair), parts.map_or(0, Parts::word));
        }
    }

    /// The packet for `pair` that a process has not given to the driver as a whole, and was killed.
    #[must_use]
    #[inline]
    pub fn parts(&self, pair: u16) -> Option<Parts> {
        if pair < PAIRS_MAX { Parts::of(self.memory.load(PARTS + usize::from(pair))) } else { None }
    }

    /// Whether everything is received.
    #[must_use]
    #[inline]
    pub fn is_promiscuous(&self) -> bool {
        self.mode(rx::PROMISC)
    }

    /// Whether a packet that begins with `frame` (18 bytes, or all of a shorter one) is received.
    #[must_use]
    pub fn accepts(&self, frame: &[u8], features: Features) -> bool {
        if self.is_promiscuous() {
            return true;
        }
        if features.has(Features::NET_CTRL_VLAN)
            && let Some([0x81, 0, tag @ ..]) = frame.get(12..16)
        {
            let tag = <[u8; 2]>::try_from(tag).map_or(0, u16::from_be_bytes);
            if !self.has_vlan(tag & 0xfff) {
                return false;
            }
        }
        let Some(to) = frame.first_chunk::<MAC_BYTES>() else { return false };
        let [single, groups] = self.filters();
        if *to == [0xff; MAC_BYTES] {
            !self.mode(rx::NOBCAST)
        } else if is_multicast(*to) {
            !self.mode(rx::NOMULTI) && (self.mode(rx::ALLMULTI) || groups.has(self, *to))
        } else {
            !self.mode(rx::NOUNI) && (self.mode(rx::ALLUNI) || *to == self.mac() || single.has(self, *to))
        }
    }

    /// Executes a command of the control queue, the bytes of which the driver has given.
    pub fn execute(&self, command: &[u8], features: Features, pairs: u16, effects: &mut impl Effects) -> Ack {
        match self.try_execute(command, features, pairs, effects) {
            Some(()) => Ack::Ok,
            None => Ack::Err,
        }
    }

    fn try_execute(
        &self,
        command: &[u8],
        features: Features,
        pairs: u16,
        effects: &mut impl Effects,
    ) -> Option<()> {
        let (header, body) = ControlHeader::read_from_prefix(command).ok()?;
        let needs = |bit| features.has(bit).then_some(());
        match (header.class, header.command) {
            (class::RX, mode @ (rx::PROMISC | rx::ALLMULTI)) => {
                needs(Features::NET_CTRL_RX)?;
                self.set_mode(mode, body)
            }
            (class::RX, mode @ rx::ALLUNI..=rx::NOBCAST) => {
                needs(Features::NET_CTRL_RX_EXTRA)?;
                self.set_mode(mode, body)
            }
            (class::MAC, super::mac::TABLE_SET) => {
                needs(Features::NET_CTRL_RX)?;
                self.set_filters(body)
            }
            (class::MAC, super::mac::ADDR_SET) => {
                needs(Features::NET_CTRL_MAC_ADDR)?;
                let mac = <[u8; MAC_BYTES]>::try_from(body).ok().filter(|mac| is_valid_address(*mac))?;
                self.set_mac(mac);
                Some(())
            }
            (class::VLAN, add @ (0 | 1)) => {
                needs(Features::NET_CTRL_VLAN)?;
                self.set_vlan(U16::read_from_bytes(body).ok()?.get(), add == 0)
            }
            (class::ANNOUNCE, 0) => {
                needs(Features::NET_GUEST_ANNOUNCE)?;
                self.memory.store(CONFIRMED, self.memory.load(ASKED));
                Some(())
            }
            (class::MQ, 0) => {
                needs(Features::NET_MQ)?;
                let wanted = U16::read_from_bytes(body).ok()?.get();
                ((1..=pairs).contains(&wanted) && effects.set_pairs(wanted)).then_some(())?;
                self.memory.store(PAIRS, wanted.into());
                Some(())
            }
            (class::OFFLOADS, 0) => {
                needs(Features::NET_CTRL_GUEST_OFFLOADS)?;
                let wanted = Features(U64::read_from_bytes(body).ok()?.get());
                let possible = features & GUEST_OFFLOADS;
                (possible.contains(wanted) && effects.set_offloads(wanted)).then_some(())?;
                self.memory.store(OFFLOADS, VALID | wanted.0);
                Some(())
            }
            _ => None,
        }
    }

    fn mode(&self, mode: u8) -> bool {
        self.memory.load(MODES) >> mode & 1 == 1
    }

    fn set_mode(&self, mode: u8, body: &[u8]) -> Option<()> {
        let [on] = body else { return None };
        let modes = self.memory.load(MODES) & !(1 << mode);
        self.memory.store(MODES, modes | u64::from(*on != 0) << mode);
        Some(())
    }

    fn filters(&self) -> [Filter; 2] {
        let word = self.memory.load(FILTERS);
        let (single, groups) = (word & 0xffff_ffff, word >> 32);
        let place = if single == ALL { 0 } else { single };
        [Filter { place: 0, count: single }, Filter { place, count: groups }]
    }

    /// Replaces both lists. One that does not fit lets everything pass: what a card receives too much its driver drops.
    fn set_filters(&self, body: &[u8]) -> Option<()> {
        let (single, rest) = addresses(body)?;
        let (groups, rest) = addresses(rest)?;
        rest.is_empty().then_some(())?;
        // Nothing that the driver wants is missed while the table is half written.
        self.memory.store(FILTERS, ALL << 32 | ALL);
        let mut place = 0;
        let mut store = |list: &[u8]| {
            let count = list.len() / MAC_BYTES;
            if count > FILTERS_MAX - place {
                return ALL;
            }
            for mac in list.chunks_exact(MAC_BYTES).filter_map(|mac| mac.try_into().ok()) {
                self.memory.store(FILTER + place, word(mac));
                place += 1;
            }
            count as u64
        };
        let (single, groups) = (store(single), store(groups));
        self.memory.store(FILTERS, groups << 32 | single);
        Some(())
    }

    fn has_vlan(&self, vlan: u16) -> bool {
        let count = self.memory.load(VLANS);
        count == ALL || self.vlans().contains(&vlan)
    }

    fn vlans(&self) -> Vec<u16> {
        let count = usize::try_from(self.memory.load(VLANS)).unwrap_or(0).min(VLANS_MAX);
        let at = |index: usize| self.memory.load(VLAN + index / 4) >> (index % 4 * 16) & 0xffff;
        (0..count).filter_map(|index| u16::try_from(at(index)).ok()).collect()
    }

    /// As [`set_filters`](Self::set_filters), with a list of VLANs.
    fn set_vlan(&self, vlan: u16, add: bool) -> Option<()> {
        (vlan < 4096).then_some(())?;
        if self.memory.load(VLANS) == ALL {
            return Some(());
        }
        let mut vlans = self.vlans();
        vlans.retain(|known| *known != vlan);
        if add {
            vlans.push(vlan);
        }
        self.memory.store(VLANS, ALL);
        if vlans.len() > VLANS_MAX {
            return Some(());
        }
        for (index, four) in vlans.chunks(4).enumerate() {
            let four = four.iter().enumerate();
            let packed = four.fold(0, |word, (at, vlan)| word | u64::from(*vlan) << (at * 16));
            self.memory.store(VLAN + index, packed);
        }
        self.memory.store(VLANS, vlans.len() as u64);
        Some(())
    }

    /// The state as bytes, for [`Parent::save_state`](crate::parent::Parent::save_state): the version, then the words.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let words = (0..PARTS).flat_map(|word| self.memory.load(word).to_le_bytes());
        std::iter::once(VERSION).chain(words).collect()
    }

    /// Sets what [`save`](Self::save) gave. Memory that has outlived a process has what is newer than that: `has_outlived` keeps it.
    ///
    /// # Errors
    /// `EINVAL` for what no card of at most `pairs` pairs can have saved, and for a later version; nothing has changed then.
    pub fn restore(&self, state: &[u8], pairs: u16, has_outlived: bool) -> Result<(), Errno> {
        let Some((&VERSION, state)) = state.split_first() else { return Err(Errno::INVAL) };
        let words: Vec<u64> =
            state.chunks(8).filter_map(|word| word.try_into().ok().map(u64::from_le_bytes)).collect();
        let get = |word: usize| words.get(word).copied().unwrap_or(0);
        let list = |count: u64, most: usize| count == ALL || count <= most as u64;
        let [single, groups] = [get(FILTERS) & 0xffff_ffff, get(FILTERS) >> 32];
        let both = [single, groups].into_iter().filter(|count| *count != ALL).sum();
        let valid = state.len() == PARTS * 8
            && get(MODES) & VALID != 0
            && get(MODES) & !VALID < 1 << 6
            && get(MAC) < 1 << 48
            && get(PAIRS) <= pairs.into()
            && get(LINK_DOWN) <= 1
            && (get(OFFLOADS) == 0
                || get(OFFLOADS) & VALID != 0 && GUEST_OFFLOADS.contains(Features(get(OFFLOADS) & !VALID)))
            && list(get(VLANS), VLANS_MAX)
            && list(single, FILTERS_MAX)
            && list(groups, FILTERS_MAX)
            && list(both, FILTERS_MAX);
        if !valid {
            return Err(Errno::INVAL);
        }
        if !has_outlived {
            words.iter().enumerate().for_each(|(word, value)| self.memory.store(word, *value));
        }
        Ok(())
    }
}

/// A part of the list of addresses.
#[derive(Clone, Copy)]
struct Filter {
    place: u64,
    count: u64,
}

impl Filter {
    fn has(self, state: &CardState, mac: [u8; MAC_BYTES]) -> bool {
        let at = |index: u64| usize::try_from(self.place + index).map_or(0, |place| FILTER + place);
        self.count == ALL
            || (0..self.count.min(FILTERS_MAX as u64)).any(|index| state.memory.load(at(index)) == word(mac))
    }
}

/// The addresses of a list in a command, and what is behind it.
fn addresses(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (count, rest) = U32::read_from_prefix(body).ok()?;
    rest.split_at_checked(usize::try_from(count.get()).ok()?.checked_mul(MAC_BYTES)?)
}

fn word(mac: [u8; MAC_BYTES]) -> u64 {
    mac.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

fn address(word: u64) -> [u8; MAC_BYTES] {
    let [a, b, c, d, e, f, ..] = word.to_le_bytes();
    [a, b, c, d, e, f]
}

#[cfg(test)]
mod tests;
