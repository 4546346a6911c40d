//! Completion of vdpactl in a real bash, with a server that has devices.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

use std::path::Path;
use std::process::Command;

use support::{Fixture, Setup, programs, run};

/// What bash offers at the end of `line`.
fn offers(setup: &Setup, line: &str) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist/completions/vdpactl.bash");
    let program = programs::program("vdpactl");
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let words: Vec<_> = line.split(' ').collect();
    let call = "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); _vdpactl; \
                [ ${#COMPREPLY[@]} = 0 ] || printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", call, "bash"]).arg(script).args(words);
    let output = run(command.env("PATH", path).env("VDPAD_SOCKET", &setup.socket));
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output:?}");
    output.stdout.lines().map(str::to_owned).collect()
}

#[test]
fn commands_attributes_and_names_of_devices_are_offered() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_blk());
    assert_eq!(offers(&setup, "vdpactl de"), ["dev", "demo"]);
    assert!(offers(&setup, "vdpactl ").contains(&"monitor".to_owned()));
    assert_eq!(offers(&setup, "vdpactl dev s"), ["show", "set"]);
    assert_eq!(offers(&setup, "vdpactl dev show "), ["vdpa0", "blk0"]);
    assert_eq!(offers(&setup, "vdpactl -s dev show b"), ["blk0"]);
    assert_eq!(offers(&setup, "vdpactl dev del v"), ["vdpa0"]);
    assert_eq!(offers(&setup, "vdpactl dev config show b"), ["blk0"]);
    assert_eq!(offers(&setup, "vdpactl dev add name x mgmtdev vdpasim"), ["vdpasim_net", "vdpasim_blk"]);
    assert_eq!(offers(&setup, "vdpactl dev add name x readonly "), ["on", "off"]);
    assert_eq!(offers(&setup, "vdpactl dev set name b"), ["blk0"]);
    assert_eq!(offers(&setup, "vdpactl dev set name blk0 si"), ["size"]);
    assert_eq!(offers(&setup, "vdpactl dev del --f"), ["--force"]);
    assert_eq!(offers(&setup, "vdpactl config s"), ["save"]);
    assert!(offers(&setup, "vdpactl nonsense ").is_empty());
}

#[test]
fn files_are_offered_for_paths() {
    let setup = Setup::new(Fixture::simulators());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.img"), "").unwrap();
    let line = format!("vdpactl dev add name x path {}/di", dir.path().display());
    assert_eq!(offers(&setup, &line), [format!("{}/disk.img", dir.path().display())]);
}

/// Without a daemon there are no names, and no error.
#[test]
fn without_a_daemon_nothing_is_said() {
    let setup = Setup::new(Fixture::simulators());
    let socket = setup.socket.clone();
    setup.shutdown();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dist/completions/vdpactl.bash");
    let call =
        "source \"$1\"; COMP_WORDS=(vdpactl dev show ''); COMP_CWORD=3; _vdpactl; echo \"${#COMPREPLY[@]}\"";
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", call, "bash"]).arg(script).env("VDPAD_SOCKET", socket);
    let output = run(&mut command);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (Some(0), "0\n", ""));
}
