//! The C interface of [`vdpa_client`], as the library `libvdpa-live`.
//!
//! `include/vdpa-live.h` is made from this crate, with the comments that are here; `docs/c-api.md` has the concepts and an example.
//! Programs in Rust use [`vdpa_client`], which this crate adds nothing to.
//!
//! # Rules of the border
//!
//! What a function takes is a reference where C gives one object or `NULL`, so that most of them have no unsafe code. A string, an
//! array, a descriptor and an address of memory are raw, and the module `border` is where they become values.
//!
//! No panic leaves the library: it becomes `-ENOTRECOVERABLE`. A `NULL` where an object is needed, and every argument that makes no
//! sense, is `-EINVAL` with a text.
#![expect(non_camel_case_types, reason = "the names are those of the header")]
#![expect(
    clippy::missing_safety_doc,
    reason = "what callers promise is the same for all functions: the header begins with it"
)]

// In this order the header has them.
pub mod error;
pub mod incoming;
pub mod log;
pub mod memory;
pub mod plan;
pub mod queue;
pub mod saved;
pub mod session;
pub mod update;

mod border;
mod failure;
