//! The payloads of [`Record`]s: written in the newest version, read in all.

use super::kind::{self, Kind};
use super::record::{
    ConfigBytes, HandleState, HandoverState, LogState, MappingState, MemoryRef, Record, Ring, Shape, TableId,
    TableRole, VringState,
};
use crate::features::{BackendFeatures, Features, Status};
use crate::parent::AddressMode;
use crate::types::{Asid, GroupIndex, IovaRange, Perm, QueueIndex, VringAddr};
use crate::vq::QueueState;

type Read<T> = Result<T, &'static str>;

/// Appends the payload of `record`.
pub(super) fn write(record: &Record, out: &mut Vec<u8>) {
    match record {
        Record::Device(shape) => write_shape(shape, out),
        Record::Open { open, failed } => out.extend([u8::from(*open), u8::from(*failed)]),
        Record::Features { in_force, base } => {
            put_option(out, in_force.map(|word| word.0));
            put(out, base.0);
        }
        Record::BackendFeatures { acked } => put(out, acked.0),
        Record::Status { status, suspended, paused, ring_max } => {
            out.extend([status.0, u8::from(*suspended), u8::from(*paused)]);
            out.extend(ring_max.to_le_bytes());
        }
        Record::ForkFromOwner { value } => out.push(*value),
        Record::Owner { space } => put_option(out, *space),
        Record::ConfigCall { event } => put_option(out, *event),
        Record::Batch { asid } => put_option(out, asid.map(|asid| asid.0.into())),
        Record::Pinned { pages } => put(out, *pages),
        Record::Group { group, asid } => {
            out.extend(group.0.to_le_bytes());
            out.extend(asid.0.to_le_bytes());
        }
        Record::Translation { asid, passthrough, refused } => {
            out.extend(asid.0.to_le_bytes());
            out.extend([u8::from(*passthrough), u8::from(*refused)]);
        }
        Record::Log(log) => write_log(log, out),
        Record::Vring(vring) => write_vring(vring, out),
        Record::Parent { bytes } => put_bytes(out, bytes),
        Record::Handover(state) => write_handover(state, out),
        Record::Handle(state) => write_handle(state, out),
        Record::Table { table, next_update } => {
            put_table(out, *table);
            put(out, *next_update);
        }
        Record::TableCopied { from, to } => {
            put_table(out, *from);
            put_table(out, *to);
        }
        Record::TableRemoved { table } | Record::Stale { table } => put_table(out, *table),
        Record::Mapping(mapping) => write_mapping(mapping, out),
        Record::Unmapped { table, firsts } => {
            put_table(out, *table);
            put_range(out, *firsts);
        }
        Record::Broken { table, update, range } => {
            put_table(out, *table);
            put(out, *update);
            put_range(out, *range);
        }
        Record::Config { bytes } => put_bytes(out, bytes),
    }
}

/// Reads the payload of a record of `kind` in `version`, which is one of [`Kind::versions`].
pub(super) fn read(kind: &Kind, version: u16, r: &mut Reader<'_>) -> Read<Record> {
    Ok(match kind.number {
        n if n == kind::DEVICE.number => Record::Device(read_shape(r)?),
        n if n == kind::OPEN.number => Record::Open { open: r.bool()?, failed: r.bool()? },
        n if n == kind::FEATURES.number => {
            Record::Features { in_force: r.option()?.map(Features), base: Features(r.u64()?) }
        }
        n if n == kind::BACKEND_FEATURES.number => {
            Record::BackendFeatures { acked: BackendFeatures(r.u64()?) }
        }
        n if n == kind::STATUS.number => Record::Status {
            status: Status(r.u8()?),
            suspended: r.bool()?,
            paused: r.bool()?,
            ring_max: r.u16()?,
        },
        n if n == kind::FORK_FROM_OWNER.number => Record::ForkFromOwner { value: r.u8()? },
        n if n == kind::OWNER.number => Record::Owner { space: r.option()? },
        n if n == kind::CONFIG_CALL.number => Record::ConfigCall { event: r.option()? },
        n if n == kind::BATCH.number => {
            let asid = r.option()?.map(u32::try_from).transpose();
            Record::Batch { asid: asid.map_err(|_| "its address space has more than 32 bits")?.map(Asid) }
        }
        n if n == kind::PINNED.number => Record::Pinned { pages: r.u64()? },
        n if n == kind::GROUP.number => Record::Group { group: GroupIndex(r.u32()?), asid: Asid(r.u32()?) },
        n if n == kind::TRANSLATION.number => {
            Record::Translation { asid: Asid(r.u32()?), passthrough: r.bool()?, refused: r.bool()? }
        }
        n if n == kind::LOG.number => Record::Log(read_log(r)?),
        n if n == kind::VRING.number => Record::Vring(read_vring(version, r)?),
        n if n == kind::PARENT.number => Record::Parent { bytes: r.bytes()? },
        n if n == kind::HANDOVER.number => Record::Handover(read_handover(r)?),
        n if n == kind::HANDLE.number => Record::Handle(read_handle(r)?),
        n if n == kind::TABLE.number => Record::Table { table: r.table()?, next_update: r.u64()? },
        n if n == kind::TABLE_COPIED.number => Record::TableCopied { from: r.table()?, to: r.table()? },
        n if n == kind::TABLE_REMOVED.number => Record::TableRemoved { table: r.table()? },
        n if n == kind::MAPPING.number => Record::Mapping(read_mapping(r)?),
        n if n == kind::UNMAPPED.number => Record::Unmapped { table: r.table()?, firsts: r.range()? },
        n if n == kind::STALE.number => Record::Stale { table: r.table()? },
        n if n == kind::BROKEN.number => {
            Record::Broken { table: r.table()?, update: r.u64()?, range: r.range()? }
        }
        n if n == kind::CONFIG.number => Record::Config { bytes: r.bytes()? },
        _ => return Err("its kind has no reader"),
    })
}

fn put(out: &mut Vec<u8>, value: u64) {
    out.extend(value.to_le_bytes());
}

fn put_option(out: &mut Vec<u8>, value: Option<u64>) {
    out.push(value.is_some().into());
    put(out, value.unwrap_or(0));
}

fn put_range(out: &mut Vec<u8>, range: IovaRange) {
    put(out, range.first());
    put(out, range.last());
}

/// A length that does not fit its field makes a payload that is longer than any that is written.
fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.extend_from_slice(bytes);
}

fn put_config(out: &mut Vec<u8>, bytes: &ConfigBytes) {
    put_len(out, bytes.len());
    for (offset, byte) in bytes {
        out.extend(offset.to_le_bytes());
        out.push(*byte);
    }
}

fn put_table(out: &mut Vec<u8>, table: TableId) {
    let (role, handle) = match table.role {
        TableRole::Interface => (0, 0),
        TableRole::Rollback => (1, 0),
        TableRole::Parent => (2, 0),
        TableRole::Installed => (3, 0),
        TableRole::Handle(id) => (4, id),
    };
    out.push(role);
    put(out, handle);
    out.extend(table.asid.0.to_le_bytes());
}

fn put_state(out: &mut Vec<u8>, state: Option<QueueState>) {
    let kind = match state {
        None => 0,
        Some(QueueState::Split { .. }) => 1,
        Some(QueueState::Packed { .. }) => 2,
    };
    out.push(kind);
    out.extend(state.map_or(0, QueueState::encode).to_le_bytes());
}

fn write_shape(shape: &Shape, out: &mut Vec<u8>) {
    let mode = match shape.address_mode {
        AddressMode::OwnerAddresses => 0,
        AddressMode::Objects => 1,
        AddressMode::Pinned => 2,
        AddressMode::PinnedPages => 3,
    };
    out.extend(shape.device_id.to_le_bytes());
    out.extend(shape.queues.to_le_bytes());
    out.extend(shape.queue_size_max.to_le_bytes());
    out.extend(shape.groups.to_le_bytes());
    out.extend(shape.address_spaces.to_le_bytes());
    out.extend(shape.config_size.to_le_bytes());
    put(out, shape.features.0);
    put(out, shape.backend_features.0);
    put_range(out, shape.iova_range);
    out.push(mode);
}

fn read_shape(r: &mut Reader<'_>) -> Read<Shape> {
    Ok(Shape {
        device_id: r.u32()?,
        queues: r.u16()?,
        queue_size_max: r.u16()?,
        groups: r.u32()?,
        address_spaces: r.u32()?,
        config_size: r.u32()?,
        features: Features(r.u64()?),
        backend_features: BackendFeatures(r.u64()?),
        iova_range: r.range()?,
        address_mode: match r.u8()? {
            0 => AddressMode::OwnerAddresses,
            1 => AddressMode::Objects,
            2 => AddressMode::Pinned,
            3 => AddressMode::PinnedPages,
            _ => return Err("its address mode is not one of 0 to 3"),
        },
    })
}

fn put_addr(out: &mut Vec<u8>, addr: VringAddr) {
    out.extend(addr.flags.to_le_bytes());
    [addr.desc, addr.used, addr.avail, addr.log].iter().for_each(|&address| put(out, address));
}

fn write_vring(vring: &VringState, out: &mut Vec<u8>) {
    out.extend(vring.index.0.to_le_bytes());
    out.extend(vring.group.0.to_le_bytes());
    out.extend(vring.num.to_le_bytes());
    out.push(vring.addr.is_some().into());
    put_addr(out, vring.addr.unwrap_or_default());
    put_state(out, vring.state);
    out.extend(vring.busyloop_timeout.to_le_bytes());
    out.extend([vring.enabled, vring.running, vring.call_installed].map(u8::from));
    [vring.kick, vring.call, vring.err].iter().for_each(|&event| put_option(out, event));
    out.push(vring.started.is_some().into());
    let Ring { size, addr, features } = vring.started.unwrap_or_default();
    out.extend(size.to_le_bytes());
    put_addr(out, addr);
    put(out, features.0);
}

fn read_vring(version: u16, r: &mut Reader<'_>) -> Read<VringState> {
    let (index, group, num) = (QueueIndex(r.u16()?), GroupIndex(r.u32()?), r.u16()?);
    let has_addr = r.bool()?;
    let addr = r.addr()?;
    if !has_addr && addr != VringAddr::default() {
        return Err("it has addresses and says that it has none");
    }
    let mut vring = VringState {
        index,
        group,
        num,
        addr: has_addr.then_some(addr),
        state: r.state()?,
        busyloop_timeout: r.u32()?,
        enabled: r.bool()?,
        running: r.bool()?,
        call_installed: r.bool()?,
        kick: r.option()?,
        call: r.option()?,
        err: r.option()?,
        started: None,
    };
    if version >= 2 {
        let differs = r.bool()?;
        let started = Ring { size: r.u16()?, addr: r.addr()?, features: Features(r.u64()?) };
        if !differs && started != Ring::default() {
            return Err("it has a ring that it runs with and says that it has none");
        }
        vring.started = differs.then_some(started);
    }
    Ok(vring)
}

fn write_log(log: &LogState, out: &mut Vec<u8>) {
    let (uaddr, size, memory) = log.base.unwrap_or_default();
    out.push(log.base.is_some().into());
    [uaddr, size, memory.id, memory.offset].into_iter().for_each(|word| put(out, word));
    put_option(out, log.event);
    out.push(log.all.into());
}

fn read_log(r: &mut Reader<'_>) -> Read<LogState> {
    let has_base = r.bool()?;
    let base = (r.u64()?, r.u64()?, MemoryRef { id: r.u64()?, offset: r.u64()? });
    if !has_base && base != Default::default() {
        return Err("it has memory and says that it has none");
    }
    Ok(LogState { base: has_base.then_some(base), event: r.option()?, all: r.bool()? })
}

fn write_mapping(mapping: &MappingState, out: &mut Vec<u8>) {
    put_table(out, mapping.table);
    put_range(out, mapping.range);
    put(out, mapping.uaddr);
    out.extend([mapping.perm.0, u8::from(mapping.stale)]);
    put(out, mapping.memory.id);
    put(out, mapping.memory.offset);
    put(out, mapping.update);
    put_range(out, mapping.update_range);
    out.push(mapping.broken.into());
}

fn read_mapping(r: &mut Reader<'_>) -> Read<MappingState> {
    Ok(MappingState {
        table: r.table()?,
        range: r.range()?,
        uaddr: r.u64()?,
        perm: Perm(r.u8()?),
        stale: r.bool()?,
        memory: MemoryRef { id: r.u64()?, offset: r.u64()? },
        update: r.u64()?,
        update_range: r.range()?,
        broken: r.bool()?,
    })
}

fn write_handover(state: &HandoverState, out: &mut Vec<u8>) {
    write_shape(&state.shape, out);
    put_option(out, state.active);
    out.push(state.deferred.into());
    put(out, state.next_handle);
    put_config(out, &state.written);
    put_config(out, &state.written_before);
    put_bytes(out, &state.parent);
}

fn read_handover(r: &mut Reader<'_>) -> Read<HandoverState> {
    Ok(HandoverState {
        shape: read_shape(r)?,
        active: r.option()?,
        deferred: r.bool()?,
        next_handle: r.u64()?,
        written: r.config()?,
        written_before: r.config()?,
        parent: r.bytes()?,
    })
}

fn write_handle(state: &HandleState, out: &mut Vec<u8>) {
    put(out, state.id);
    put_option(out, state.features.map(|word| word.0));
    put_option(out, state.owner);
    out.push(state.superseded.into());
    put_config(out, &state.written);
}

fn read_handle(r: &mut Reader<'_>) -> Read<HandleState> {
    Ok(HandleState {
        id: r.u64()?,
        features: r.option()?.map(Features),
        owner: r.option()?,
        superseded: r.bool()?,
        written: r.config()?,
    })
}

/// Takes a payload apart. Every value has one encoding only, so that what was read is written the same way.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or("it ends too soon")?;
        self.0 = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Read<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Read<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Read<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn bool(&mut self) -> Read<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err("a flag is neither 0 nor 1"),
        }
    }

    fn option(&mut self) -> Read<Option<u64>> {
        match (self.bool()?, self.u64()?) {
            (true, value) => Ok(Some(value)),
            (false, 0) => Ok(None),
            (false, _) => Err("a value is there and said not to be"),
        }
    }

    fn range(&mut self) -> Read<IovaRange> {
        IovaRange::new(self.u64()?, self.u64()?).ok_or("a range ends before it begins")
    }

    fn addr(&mut self) -> Read<VringAddr> {
        Ok(VringAddr {
            flags: self.u32()?,
            desc: self.u64()?,
            used: self.u64()?,
            avail: self.u64()?,
            log: self.u64()?,
        })
    }

    fn table(&mut self) -> Read<TableId> {
        let role = match (self.u8()?, self.u64()?) {
            (0, 0) => TableRole::Interface,
            (1, 0) => TableRole::Rollback,
            (2, 0) => TableRole::Parent,
            (3, 0) => TableRole::Installed,
            (4, id) => TableRole::Handle(id),
            _ => return Err("it names a table that there is not"),
        };
        Ok(TableId { role, asid: Asid(self.u32()?) })
    }

    fn state(&mut self) -> Read<Option<QueueState>> {
        let (kind, num) = (self.u8()?, self.u32()?);
        let features = Features::NONE;
        match kind {
            0 if num == 0 => Ok(None),
            1 => QueueState::decode(num, features)
                .map(Some)
                .ok_or("a split ring's index has more than 16 bits"),
            2 => Ok(QueueState::decode(num, features.with(Features::RING_PACKED))),
            _ => Err("it has a ring format that there is not"),
        }
    }

    /// A list of elements of at least `size` bytes each; nothing is allocated for more than there are bytes.
    fn list<T>(&mut self, size: usize, mut element: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        let len = usize::try_from(self.u32()?).map_err(|_| "a list is longer than memory")?;
        if len > self.0.len() / size {
            return Err("a list is longer than the record");
        }
        (0..len).map(|_| element(self)).collect()
    }

    fn bytes(&mut self) -> Read<Vec<u8>> {
        self.list(1, Self::u8)
    }

    fn config(&mut self) -> Read<ConfigBytes> {
        self.list(5, |r| Ok((r.u32()?, r.u8()?)))
    }

    /// Everything was read.
    pub(super) const fn end(&self) -> Read<()> {
        if self.0.is_empty() { Ok(()) } else { Err("something follows what it should have") }
    }
}
