// SPDX-License-Identifier: GPL-2.0-only

//! vhost-vdpa with live update: what drivers/vhost/vdpa.c of Linux 7.3 does, and the requests by which a client hands a device
//! to its successor (VHOST_NEW_OWNER, VHOST_IOTLB_REMAP).
//!
//! A port of drivers/vhost/vdpa.c (Copyright (C) 2018-2020 Intel Corporation, 2020 Red Hat, Inc.; GPL-2.0), and so under its
//! licence. It stands on the kernel's own vdpa.ko, vhost.ko and vhost_iotlb.ko and takes the place of vhost_vdpa.ko.
//!
//! | part | what |
//! |---|---|
//! | [`layer`] | safe types over the kernel's interfaces: all unsafe code |
//! | [`logic`] | what each request does |
//! | [`rules`] | decisions that the user-space implementation (crate `vdpa-core`) shares: the same file |
//!
//! Integer overflow stops the kernel here (CONFIG_RUST_OVERFLOW_CHECKS), so that numbers of a client are only used in operations
//! that check or wrap.

use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Relaxed, Atomic};

mod layer;
#[forbid(unsafe_code)]
mod logic;
#[allow(dead_code, unreachable_pub)]
#[forbid(unsafe_code)]
mod rules;
#[forbid(unsafe_code)]
mod uapi;

module! {
    type: Live,
    name: "vhost_vdpa_live",
    authors: ["vdpa-live contributors"],
    description: "vDPA-based vhost backend for virtio, with live update of its clients",
    license: "GPL v2",
}

/// The module. Fields are dropped in their order: first the driver, and with it all devices.
struct Live {
    _driver: layer::node::Driver,
    _numbers: layer::node::Numbers,
}

static FIRST_NUMBER: Atomic<i32> = Atomic::new(0);

/// The device number of minor 0.
fn first_number() -> u32 {
    FIRST_NUMBER.load(Relaxed) as u32
}

impl kernel::Module for Live {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let numbers = layer::node::Numbers::reserve()?;
        FIRST_NUMBER.store(numbers.first() as i32, Relaxed);
        Ok(Self { _driver: layer::node::Driver::register()?, _numbers: numbers })
    }
}
