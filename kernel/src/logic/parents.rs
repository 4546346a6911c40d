// SPDX-License-Identifier: GPL-2.0-only

//! The list of parents that do not offer the live-update bits themselves (module parameter `parents`).

use crate::layer::parameters;
use crate::layer::parent::Parent;
use crate::rules::Listed;

/// What the list says about a parent. `*` names all.
pub(super) fn listed(parent: Parent<'_>) -> Listed {
    let list = parameters::parents().to_bytes();
    list.split(|byte| *byte == b',').map(|entry| item(entry, parent)).find(|item| *item != Listed::No).unwrap_or(Listed::No)
}

fn item(entry: &[u8], parent: Parent<'_>) -> Listed {
    let (name, listed) = match entry.strip_suffix(b"+remap") {
        Some(name) => (name, Listed::ByAddress),
        None => (entry, Listed::Independent),
    };
    let names_it = name == b"*" || parent.names().any(|own| own.to_bytes() == name);
    if names_it && !name.is_empty() {
        listed
    } else {
        Listed::No
    }
}
