//! What the targets need: for `device` an in-memory platform, with processes whose address spaces change and a parent that
//! refuses and keeps book; for those of the rings what does not depend on the format.

pub mod parent;
pub mod process;
pub mod ring;
