//! Kernel interfaces as the headers define them, one module per header.

pub mod fuse;
