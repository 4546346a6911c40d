// SPDX-License-Identifier: GPL-2.0-only

//! The only part of the module with unsafe code: safe types over what the kernel gives.
//!
//! | type | over | what it guarantees |
//! |---|---|---|
//! | [`node::Locked`] | the mutex of a `vhost_dev` | the state of a device is used by one thread at a time |
//! | [`parent::Parent`] | `vdpa_config_ops` | an operation is called only if it exists, with a queue that exists |
//! | [`vhost::Vhost`] | `vhost_dev`, `vhost_virtqueue` | the fields of a queue are read and written under its mutex |
//! | [`iotlb::Iotlb`] | `vhost_iotlb` | what a mapping keeps (pages or a file) lives as long as the mapping |
//! | [`memory::PinnedRun`] | `pin_user_pages` | pinned pages are unpinned once |
//! | [`memory::OwnedMm`] | `mm_struct` | a counted reference |
//! | [`memory::Areas`] | `mmap_read_lock` | areas are looked at only while the lock is held |
//! | [`domain::Domain`] | `iommu_domain` | attached as long as it exists |
//! | [`eventfd::ConfigCall`] | `eventfd_ctx` | an interrupt never signals a context that is gone |

pub(crate) mod domain;
pub(crate) mod eventfd;
#[allow(
    clippy::all,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn,
    unused
)]
mod gen;
pub(crate) mod iotlb;
pub(crate) mod memory;
pub(crate) mod node;
pub(crate) mod parameters;
pub(crate) mod parent;
pub(crate) mod vhost;
