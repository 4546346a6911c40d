//! What of a device the kernel takes.

use vdpa_core::features::Features;
use vdpa_core::parent::{AddressMode, Profile};

use super::VduseError;
use super::state::GROUPS_MAX;

/// Virtio device ids of what is served.
const NETWORK: u32 = 1;
const BLOCK: u32 = 2;

/// What a driver of a network card sends to its control queue, which the kernel refuses: a program could delay it, and the driver waits for
/// the answer with a lock held.
const CONTROL: Features = Features::of(&[
    Features::NET_CTRL_VQ,
    Features::NET_CTRL_RX,
    Features::NET_CTRL_VLAN,
    Features::NET_CTRL_RX_EXTRA,
    Features::NET_CTRL_MAC_ADDR,
    Features::NET_CTRL_GUEST_OFFLOADS,
    Features::NET_GUEST_ANNOUNCE,
]);

/// Queues of a network card without its control queue, and with one pair.
const PAIR: u16 = 2;

/// The part of a device that the kernel is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) features: Features,
    pub(super) queues: u16,
    pub(super) groups: u32,
    pub(super) address_spaces: u32,
}

impl Shape {
    /// That of a device with this profile.
    ///
    /// # Errors
    /// `Unsuitable`.
    pub(super) fn of(profile: &Profile) -> Result<Self, VduseError> {
        let unsuitable = |what| Err(VduseError::Unsuitable { what });
        match profile.address_mode {
            AddressMode::Objects => {}
            AddressMode::Pinned | AddressMode::PinnedPages => {
                return unsuitable("memory of the kernel's drivers cannot be pinned");
            }
            AddressMode::OwnerAddresses => {
                return unsuitable("this device uses addresses of its client, and VDUSE has files");
            }
        }
        let Profile { features, queues, groups, address_spaces, .. } = *profile;
        if groups as usize > GROUPS_MAX || address_spaces > u32::from(u8::MAX) {
            return unsuitable("the device has too many groups of queues or address spaces");
        }
        match profile.device_id {
            // The kernel refuses a disk whose cache mode a driver can change.
            BLOCK => {
                let features = features.without(Features::BLK_CONFIG_WCE);
                Ok(Self { features, queues, groups, address_spaces })
            }
            NETWORK if features.has(Features::NET_MQ) => {
                unsuitable("a network card of VDUSE has no control queue, and so one pair of queues")
            }
            NETWORK if queues >= PAIR => Ok(Self {
                features: Features(features.0 & !CONTROL.0),
                queues: PAIR,
                groups: 1,
                address_spaces: 1,
            }),
            _ => unsuitable("only disks and network cards are served by VDUSE"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_card_has_one_pair_of_queues_and_no_control_queue() {
        let rest = Profile::on_objects(NETWORK, Features::NONE.with(Features::NET_MAC), 3);
        let profile =
            Profile { features: rest.features | CONTROL, groups: 2, address_spaces: 2, ..rest.clone() };
        let expected = Shape { features: rest.features, queues: 2, groups: 1, address_spaces: 1 };
        assert_eq!(Shape::of(&profile).unwrap(), expected);
        let several = Profile { features: profile.features.with(Features::NET_MQ), ..profile };
        assert!(Shape::of(&several).unwrap_err().to_string().contains("one pair"));
    }

    #[test]
    fn a_disk_is_as_it_is_but_for_its_cache_mode() {
        let rest = Profile::on_objects(BLOCK, Features::NONE, 4);
        let profile = Profile { features: rest.features.with(Features::BLK_CONFIG_WCE), ..rest.clone() };
        let shape = Shape::of(&profile).unwrap();
        assert_eq!((shape.features, shape.queues), (rest.features, 4));
        for address_mode in [AddressMode::Pinned, AddressMode::PinnedPages, AddressMode::OwnerAddresses] {
            Shape::of(&Profile { address_mode, ..profile.clone() }).unwrap_err();
        }
        Shape::of(&Profile { device_id: 4, ..profile.clone() }).unwrap_err();
        Shape::of(&Profile { groups: 9, ..profile }).unwrap_err();
    }
}
