//! [`TestObjects`]: the objects of a [`TestHost`], numbered for saved state.

use super::platform::{TestEvent, TestHost, TestPiece, TestProcess, TestSpace};
use crate::device::Device;
use crate::device::state::{self, MemoryRef, StateSink, StateSource};
use crate::errno::Errno;
use crate::host::MemoryObject;
use crate::parent::Parent;
use crate::types::{Perm, Result};

/// Gives objects numbers and finds them again: what a daemon keeps of the kernel's objects for its successor.
#[derive(Clone, Debug, Default)]
pub struct TestObjects {
    spaces: Vec<TestSpace>,
    pieces: Vec<TestPiece>,
    events: Vec<TestEvent>,
}

impl TestObjects {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same objects as another process has them: address spaces have nothing charged to them there.
    #[must_use]
    pub fn in_successor(&self) -> Self {
        Self { spaces: self.spaces.iter().map(TestSpace::in_successor).collect(), ..self.clone() }
    }

    /// A client as another process sees it, which has these objects.
    #[must_use]
    pub fn client(&self, process: &TestProcess) -> TestProcess {
        let space = process.space();
        let known = self.spaces.iter().find(|known| known.is_same(&space)).cloned();
        process.with_space(known.unwrap_or_else(|| space.in_successor()))
    }
}

/// Decodes records, and restores the device that they describe around `parent`: what a successor does with whatever it
/// is given. For fuzz targets, with any bytes.
///
/// # Errors
/// In words, why the bytes are no device.
pub fn restore_from_bytes<P: Parent<Host = TestHost>>(
    parent: P,
    bytes: &[u8],
    objects: &mut TestObjects,
) -> Result<Device<P>, String> {
    let records = state::decode_all(bytes).map_err(|error| error.to_string())?;
    let device = Device::restore(parent, &records, objects).map_err(|error| error.to_string())?;
    #[cfg(fuzzing)]
    device.check_invariants()?;
    Ok(device)
}

fn number<T: Clone>(list: &mut Vec<T>, item: &T, same: impl Fn(&T) -> bool) -> u64 {
    let at = list.iter().position(same).unwrap_or_else(|| {
        list.push(item.clone());
        list.len() - 1
    });
    at as u64
}

fn find<T>(list: &[T], id: u64) -> Result<&T> {
    usize::try_from(id).ok().and_then(|at| list.get(at)).ok_or(Errno::NOENT)
}

impl StateSink<TestHost> for TestObjects {
    fn address_space(&mut self, space: &TestSpace) -> Result<u64> {
        Ok(number(&mut self.spaces, space, |known| known.is_same(space)))
    }

    fn memory(&mut self, memory: &TestPiece) -> Result<MemoryRef> {
        // One number for all pieces of an object that are mapped in the same way.
        let (whole, offset) = memory.whole();
        let same =
            |known: &TestPiece| known.is_shared() == whole.is_shared() && known.same_object(0, &whole, 0);
        Ok(MemoryRef { id: number(&mut self.pieces, &whole, same), offset })
    }

    fn event(&mut self, event: &TestEvent) -> Result<u64> {
        Ok(number(&mut self.events, event, |known| known.is_same(event)))
    }
}

impl StateSource<TestHost> for TestObjects {
    fn address_space(&mut self, id: u64) -> Result<TestSpace> {
        find(&self.spaces, id).cloned()
    }

    fn memory(&mut self, at: MemoryRef, size: u64, _perm: Perm) -> Result<TestPiece> {
        find(&self.pieces, at.id)?.part(at.offset, size).ok_or(Errno::INVAL)
    }

    fn event(&mut self, id: u64) -> Result<TestEvent> {
        find(&self.events, id).cloned()
    }
}
