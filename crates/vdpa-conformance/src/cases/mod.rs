//! The cases, in one module for each part of the interface.

mod card;
mod config;
mod data;
mod dirty;
mod dirty_data;
mod features;
mod file;
mod handover;
mod iotlb;
mod live;
mod mem_table;
mod moving;
mod net;
mod net_data;
mod order;
mod owned;
mod owner;
mod remap;
mod state;
mod status;
mod vduse;
mod vhost_log;
mod vring;

use crate::case::Case;

/// Every case, in the order in which they run. Cases whose subject others rely on come first.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        file::CASES,
        features::CASES,
        status::CASES,
        config::CASES,
        owner::CASES,
        vring::CASES,
        iotlb::CASES,
        state::CASES,
        order::CASES,
        data::CASES,
        data::PACKED_CASES,
        dirty::CASES,
        dirty_data::CASES,
        mem_table::CASES,
        vhost_log::CASES,
        moving::CASES,
        handover::CASES,
        live::CASES,
        remap::CASES,
        net::CASES,
        net_data::CASES,
        card::CASES,
    ]
    .concat()
}

/// The cases of VDUSE, whose subject is the kernel ([`Target::Vduse`](crate::Target::Vduse)).
#[must_use]
pub fn vduse() -> Vec<Case> {
    vduse::CASES.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_well_formed() {
        let cases = [all(), vduse()].concat();
        let mut ids: Vec<_> = cases.iter().map(|case| case.id).collect();
        for id in &ids {
            let (group, name) = id.split_once('.').unwrap();
            let plain = |text: &str| {
                !text.is_empty()
                    && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            };
            assert!(plain(group) && plain(name), "{id}");
        }
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), cases.len());
    }

    #[test]
    fn every_case_cites_a_section_and_covers_a_request() {
        for case in all() {
            assert!(case.spec.starts_with(|c: char| c.is_ascii_digit()), "{}", case.id);
            assert!(!case.covers.is_empty(), "{}", case.id);
        }
    }
}
