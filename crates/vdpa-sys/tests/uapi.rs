//! Numbers and layouts compared with those compiled from the kernel's headers.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

use std::mem::offset_of;

use serde_json::Value;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::iotlb_type;
use vdpa_core::{blk, net};
use vdpa_sys::ioctl::{Direction, direction, size};

use vdpa_sys::uapi::vhost::{self, REQUESTS};

fn data() -> Value {
    serde_json::from_str(include_str!("data/uapi-numbers.json")).unwrap()
}

#[test]
fn every_request_has_the_number_of_the_headers() {
    let data = data();
    let mut known = data["ioctls"].as_object().unwrap().clone();
    known.extend(data["proposed"]["ioctls"].as_object().unwrap().clone());
    for (name, number) in REQUESTS {
        let expected = known.remove(*name).unwrap_or_else(|| panic!("{name} is not in the headers"));
        assert_eq!(u64::from(*number), expected["number"], "{name}: {number:#x}");
        assert_eq!(size(*number) as u64, expected["size"], "{name}");
        let expected = match expected["direction"].as_str().unwrap() {
            "none" => Direction::None,
            "read" => Direction::Read,
            "write" => Direction::Write,
            "readwrite" => Direction::ReadWrite,
            other => panic!("direction {other}"),
        };
        assert_eq!(direction(*number), expected, "{name}");
        assert_eq!(vhost::request_name(*number), Some(*name));
    }
    assert!(known.is_empty(), "requests of the headers that are missing: {known:?}");
    assert_eq!(vhost::VHOST_NEW_OWNER, 0xaf27);
}

#[test]
fn constants_are_those_of_the_headers() {
    let data = data();
    let constant = |name: &str| {
        let found =
            [&data["constants"], &data["proposed"]["constants"]].into_iter().find_map(|set| set.get(name));
        found.unwrap_or_else(|| panic!("{name} is not in the headers")).as_i64().unwrap()
    };
    let bits = [
        ("IOTLB_MSG_V2", BackendFeatures::IOTLB_MSG_V2),
        ("IOTLB_BATCH", BackendFeatures::IOTLB_BATCH),
        ("IOTLB_ASID", BackendFeatures::IOTLB_ASID),
        ("SUSPEND", BackendFeatures::SUSPEND),
        ("RESUME", BackendFeatures::RESUME),
        ("ENABLE_AFTER_DRIVER_OK", BackendFeatures::ENABLE_AFTER_DRIVER_OK),
        ("DESC_ASID", BackendFeatures::DESC_ASID),
        ("IOTLB_PERSIST", BackendFeatures::IOTLB_PERSIST),
        ("NEW_OWNER", BackendFeatures::NEW_OWNER),
        ("IOTLB_REMAP", BackendFeatures::IOTLB_REMAP),
    ];
    for (name, bit) in bits {
        assert_eq!(i64::from(bit.0), constant(&format!("VHOST_BACKEND_F_{name}")), "{name}");
    }
    let bits = [
        ("SIZE_MAX", Features::BLK_SIZE_MAX),
        ("SEG_MAX", Features::BLK_SEG_MAX),
        ("RO", Features::BLK_RO),
        ("BLK_SIZE", Features::BLK_BLK_SIZE),
        ("FLUSH", Features::BLK_FLUSH),
        ("TOPOLOGY", Features::BLK_TOPOLOGY),
        ("CONFIG_WCE", Features::BLK_CONFIG_WCE),
        ("MQ", Features::BLK_MQ),
        ("DISCARD", Features::BLK_DISCARD),
        ("WRITE_ZEROES", Features::BLK_WRITE_ZEROES),
    ];
    for (name, bit) in bits {
        assert_eq!(i64::from(bit.0), constant(&format!("VIRTIO_BLK_F_{name}")), "{name}");
    }
    let kinds = [
        ("MISS", iotlb_type::MISS),
        ("UPDATE", iotlb_type::UPDATE),
        ("INVALIDATE", iotlb_type::INVALIDATE),
        ("ACCESS_FAIL", iotlb_type::ACCESS_FAIL),
        ("BATCH_BEGIN", iotlb_type::BATCH_BEGIN),
        ("BATCH_END", iotlb_type::BATCH_END),
        ("REMAP", iotlb_type::REMAP),
    ];
    for (name, kind) in kinds {
        assert_eq!(i64::from(kind), constant(&format!("VHOST_IOTLB_{name}")), "{name}");
    }
    assert_eq!(i64::from(vhost::VHOST_IOTLB_MSG), constant("VHOST_IOTLB_MSG"));
    assert_eq!(i64::from(vhost::VHOST_IOTLB_MSG_V2), constant("VHOST_IOTLB_MSG_V2"));
    assert_eq!(i64::from(vhost::VHOST_FILE_UNBIND), constant("VHOST_FILE_UNBIND"));
    assert_eq!(i64::from(vhost::VHOST_VRING_F_LOG), constant("VHOST_VRING_F_LOG"));
    assert_eq!(i64::from(vhost::VHOST_VIRTIO), constant("VHOST_VIRTIO"));
}

/// Compares a structure with that of the headers: its size, and the offset of each of `fields`.
fn check(data: &Value, name: &str, bytes: usize, fields: &[(&str, usize)]) {
    let expected = &data["structs"][name];
    assert_eq!(bytes as u64, expected["size"], "{name}");
    for (field, offset) in fields {
        let field = if *field == "kind" { "type" } else { field };
        let all = expected["fields"].as_array().unwrap();
        let found = all.iter().find(|candidate| candidate["name"] == field);
        let found = found.unwrap_or_else(|| panic!("{name} has no field {field}"));
        assert_eq!(*offset as u64, found["offset"], "{name}.{field}");
    }
}

macro_rules! check {
    ($data:ident: $($name:literal = $module:ident::$type:ident { $($field:ident),+ };)+) => {
        $(check(
            &$data,
            $name,
            size_of::<$module::$type>(),
            &[$((stringify!($field), offset_of!($module::$type, $field))),+],
        );)+
        let mut missing = $data["structs"].as_object().unwrap().clone();
        // These are encoded field by field or are part of another structure. Their tests are next to the code.
        for name in ["virtio_blk_geometry", "virtio_blk_outhdr", "virtio_blk_discard_write_zeroes"] {
            missing.remove(name);
        }
        $(missing.remove($name);)+
        assert!(missing.is_empty(), "structures that are not checked: {:?}", missing.keys().collect::<Vec<_>>());
    };
}

#[test]
fn every_structure_has_the_layout_of_the_headers() {
    let data = data();
    check! { data:
        "vhost_vring_state" = vhost::VringState { index, num };
        "vhost_vring_file" = vhost::VringFile { index, fd };
        "vhost_vring_addr" =
            vhost::VringAddr { index, flags, desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr };
        "vhost_worker_state" = vhost::WorkerState { worker_id };
        "vhost_vring_worker" = vhost::VringWorker { index, worker_id };
        "vhost_iotlb_msg" = vhost::IotlbMsg { iova, size, uaddr, perm, kind };
        "vhost_msg" = vhost::Msg { kind, iotlb };
        "vhost_msg_v2" = vhost::MsgV2 { kind, asid, iotlb };
        "vhost_features_array" = vhost::FeaturesArrayHeader { count };
        "vhost_memory_region" = vhost::MemoryRegion { guest_phys_addr, memory_size, userspace_addr, flags_padding };
        "vhost_memory" = vhost::MemoryHeader { nregions, padding };
        "vhost_vdpa_config" = vhost::ConfigHeader { off, len };
        "vhost_vdpa_iova_range" = vhost::IovaRange { first, last };
        "virtio_net_config" = net::NetConfig {
            mac, status, max_virtqueue_pairs, mtu, speed, duplex, rss_max_key_size,
            rss_max_indirection_table_length, supported_hash_types
        };
        "virtio_net_hdr_v1" =
            net::NetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers };
        "virtio_blk_config" = blk::BlkConfig {
            capacity, size_max, seg_max, blk_size, physical_block_exp, alignment_offset, min_io_size,
            opt_io_size, wce, num_queues, max_discard_sectors, max_discard_seg, discard_sector_alignment,
            max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap, max_secure_erase_sectors,
            max_secure_erase_seg, secure_erase_sector_alignment, zoned
        };
        "virtio_blk_zoned_characteristics" = blk::BlkZoned {
            zone_sectors, max_open_zones, max_active_zones, max_append_sectors, write_granularity, model
        };
    }
}
