//! A device that dies at every store, and its successors, against a driver that lives on.

mod crash;
mod expand;
mod hostile;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::LogMemory;
use crate::ring::{Area, Fault};
use crate::testing::TestArea;

/// How many stores a process may still do. What it stores afterwards does not happen, as it is dead.
#[derive(Debug)]
struct Life {
    left: Cell<u64>,
    done: Cell<u64>,
}

impl Life {
    fn new(stores: u64) -> Rc<Self> {
        Rc::new(Self { left: Cell::new(stores), done: Cell::new(0) })
    }

    fn is_over(&self) -> bool {
        self.left.get() == 0
    }

    /// Whether one more store happens.
    fn store(&self) -> bool {
        if self.is_over() {
            return false;
        }
        self.left.set(self.left.get() - 1);
        self.done.set(self.done.get() + 1);
        true
    }
}

/// A ring area of one process.
#[derive(Clone, Debug)]
struct MortalArea {
    area: TestArea,
    life: Rc<Life>,
}

impl Area for MortalArea {
    fn size(&self) -> usize {
        self.area.size()
    }

    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        self.area.load_u16(offset)
    }

    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        if self.life.store() { self.area.store_u16(offset, value) } else { Ok(()) }
    }

    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        self.area.read(offset, buf)
    }

    /// Two bytes at a time: a copy may be interrupted anywhere.
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        for (at, part) in (offset..).step_by(2).zip(data.chunks(2)) {
            if self.life.store() {
                self.area.write(at, part)?;
            }
        }
        Ok(())
    }
}

/// The log of one process, in memory that outlives it.
#[derive(Clone, Debug)]
struct MortalLog {
    words: Rc<RefCell<Vec<u64>>>,
    life: Rc<Life>,
}

impl LogMemory for MortalLog {
    fn words(&self) -> usize {
        self.words.borrow().len()
    }

    fn load(&self, word: usize) -> u64 {
        self.words.borrow()[word]
    }

    fn store(&self, word: usize, value: u64) {
        if self.life.store() {
            self.words.borrow_mut()[word] = value;
        }
    }
}
