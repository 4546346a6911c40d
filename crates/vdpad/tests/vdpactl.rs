//! vdpactl against a real server: every output of uapi-spec 7.4, byte by byte.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod support;

use vdpa_control::api::Successor;
use vdpa_core::features::Status;

use support::{Fixture, SIM_NET, Setup};

const NO_DEVICE: &str = "\
Error: vdpa: device not found.
kernel answers: No such device
\"vdpactl dev show\" lists the devices that exist.
";

#[test]
fn mgmtdev_show() {
    let setup = Setup::new(Fixture::simulators());
    setup.vdpactl("mgmtdev show").prints(concat!(
        "vdpasim_net: \n",
        "  supported_classes net\n",
        "  max_supported_vqs 3\n",
        "  dev_features MTU MAC STATUS CTRL_VQ CTRL_MAC_ADDR ANY_LAYOUT VERSION_1 ACCESS_PLATFORM\n",
        "vdpasim_blk: \n",
        "  supported_classes block\n",
        "  max_supported_vqs 0\n",
        "  dev_features\n",
        "vduse: \n",
        "  supported_classes net block\n",
        "  max_supported_vqs 0\n",
        "  dev_features\n",
    ));
    setup.vdpactl("-j mgmtdev show").prints(concat!(
        r#"{"mgmtdev":{"vdpasim_net":{"supported_classes":["net"],"max_supported_vqs":3,"dev_features":["#,
        r#""MTU","MAC","STATUS","CTRL_VQ","CTRL_MAC_ADDR","ANY_LAYOUT","VERSION_1","ACCESS_PLATFORM"]},"#,
        r#""vdpasim_blk":{"supported_classes":["block"],"max_supported_vqs":0,"dev_features":[]},"#,
        r#""vduse":{"supported_classes":["net","block"],"max_supported_vqs":0,"dev_features":[]}}}"#,
        "\n",
    ));
    setup.vdpactl("-jp mgmtdev show vduse").prints(
        r#"{
    "mgmtdev": {
        "vduse": {
            "supported_classes": [ "net","block" ],
            "max_supported_vqs": 0,
            "dev_features": [ ]
        }
    }
}
"#,
    );
    setup.vdpactl("-n mgmtdev show vdpasim_net").prints(concat!(
        "vdpasim_net: \n",
        "  supported_classes net\n",
        "  max_supported_vqs 3\n",
        "  dev_features bit_3 bit_5 bit_16 bit_17 bit_23 bit_27 bit_32 bit_33\n",
    ));
}

#[test]
fn mgmtdevs_match_with_their_bus() {
    let mut fixture = Fixture::simulators();
    let mut sf = fixture.mgmtdevs[0].clone();
    sf.bus = Some("auxiliary".into());
    sf.supported_classes = vec![2, 26];
    fixture.mgmtdevs.push(sf);
    let setup = Setup::new(fixture);
    setup.vdpactl("mgmtdev show auxiliary/vdpasim_net").prints(concat!(
        "auxiliary/vdpasim_net: \n",
        "  supported_classes block < unknown class >\n",
        "  max_supported_vqs 3\n",
        "  dev_features bit_3 bit_5 bit_16 bit_17 bit_23 bit_27 VERSION_1 ACCESS_PLATFORM\n",
    ));
    assert!(setup.vdpactl("mgmtdev show vdpasim_net").stdout.starts_with("vdpasim_net: \n"));
    setup.vdpactl("-j mgmtdev show pci/vdpasim_net").fails(
        "{\"mgmtdev\":{}}\n",
        "Error: vdpa: Fail to find the specified mgmt device.\n\
         kernel answers: No such device\n\
         \"vdpactl mgmtdev show\" lists the management devices that exist.\n",
    );
    setup.vdpactl("mgmtdev show a/b/c").fails(
        "",
        "Wrong vdpa mgmtdev identification string format\n\
         Expected \"mgmtdev_bus_name/mgmtdev_name\"\n\
         Expected \"mgmtdev_name\"\n",
    );
}

#[test]
fn dev_show() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_blk());
    let vdpa0 = "vdpa0: type network mgmtdev vdpasim_net vendor_id 0 max_vqs 3 max_vq_size 256\n";
    let blk0 = "blk0: type block mgmtdev vdpasim_blk vendor_id 0 max_vqs 1 max_vq_size 256\n";
    setup.vdpactl("dev show").prints(&format!("{vdpa0}{blk0}"));
    setup.vdpactl("dev show blk0").prints(blk0);
    setup.vdpactl("dev show -j vdpa0").prints(concat!(
        r#"{"dev":{"vdpa0":{"type":"network","mgmtdev":"vdpasim_net","vendor_id":0,"max_vqs":3,"#,
        r#""max_vq_size":256}}}"#,
        "\n"
    ));
    setup.vdpactl("dev show -jp vdpa0").prints(
        r#"{
    "dev": {
        "vdpa0": {
            "type": "network",
            "mgmtdev": "vdpasim_net",
            "vendor_id": 0,
            "max_vqs": 3,
            "max_vq_size": 256
        }
    }
}
"#,
    );
}

#[test]
fn dev_show_statistics() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_blk());
    setup.vdpactl("-s dev show").prints(
        "\
vdpa0: type network mgmtdev vdpasim_net vendor_id 0 max_vqs 3 max_vq_size 256
  path /run/vdpad/dev/vdpa0
  front fuse
  min_vq_size 1
  open false suspended false status 0x0
  pinned 0 pages
  mappings 0
blk0: type block mgmtdev vdpasim_blk vendor_id 0 max_vqs 1 max_vq_size 256
  path /run/vdpad/dev/blk0
  front fuse
  min_vq_size 1
  open true suspended false status acknowledge|driver|features_ok|driver_ok
  owner pid 4711 comm qemu since 2026-11-21T07:12:49Z
  negotiated_features FLUSH VERSION_1 bit_40
  pinned 1048576 of 2097152 pages
  mappings 12
  max_iotlb_entries 2048
  dirty_tracking page_size 4096 ranges 2 pages 1048576
  queue 0 size 256 enabled true running true requests 10 bytes 40960 errors 1 poison 0
",
    );
    setup.vdpactl("-s -j -p dev show blk0").prints(
        r#"{
    "dev": {
        "blk0": {
            "type": "block",
            "mgmtdev": "vdpasim_blk",
            "vendor_id": 0,
            "max_vqs": 1,
            "max_vq_size": 256,
            "path": "/run/vdpad/dev/blk0",
            "front": "fuse",
            "min_vq_size": 1,
            "open": true,
            "suspended": false,
            "status": "acknowledge|driver|features_ok|driver_ok",
            "owner": {
                "pid": 4711,
                "comm": "qemu",
                "since": "2026-11-21T07:12:49Z"
            },
            "negotiated_features": [ "FLUSH","VERSION_1",40 ],
            "pinned_pages": 1048576,
            "memlock_limit_pages": 2097152,
            "mappings": 12,
            "max_iotlb_entries": 2048,
            "dirty_tracking": {
                "page_size": 4096,
                "ranges": 2,
                "pages": 1048576
            },
            "queues": [ {
                    "index": 0,
                    "size": 256,
                    "enabled": true,
                    "running": true,
                    "requests": 10,
                    "bytes": 40960,
                    "errors": 1,
                    "poison": 0
                } ]
        }
    }
}
"#,
    );
}

/// The output of dev show about the client that waits to take blk0 over: text, JSON.
fn successor_shown(successor: &Successor) -> (String, String) {
    let setup = Setup::new(Fixture::simulators().with_blk().with_successor(successor.clone()));
    let plain = setup.vdpactl("-s dev show blk0").stdout;
    let line = plain.lines().find(|line| line.starts_with("  successor")).unwrap().to_owned();
    let json = setup.vdpactl("-s -j dev show blk0").stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    (line, json["dev"]["blk0"]["successor"].to_string())
}

#[test]
fn dev_show_a_successor_that_waits() {
    let (pid, comm) = (Some(4712), "new\tqemu".into());
    let waits = Successor { pid, comm, since: 1_795_245_170, status: Status(0xb), mappings: 3 };
    let (text, json) = successor_shown(&waits);
    assert_eq!(
        text,
        "  successor pid 4712 comm new\\tqemu since 2026-11-21T07:12:50Z status acknowledge|driver|features_ok \
         mappings 3"
    );
    assert_eq!(
        json,
        r#"{"pid":4712,"comm":"new\tqemu","since":"2026-11-21T07:12:50Z","status":"acknowledge|driver|features_ok","mappings":3}"#
    );
    // In another pid namespace, and after the open only.
    let (text, json) = successor_shown(&Successor { since: 1_795_245_170, ..Successor::default() });
    assert_eq!(text, "  successor since 2026-11-21T07:12:50Z status 0x0 mappings 0");
    assert_eq!(json, r#"{"since":"2026-11-21T07:12:50Z","status":"0x0","mappings":0}"#);
}

#[test]
fn dev_config_show() {
    let before = Setup::new(Fixture::simulators().with_net(None));
    before
        .vdpactl("dev config show vdpa0")
        .prints("vdpa0: mac 00:11:22:33:44:55 link up link_announce false mtu 1500 \n");
    let after = Setup::new(Fixture::simulators().with_net(Some(SIM_NET)).with_blk());
    after.vdpactl("dev config show vdpa0").prints(concat!(
        "vdpa0: mac 00:11:22:33:44:55 link up link_announce false mtu 1500 \n",
        "  negotiated_features MTU MAC STATUS CTRL_VQ CTRL_MAC_ADDR ANY_LAYOUT VERSION_1 ACCESS_PLATFORM\n",
    ));
    after.vdpactl("dev config show blk0").prints("blk0: \n");
    after.vdpactl("-j dev config show").prints(concat!(
        r#"{"config":{"vdpa0":{"mac":"00:11:22:33:44:55","link ":"up","link_announce ":false,"mtu":1500,"#,
        r#""negotiated_features":["MTU","MAC","STATUS","CTRL_VQ","CTRL_MAC_ADDR","ANY_LAYOUT","VERSION_1","#,
        r#""ACCESS_PLATFORM"]},"blk0":{}}}"#,
        "\n",
    ));
    after
        .vdpactl("-j -p dev config show blk0")
        .prints("{\n    \"config\": {\n        \"blk0\": {}\n    }\n}\n");
}

#[test]
fn block_attributes_are_shown_on_demand() {
    let setup = Setup::new(Fixture::simulators().with_blk());
    setup.vdpactl("-s dev config show blk0").prints(concat!(
        "blk0: capacity 262144 blk_size 512 phy_blk_exp 0 align_offset 0 min_io_size 1 opt_io_size 8 ",
        "max_discard_sec 2048 max_discard_seg 1 discard_sec_align 1 read_only false flush true \n",
        "  negotiated_features FLUSH VERSION_1 bit_40\n",
    ));
    setup.vdpactl("-s -j dev config show blk0").prints(concat!(
        r#"{"config":{"blk0":{"capacity":262144,"blk_size":512,"phy_blk_exp":0,"align_offset":0,"#,
        r#""min_io_size":1,"opt_io_size":8,"max_discard_sec":2048,"max_discard_seg":1,"discard_sec_align":1,"#,
        r#""read_only":false,"flush":true,"negotiated_features":["FLUSH","VERSION_1",40]}}}"#,
        "\n",
    ));
}

#[test]
fn several_pairs_stand_between_link_and_mtu() {
    let mut fixture = Fixture::simulators().with_net(None);
    if let Ok(config) = &mut fixture.devices[0].1
        && let vdpa_control::config::ClassConfig::Net(net) = &mut config.class
    {
        net.max_vq_pairs = Some(4);
        net.status = Some(2);
    }
    let setup = Setup::new(fixture);
    setup
        .vdpactl("dev config show")
        .prints("vdpa0: mac 00:11:22:33:44:55 link down link_announce true max_vq_pairs 4 mtu 1500 \n");
}

#[test]
fn a_dump_of_configurations_stops_at_an_unknown_class() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_fs().with_blk());
    let shown = setup.vdpactl("-j dev config show");
    assert_eq!(shown.code, Some(0), "{shown:?}");
    assert!(shown.stdout.contains("vdpa0") && !shown.stdout.contains("blk0"), "{shown:?}");
    setup.vdpactl("-j dev config show fs0").fails(
        "{\"config\":{}}\n",
        "Error: vdpa: unsupported device class.\nkernel answers: Operation not supported\n",
    );
    setup
        .vdpactl("dev show fs0")
        .prints("fs0: type <unknown type> mgmtdev vdpasim_fs vendor_id 0 max_vqs 2 max_vq_size 256\n");
}

#[test]
fn dev_vstats_show() {
    let setup = Setup::new(
        Fixture::simulators()
            .with_net(Some(SIM_NET))
            .with_blk()
            .with_vstats(0, None, &[("rx packets", 1), ("rx bytes", 64), ("rx overruns", 0)])
            .with_vstats(1, None, &[("tx packets", 3), ("tx bytes", 192), ("tx errors", 0), ("tx drops", 0)])
            .with_vstats(2, None, &[])
            .with_vstats(8, Some(4), &[]),
    );
    setup
        .vdpactl("dev vstats show vdpa0 qidx 1")
        .prints("vdpa0: queue_type tx tx packets 3 tx bytes 192 tx errors 0 tx drops 0 \n");
    setup
        .vdpactl("dev vstats show vdpa0 qidx 0")
        .prints("vdpa0: queue_type control_vq rx packets 1 rx bytes 64 rx overruns 0 \n");
    setup.vdpactl("dev vstats show vdpa0 qidx 2").prints("vdpa0: queue_type rx \n");
    setup.vdpactl("dev vstats show vdpa0 qidx 8").prints("vdpa0: queue_type control_vq \n");
    setup.vdpactl("-j dev vstats show vdpa0 qidx 1").prints(concat!(
        r#"{"vstats":{"vdpa0":{"queue_type":"tx","tx packets":3,"tx bytes":192,"tx errors":0,"tx drops":0}}}"#,
        "\n"
    ));
    let answer = |line: &str| {
        let outcome = setup.vdpactl(line);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        outcome.stderr.lines().find_map(|line| line.strip_prefix("kernel answers: ")).map(str::to_owned)
    };
    assert_eq!(answer("dev vstats show blk0 qidx 0").as_deref(), Some("Operation not supported"));
    assert_eq!(answer("dev vstats show vdpa0").as_deref(), Some("Invalid argument"));
    assert_eq!(answer("dev vstats show vdpa0 qidx 32769").as_deref(), Some("Numerical result out of range"));
    assert_eq!(answer("dev vstats show nosuch qidx 0").as_deref(), Some("No such device"));
}

#[test]
fn add_and_delete_say_nothing_when_they_succeed() {
    let setup = Setup::new(Fixture::simulators().with_blk());
    setup
        .vdpactl("dev add name b1 mgmtdev vdpasim_blk path /images/a direct on queues 4 readonly")
        .prints("");
    setup.vdpactl("-j dev add mgm vduse na v1 mac 00:11:22:33:44:55 mtu 1500 max_vqp 2").prints("");
    setup.vdpactl("dev del blk0 --force").prints("");
    setup.vdpactl("-f dev del blk0").fails_to_parse();
    setup.vdpactl("dev -f del blk0").prints("");
    assert_eq!(
        setup.log(),
        [
            "add b1 on vdpasim_blk path=/images/a direct=on queues=4 readonly=on",
            "add v1 on vduse mac=00:11:22:33:44:55 mtu=1500 max_vqp=2",
            "delete blk0 force true",
            "delete blk0 force true",
        ]
    );
}

/// As iproute2 6.15 on Linux 7.2: for a device that is not a network device there is a warning and a success.
#[test]
fn set_says_nothing_or_warns() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_blk());
    setup.vdpactl("dev set name vdpa0 mac 52:54:0:12:34:56").prints("");
    let warned = setup.vdpactl("-j dev set na blk0 mac 52:54:0:12:34:56");
    assert_eq!((warned.code, warned.stdout.as_str()), (Some(0), ""), "{warned:?}");
    assert_eq!(warned.stderr, "Warning: vdpa: blk0 device not supported.\n");
    setup.vdpactl("dev set name nosuch mac 52:54:0:12:34:56").fails("", NO_DEVICE);
    setup.vdpactl("dev set").fails("", "device name is not set.\n");
    setup.vdpactl("dev se name vdpa0").fails("", "Command \"se\" not found\n");
    assert_eq!(
        setup.log(),
        [
            "set vdpa0 mac 52:54:00:12:34:56",
            "set blk0 mac 52:54:00:12:34:56",
            "set nosuch mac 52:54:00:12:34:56"
        ]
    );
}

impl support::Outcome {
    #[track_caller]
    fn fails_to_parse(&self) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(2), ""), "{self:?}");
    }
}

#[test]
fn refusals_are_worded_as_iproute2_does() {
    let setup = Setup::new(Fixture::simulators().with_blk());
    setup.vdpactl("dev show nosuch").fails("", NO_DEVICE);
    setup.vdpactl("-j dev show nosuch").fails("{\"dev\":{}}\n", NO_DEVICE);
    setup.vdpactl("-jp dev show nosuch").fails("{\n    \"dev\": {}\n}\n", NO_DEVICE);
    setup.vdpactl("dev del nosuch").fails("", NO_DEVICE);
    setup.vdpactl("dev del blk0").fails(
        "",
        "Error: vdpa: device is in use.\nkernel answers: Device or resource busy\n\
         Stop the client, or delete it with --force.\n",
    );
    setup
        .vdpactl("dev add name blk0 mgmtdev vdpasim_blk")
        .fails("", "Error: vdpa: device exists already.\nkernel answers: File exists\n");
    setup.vdpactl("dev add name b1 mgmtdev vdpasim_blk colour blue").fails(
        "",
        "Error: vdpa: Some provided attributes are not supported: colour.\n\
         kernel answers: Operation not supported\n",
    );
    setup.vdpactl("dev add name b1 mgmtdev nosuch").fails(
        "",
        "Error: vdpa: Fail to find the specified management device.\n\
         kernel answers: No such device\n\
         \"vdpactl mgmtdev show\" lists the management devices that exist.\n",
    );
    // A name cannot select another path of the API.
    setup.vdpactl("dev show blk0/config").fails("", NO_DEVICE);
}

#[test]
fn words_may_be_abbreviated() {
    let setup = Setup::new(Fixture::simulators().with_blk().with_vstats(0, None, &[]));
    let blk0 = "blk0: type block mgmtdev vdpasim_blk vendor_id 0 max_vqs 1 max_vq_size 256\n";
    for line in ["dev show", "dev", "d", "d s", "de sh blk0", "dev list", "d l blk0"] {
        setup.vdpactl(line).prints(blk0);
    }
    for line in ["dev config", "dev config show", "d c s blk0", "dev conf l"] {
        setup.vdpactl(line).prints("blk0: \n");
    }
    assert_eq!(setup.vdpactl("m s").stdout, setup.vdpactl("mgmtdev list").stdout);
    assert!(setup.vdpactl("d d nosuch").stderr.contains("device not found"));
    // Only in full, as in iproute2.
    setup.vdpactl("dev vstat show vdpa0").fails("", "Command \"vstat\" not found\n");
    setup.vdpactl("dev vstats sh vdpa0").fails("", "Command \"sh\" not found\n");
}

#[test]
fn wrong_words_are_named() {
    let setup = Setup::new(Fixture::simulators());
    setup.vdpactl("foo").fails("", "Object \"foo\" not found\n");
    setup.vdpactl("dev foo").fails("", "Command \"foo\" not found\n");
    setup.vdpactl("mgmtdev foo").fails("", "Command \"foo\" not found\n");
    setup.vdpactl("dev config foo").fails("", "Command \"foo\" not found\n");
    setup.vdpactl("dev show a b").fails("", "Unknown option \"b\"\n");
    setup.vdpactl("dev show -f").fails("", "Unknown option \"--force\"\n");
    setup.vdpactl("dev del").fails("", "String parameter expected\n");
    setup.vdpactl("dev add name").fails("", "String parameter expected\n");
    setup.vdpactl("dev add name v0").fails("", "management device handle not set.\n");
    setup.vdpactl("dev add mgmtdev m").fails("", "device name is not set.\n");
    setup
        .vdpactl("dev add name v0 mgmtdev m mtu -1")
        .fails("", "mtu is \"-1\"; a number from 68 to 65535 is right\n");
    setup.vdpactl("-z dev show").fails_to_parse();
    assert!(setup.log().is_empty(), "{:?}", setup.log());
}

#[test]
fn help_lists_the_words_without_a_daemon() {
    let nowhere = std::path::Path::new("/nonexistent/control.sock");
    for (line, usage) in [
        ("", "Usage: vdpactl [ OPTIONS ] OBJECT { COMMAND | help }\n"),
        ("help", "Usage: vdpactl [ OPTIONS ] OBJECT { COMMAND | help }\n"),
        ("mgmtdev", "Usage: vdpactl mgmtdev show [ DEV ]\n"),
        ("mgmtdev help", "Usage: vdpactl mgmtdev show [ DEV ]\n"),
        ("dev help", "Usage: vdpactl dev show [ DEV ]\n"),
        ("dev config help", "Usage: vdpactl dev config show [ DEV ]\n"),
        ("dev vstats help", "Usage: vdpactl dev vstats show DEV [ qidx QUEUE_INDEX ]\n"),
    ] {
        let outcome = support::vdpactl(nowhere, line);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""), "{line}: {outcome:?}");
        assert!(outcome.stderr.starts_with(usage), "{line}: {outcome:?}");
    }
    let version = support::vdpactl(nowhere, "-V");
    assert_eq!(version.stdout, concat!("vdpactl ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn a_missing_daemon_is_named_with_its_socket() {
    let outcome = support::vdpactl(std::path::Path::new("/nonexistent/control.sock"), "-j dev show");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), "{\"dev\":{}}\n"), "{outcome:?}");
    assert!(outcome.stderr.contains("vdpad is not running: nobody listens on /nonexistent/control.sock"));
}
