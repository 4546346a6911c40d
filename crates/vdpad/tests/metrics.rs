//! The metrics: what they count is what the load generator counts, over crashes and upgrades, and what is made of them exists.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/blk.rs"]
mod blk;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/skips.rs"]
mod skips;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vdpa_core::blk::kind;

use blk::{Blk, IOERR};
use held::{replace, start, upgrade};
use robust::disk::{self, Disk};
use robust::{Vdpad, eventually, run, vdpactl};
use skips::skip;

const MIB: u64 = 1 << 20;

/// Requests of the load; `just metrics 1000000`.
const REQUESTS: &str = "VDPA_TEST_REQUESTS";

fn exchange(mut stream: impl Read + Write, path: &str) -> (String, String) {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: vdpad\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    (head.to_owned(), body.to_owned())
}

fn scrape(vdpad: &Vdpad) -> String {
    let (head, body) = exchange(UnixStream::connect(vdpad.dir().join("control.sock")).unwrap(), "/metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(
        head.to_lowercase().contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(body.ends_with("# EOF\n"), "{body}");
    body
}

/// The samples, by name with labels.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

#[track_caller]
fn sample(text: &str, name: &str) -> u64 {
    let value = samples(text).get(name).copied();
    let value = value.unwrap_or_else(|| panic!("no sample {name} in\n{text}"));
    format!("{value}").parse().unwrap()
}

#[test]
fn counters_are_those_of_the_load_and_survive() {
    let vdpad = start(&[]);
    let device = vdpad.add_blk("d0", 64 * MIB, "packed on");
    let wanted = std::env::var(REQUESTS).map_or(20_000, |text| text.parse().unwrap());
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let (mut done, mut round, mut replaced) = (0_u64, 0, [replace as fn(&Vdpad), upgrade].into_iter());
    while done < wanted {
        let kind = if round % 2 == 0 { kind::OUT } else { kind::IN };
        for slot in 0..disk::SLOTS {
            disk.submit(slot, (kind, slot, round / 2));
        }
        disk.kick();
        done += u64::try_from(disk.settle().len()).unwrap();
        round += 1;
        if done > wanted / 4 && replaced.len() == 2 || done > wanted / 2 && replaced.len() == 1 {
            replaced.next().unwrap()(&vdpad);
        }
    }
    let text = scrape(&vdpad);
    let of = |name: &str| sample(&text, &format!("vdpad_queue_{name}"));
    assert_eq!(of("requests_total{device=\"d0\",queue=\"0\"}"), done);
    assert_eq!(of("transferred_bytes_total{device=\"d0\",queue=\"0\"}"), done * u64::from(disk::DATA));
    assert_eq!(of("errors_total{device=\"d0\",queue=\"0\",kind=\"failed\"}"), 0);
    assert_eq!((of("running{device=\"d0\",queue=\"0\"}"), of("running{device=\"d0\",queue=\"1\"}")), (1, 0));
    assert_eq!((sample(&text, "vdpad_crashes_total"), sample(&text, "vdpad_upgrades_total")), (1, 1));
    assert_eq!(sample(&text, "vdpad_device_open{device=\"d0\"}"), 1);
    assert!(sample(&text, "vdpad_device_pinned_bytes{device=\"d0\"}") >= disk::MEMORY_MIN);
    drop(disk);
    // Errors are those that the driver got.
    let mut blk = Blk::start(&device);
    for _ in 0..7 {
        assert_eq!(blk.write(0, 64 * MIB / 512, &[0; 512]), IOERR);
    }
    let text = scrape(&vdpad);
    assert_eq!(sample(&text, "vdpad_queue_errors_total{device=\"d0\",queue=\"0\",kind=\"failed\"}"), 7);
    assert_eq!(sample(&text, "vdpad_queue_requests_total{device=\"d0\",queue=\"0\"}"), done + 7);
}

#[test]
fn over_tcp_there_are_metrics_and_nothing_else() {
    let vdpad = start(&["--metrics", "127.0.0.1:0"]);
    vdpad.add_blk("d0", MIB, "");
    let address = |text: &str| -> Option<String> {
        let line = text.lines().rev().find(|line| line.contains("metrics are served over TCP"))?;
        Some(line.rsplit_once("address=")?.1.trim_matches(|c: char| !c.is_ascii_digit()).to_owned())
    };
    let connect = || TcpStream::connect(address(&vdpad.log()).unwrap()).unwrap();
    let (head, body) = exchange(connect(), "/metrics");
    assert!(
        head.starts_with("HTTP/1.1 200 ") && body.contains("vdpad_device_open{device=\"d0\"} 0"),
        "{head}\n{body}"
    );
    for path in ["/v1/devs", "/v1/version", "/"] {
        assert!(exchange(connect(), path).0.starts_with("HTTP/1.1 404 "), "{path}");
    }
    replace(&vdpad);
    let (head, _) = eventually("the next daemon serves them", || {
        Some(exchange(TcpStream::connect(address(&vdpad.log())?).ok()?, "/metrics"))
    });
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
}

fn dist(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist/monitoring").join(file)
}

/// Names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("vdpad_")).map(str::to_owned).collect()
}

#[test]
fn dashboard_and_rules_use_metrics_that_exist() {
    let vdpad = start(&[]);
    let device = vdpad.add_blk("d0", 64 * MIB, "");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    replace(&vdpad);
    disk.check(1);
    let text = scrape(&vdpad);
    let mut exist: BTreeSet<String> =
        samples(&text).keys().map(|name| name.split('{').next().unwrap().to_owned()).collect();
    // Nobody has reported an update yet.
    exist.insert("vdpad_device_last_update_seconds".into());
    let dashboard: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dist("vdpad-dashboard.json")).unwrap()).unwrap();
    let rules = std::fs::read_to_string(dist("vdpad.rules.yml")).unwrap();
    for (file, used) in [("dashboard", names(&dashboard.to_string())), ("rules", names(&rules))] {
        assert!(used.len() > 5, "{file}: {used:?}");
        let unknown: Vec<_> = used.difference(&exist).collect();
        assert!(unknown.is_empty(), "{file} uses {unknown:?}; there are {exist:?}");
    }
}

#[test]
fn promtool_accepts_metrics_and_rules() {
    let promtool = |args: &[&str], input: &str| {
        let mut child = Command::new("promtool")
            .args(args)
            .current_dir(dist(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .ok()?;
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        Some(child.wait_with_output().unwrap())
    };
    let Some(checked) = promtool(&["check", "rules", "vdpad.rules.yml"], "") else {
        return skip("promtool is missing (package prometheus): metrics and rules are not checked");
    };
    assert!(checked.status.success(), "{checked:?}");
    let tested = promtool(&["test", "rules", "vdpad.rules.test.yml"], "").unwrap();
    assert!(tested.status.success(), "{tested:?}");
    let vdpad = start(&[]);
    let device = vdpad.add_blk("d0", 64 * MIB, "");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    replace(&vdpad);
    disk.check(1);
    // "check metrics" reads the older format: there, a counter has its whole name also in the lines about it, and there is no
    // "info".
    let text = scrape(&vdpad);
    let kind = |line: &str| line.split(' ').nth(3).unwrap_or_default().to_owned();
    let kinds: BTreeMap<&str, String> = text
        .lines()
        .filter(|line| line.starts_with("# TYPE "))
        .map(|line| (line.split(' ').nth(2).unwrap(), kind(line)))
        .collect();
    let older: String = text
        .lines()
        .filter(|line| {
            !line.starts_with("# UNIT") && !line.starts_with("# EOF") && !line.contains("vdpad_build")
        })
        .map(|line| {
            let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
            if line.starts_with('#') && kinds.get(words[2].as_str()).is_some_and(|kind| kind == "counter") {
                words[2].push_str("_total");
            }
            words.join(" ") + "\n"
        })
        .collect();
    let checked = promtool(&["check", "metrics"], &older).unwrap();
    assert!(checked.status.success(), "{checked:?}\n{older}");
}

#[test]
fn top_and_monitor_show_what_happens() {
    let vdpad = start(&[]);
    let device = vdpad.add_blk("d0", 64 * MIB, "");
    let mut monitor = vdpactl(vdpad.dir());
    monitor.args(["-j", "monitor", "-d", "0.02", "-c", "250"]).stdout(Stdio::piped());
    let monitor = monitor.spawn().unwrap();
    let pause = || std::thread::sleep(std::time::Duration::from_millis(300));
    pause();
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(1);
    pause();
    vdpad.ctl("dev set name d0 size 128M").succeeds();
    pause();
    replace(&vdpad);
    pause();
    let top = run(vdpactl(vdpad.dir()).args(["top", "-d", "0.2", "-c", "2"]));
    assert_eq!(top.code, Some(0), "{top:?}");
    let rows: Vec<_> = top.stdout.lines().filter(|line| line.starts_with("d0 ")).collect();
    assert_eq!(rows.len(), 2, "{top:?}");
    assert!(
        rows[0].contains(" running ") && rows[0].contains(&format!("/{}", std::process::id())),
        "{top:?}"
    );
    drop(disk);
    vdpad.is_released("d0");
    pause();
    vdpad.ctl("dev del d0").succeeds();
    vdpad.add("s0", "sim-blk", "");
    let output = monitor.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let events: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let whats: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    for what in ["opened", "owner", "resized", "daemon_crashed", "closed", "deleted", "added"] {
        assert!(whats.contains(&what), "no {what} in {text}");
    }
    let resized = events.iter().find(|event| event["event"] == "resized").unwrap();
    assert_eq!((&resized["device"], &resized["to_bytes"]), (&"d0".into(), &(128 * MIB).into()));
}
