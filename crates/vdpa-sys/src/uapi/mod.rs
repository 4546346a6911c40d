//! Structures and numbers of the kernel's headers, one file per header.

/// Asserts the size of a structure and the offsets of its fields.
macro_rules! layout {
    ($name:ident, $size:literal, $($field:ident @ $offset:literal),+ $(,)?) => {
        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)+
        };
    };
}

pub mod dirty;
pub mod fuse;
pub mod live;
pub(crate) mod proc;
pub mod report;
pub mod state;
pub mod vduse;
pub mod vhost;
