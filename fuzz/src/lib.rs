//! An in-memory platform for the target `device`: processes whose address spaces change, and a parent that refuses
//! and keeps book.

pub mod parent;
pub mod process;
