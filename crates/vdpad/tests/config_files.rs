//! The configuration files: options and devices, what runs against what is written, and what is written wrongly.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use held::{replace, upgrade};
use robust::disk::{self, Disk};
use robust::{Output, Vdpad, programs, run};

const LIMIT: Duration = Duration::from_secs(120);

/// A directory with a main file and an image.
fn directory(main: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().canonicalize().unwrap();
    fs::create_dir(path.join("conf.d")).unwrap();
    fs::write(path.join("vdpad.toml"), main).unwrap();
    for image in ["a.img", "b.img", "c.img"] {
        fs::File::create(path.join(image)).unwrap().set_len(64 << 20).unwrap();
    }
    (dir, path)
}

fn start(dir: &Path, args: &[&str]) -> Vdpad {
    let config = dir.join("vdpad.toml");
    let all = [&["--config", config.to_str().unwrap()], args].concat();
    Vdpad::start_at(dir, LIMIT, &all)
}

const MAIN: &str = "\
[daemon]
front = \"fuse\"
poll_us = 0

[[device]]
name = \"a\"
mgmtdev = \"blk\"
path = \"a.img\"
queues = 2
packed = true
";

#[track_caller]
fn says(output: &Output, lines: &[&str]) {
    assert_eq!(
        (output.code, output.stdout.lines().collect::<Vec<_>>()),
        (Some(0), lines.to_vec()),
        "{output:?}"
    );
}

/// They are the same after a crash, an upgrade, and a new start of the service.
#[test]
fn what_is_written_runs() {
    let (_outer, dir) = directory(MAIN);
    let vdpad = start(&dir, &["--holder"]);
    let mut disk = Disk::start(&vdpad.info("a").path, disk::MEMORY_MIN);
    assert_eq!(vdpad.info("a").max_vqs, 2);
    says(&vdpad.ctl("config diff"), &[]);
    // The daemons of a holder have the options that it was started with, whatever is written by then.
    fs::write(dir.join("vdpad.toml"), "[daemon]\nfront = \n").unwrap();
    replace(&vdpad);
    disk.check(1);
    upgrade(&vdpad);
    disk.check(2);
    let reload = vdpad.ctl("config reload");
    assert_eq!(reload.code, Some(1));
    assert!(reload.stderr.contains("vdpad.toml:2: this is no TOML"), "{reload:?}");
    fs::write(dir.join("vdpad.toml"), MAIN).unwrap();
    says(&vdpad.ctl("config diff"), &[]);
    drop(disk);
}

#[test]
fn what_runs_can_be_written_and_what_is_written_added() {
    let (_outer, dir) = directory(MAIN);
    let vdpad = start(&dir, &[]);
    let (b, c) = (dir.join("b.img"), dir.join("c.img"));
    vdpad.ctl(&format!("dev add name b mgmtdev blk path {} serial b-1", b.display())).succeeds();
    let diff = vdpad.ctl("config diff");
    assert_eq!((diff.code, diff.stdout.as_str()), (Some(1), "+ b: runs and is not written\n"), "{diff:?}");
    vdpad.ctl("config save").succeeds();
    assert!(fs::read_to_string(dir.join("conf.d/device-b.toml")).unwrap().contains("serial = \"b-1\"\n"));
    says(&vdpad.ctl("config diff"), &[]);
    vdpad.ctl(&format!("dev add name c mgmtdev blk path {} readonly persistent", c.display())).succeeds();
    let check = vdpad.ctl("config check");
    assert!(check.stdout.ends_with("options 2 devices 3\n"), "{check:?}");
    let again = vdpad.ctl(&format!("dev add name c mgmtdev blk path {} persistent", c.display()));
    assert!(again.stderr.contains("c is written already, at ") && again.code == Some(1), "{again:?}");
    // Added by hand, changed by hand.
    fs::write(
        dir.join("conf.d/20.toml"),
        "[[device]]\nname = \"n\"\nmgmtdev = \"sim-net\"\nmac = \"02:00:00:00:00:01\"\n",
    )
    .unwrap();
    fs::write(dir.join("vdpad.toml"), MAIN.replace("queues = 2", "queues = 3")).unwrap();
    let diff = vdpad.ctl("config diff");
    assert_eq!(
        diff.stdout, "~ a: queues running 2 written 3\n- n: is written and does not run\n",
        "{diff:?}"
    );
    says(
        &vdpad.ctl("config reload"),
        &[
            "n: added",
            "a: runs in another way than is written; its client keeps it until it is deleted and added",
        ],
    );
    assert_eq!(vdpad.info("a").max_vqs, 2);
    let save = vdpad.ctl("config save");
    assert!(
        save.code == Some(1) && save.stderr.contains("a (") && save.stderr.contains("vdpad.toml:5)"),
        "{save:?}"
    );
    vdpad.ctl("dev del c persistent").succeeds();
    assert!(!dir.join("conf.d/device-c.toml").exists());
    let del = vdpad.ctl("dev del n persistent");
    assert!(del.code == Some(1) && del.stderr.contains("n is still written, at "), "{del:?}");
    drop(vdpad);
    // The next start has what is written.
    let vdpad = start(&dir, &[]);
    let names: Vec<_> = vdpad.client().devices().unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["a", "n", "b"]);
    assert_eq!(vdpad.info("a").max_vqs, 3);
}

#[test]
fn errors_name_file_line_key_and_what_is_right() {
    let check = |text: &str, args: &[&str]| {
        let (_outer, dir) = directory(text);
        let mut command = Command::new(programs::program("vdpad"));
        command.arg("--config").arg(dir.join("vdpad.toml")).args(args);
        let output = run(&mut command);
        (output.code, output.stderr.replace(dir.to_str().unwrap(), "DIR"))
    };
    for (text, words) in [
        (
            "[daemon]\nfront = \"fuse\"\ncolour = 1\n",
            "DIR/vdpad.toml:3: \"colour\" is no option for a file; front, dir,",
        ),
        (
            "[daemon]\n\nworkers = 0\n",
            "DIR/vdpad.toml:3: workers: invalid value '0' for '--workers <N>': 0 is not in 1..=1024",
        ),
        ("[daemon]\nfront = \"block\"\n", "DIR/vdpad.toml:2: front: invalid value 'block'"),
        ("[daemon]\nholder = 3\n", "DIR/vdpad.toml:2: holder: unexpected value '3' for '--holder'"),
        ("[[device]]\nname = \"a\"\n", "DIR/vdpad.toml:1: this device has no mgmtdev"),
    ] {
        let (code, stderr) = check(text, &["--check"]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains(words), "{text:?}: {stderr}");
    }
    assert_eq!(check(MAIN, &["--check"]), (Some(0), String::new()));
    // The command line counts.
    assert_eq!(check("[daemon]\nworkers = 0\n", &["--check", "--workers", "2"]), (Some(0), String::new()));
    let missing = run(Command::new(programs::program("vdpad")).args([
        "--config",
        "/nonexistent/vdpad.toml",
        "--check",
    ]));
    assert_eq!(missing.stderr, "vdpad: --config /nonexistent/vdpad.toml: there is no such file\n");
    // A device that is refused.
    let (_outer, dir) = directory("\n[[device]]\nname = \"x\"\nmgmtdev = \"blk\"\npath = \"absent.img\"\n");
    let mut command = robust::command_at(&dir);
    command.arg("--config").arg(dir.join("vdpad.toml"));
    let output = run(&mut command);
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains(&format!("{}:2: of this device:", dir.join("vdpad.toml").display())),
        "{output:?}"
    );
    assert!(output.stderr.contains("device \"x\" was refused: cannot open"), "{output:?}");
}
