// SPDX-License-Identifier: GPL-2.0-only

//! A vDPA block device in memory, in Rust: a parent that offers the live-update bits itself, as those of the posted series do, and
//! runs its ring with addresses of the owner. `vdpa dev add name NAME mgmtdev vdpa_ram`.

use kernel::prelude::*;

#[forbid(unsafe_code)]
mod device;
#[forbid(unsafe_code)]
mod disk;
mod layer;
#[forbid(unsafe_code)]
mod ring;
#[allow(dead_code, unreachable_pub)]
#[forbid(unsafe_code)]
#[path = "../src/rules.rs"]
mod rules;

module! {
    type: Ram,
    name: "vdpa_ram",
    authors: ["vdpa-live contributors"],
    description: "vDPA block device in memory, with live update of its clients",
    license: "GPL v2",
    params: {
        size_mib: u32 {
            default: 128,
            description: "Size of a disk in MiB (default: 128)",
        },
    },
}

/// The module.
struct Ram {
    _management: layer::Management,
}

/// Size of a disk.
fn disk_mib() -> usize {
    *module_parameters::size_mib.value_ref() as usize
}

impl kernel::Module for Ram {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Self { _management: layer::Management::register()? })
    }
}
