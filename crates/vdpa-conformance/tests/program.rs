//! Runs the program `vdpa-conform` as a user does and checks options, exit codes and files.

use std::path::Path;
use std::process::{Command, Output};

#[expect(clippy::unwrap_used, reason = "a test that cannot start the program fails")]
fn conform(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vdpa-conform")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn list_shows_cases_with_their_sections() {
    let output = conform(&["--list", "--filter", "owner.set-twice"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        text(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" "),
        "owner.set-twice 1.6a, 9.4 vector 8"
    );
}

#[test]
fn numbers_of_the_live_update_series_come_from_the_environment() {
    let run = |numbers: &str| {
        let arguments = ["--in-process", "--deny-skip", "--filter", "live.remap-batch"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdpa-conform"));
        command.args(arguments).env("VDPA_LIVE_NUMBERS", numbers).output().unwrap()
    };
    let refused = run("remap=6");
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("VDPA_LIVE_NUMBERS: remap=0x6"), "{}", text(&refused.stderr));
    let moved = run("new_owner=0xaf2f,remap=9,new_owner_bit=20,remap_bit=21");
    assert_eq!(moved.status.code(), Some(0), "{}", text(&moved.stdout));
}

#[test]
fn a_filter_that_matches_nothing_is_an_error() {
    let output = conform(&["--filter", "nonsense", "/dev/null"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no case contains nonsense"));
}

#[test]
fn a_file_that_is_no_device_is_an_error() {
    for (path, what) in [("/nonexistent", "cannot open"), ("/dev/null", "is this a vhost-vdpa device?")] {
        let output = conform(&[path]);
        assert_eq!(output.status.code(), Some(3), "{path}");
        assert!(text(&output.stderr).contains(what), "{}", text(&output.stderr));
    }
    assert_eq!(conform(&[]).status.code(), Some(2));
}

#[test]
fn an_expectation_of_an_unknown_case_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "no.such: reason\n").unwrap();
    let output = conform(&["--expect", file.path().to_str().unwrap(), "/dev/null"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("line 1: there is no case \"no.such\""),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn the_expectation_files_name_existing_cases() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("expect");
    let ids: Vec<_> = vdpa_conformance::cases::all().iter().map(|case| case.id).collect();
    let programs: Vec<_> = vdpa_conformance::cases::vduse().iter().map(|case| case.id).collect();
    let mut files = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let vduse = path.file_name().unwrap().to_string_lossy().starts_with("vduse-");
        vdpa_conformance::expect::Expectations::parse(&text, if vduse { &programs } else { &ids })
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        files += 1;
    }
    assert!(files >= 2);
}

/// What this project adds to the interface, a kernel's device does not have: its file must say so for every such case.
/// Most of these files are compared only where a kernel can be booted, so a forgotten line would show late.
#[test]
fn the_files_of_kernels_leave_out_what_only_the_daemon_has() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("expect");
    let cases = vdpa_conformance::cases::all();
    let ids: Vec<_> = cases.iter().map(|case| case.id).collect();
    let own: Vec<_> = ids.iter().filter(|id| id.starts_with("dirty")).collect();
    assert!(own.len() >= 13, "{own:?}");
    let mut files = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if !["kernel-", "module-", "posted-"].iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let expectations = vdpa_conformance::expect::Expectations::parse(&text, &ids).unwrap();
        for id in &own {
            assert!(
                expectations.inapplicable(id).is_some(),
                "{name} does not say that {id} is not applicable"
            );
        }
        files += 1;
    }
    assert!(files >= 20, "{files}");
}
