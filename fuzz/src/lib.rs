//! Code that the fuzz targets share: for `device` an in-memory platform with processes whose address spaces change, and a
//! parent that records and refuses calls; for the ring targets everything that does not depend on the ring format.

pub mod parent;
pub mod process;
pub mod ring;
