//! Programs without unsafe code cannot have memory overwritten that is not a device's.
//!
//! Each program in `soundness/` is compiled twice: as it is it must compile, with `--cfg unsound` it must fail with the error
//! code in its first line. So what fails is the line under that condition.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use vdpa_client::device::Device;
use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::inprocess::Node;
use vdpa_core::ops::VdpaOps;
use vdpa_core::testing::RamBlk;
use vdpa_core::types::{Asid, Perm};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::memfd;
use vdpa_sys::process::ThisProcess;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

/// The directory of this test's libraries, and the newest library of a crate in it.
fn library(name: &str) -> (PathBuf, PathBuf) {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    let age = |path: &PathBuf| path.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let files = std::fs::read_dir(&deps).unwrap().map(|entry| entry.unwrap().path());
    let is_it = |path: &PathBuf| {
        let file = path.file_name().unwrap().to_string_lossy();
        file.starts_with(&format!("lib{name}-")) && file.ends_with(".rlib")
    };
    let library = files.filter(is_it).max_by_key(age).unwrap();
    (deps, library)
}

fn compile(program: &Path, unsound: bool) -> (bool, String) {
    let out = tempfile::tempdir().unwrap();
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.arg(program).args(["--edition=2024", "--emit=metadata", "--error-format=short", "--out-dir"]);
    rustc.arg(out.path()).args(["--check-cfg=cfg(unsound)", "--cap-lints=allow"]);
    let (deps, library) = library("vdpa_client");
    rustc.arg("-L").arg(format!("dependency={}", deps.display()));
    rustc.arg("--extern").arg(format!("vdpa_client={}", library.display()));
    if unsound {
        rustc.arg("--cfg=unsound");
    }
    let output = rustc.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn an_address_is_no_memory_for_the_compiler() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/soundness");
    let mut programs: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    programs.sort();
    assert!(programs.len() >= 4, "{programs:?}");
    for program in programs {
        let text = std::fs::read_to_string(&program).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{}", program.display());
        let code = text.lines().next().unwrap().strip_prefix("// Unsound: ").unwrap();
        let (sound, messages) = compile(&program, false);
        assert!(sound, "{}: {messages}", program.display());
        let (unsound, messages) = compile(&program, true);
        let codes: Vec<_> = messages.lines().filter(|line| line.contains("error[")).collect();
        assert!(!unsound, "{} compiles", program.display());
        assert!(
            !codes.is_empty() && codes.iter().all(|line| line.contains(&format!("error[{code}]"))),
            "{}: {messages}",
            program.display()
        );
    }
}

/// What the compiler cannot see, since a request has the address as a number: a live `&[u8]` stays as it is.
#[test]
fn a_device_is_not_told_of_memory_that_was_not_made_for_it() {
    let bytes = vec![0x55_u8; 8192];
    let (uaddr, size) = ((bytes.as_ptr().addr() as u64).next_multiple_of(4096), 4096);
    let slice = &bytes[..];

    let node = Node::new(RamBlk::<LinuxHost>::on_host(64));
    let device = Device::from_ops(node.open(ThisProcess::default()).unwrap());
    let session = device.negotiate(Features::NONE).unwrap();
    assert_eq!(session.ops().dma_map(Asid(0), 0x1_0000, size, uaddr, Perm::RW), Err(Errno::FAULT));
    assert_eq!(session.ops().dma_map(Asid(0), 0x1_0000, size, uaddr, Perm::WO), Err(Errno::FAULT));

    // A file takes any message. It is written to by a request that the device would get, and by none that it must not get.
    let file = VhostVdpaFd::from_fd(memfd::create(c"device", 0, None).unwrap());
    assert_eq!(file.dma_map(Asid(0), 0, size, uaddr, Perm::RW), Err(Errno::FAULT));
    assert_eq!(file.dma_remap(Asid(0), 0, size, uaddr), Err(Errno::FAULT));
    let mut message = [0_u8; 72];
    message[0] = 2;
    message[16..24].copy_from_slice(&size.to_ne_bytes());
    message[24..32].copy_from_slice(&uaddr.to_ne_bytes());
    for kind in [2, 7, 99] {
        (message[32], message[33]) = (3, kind);
        assert_eq!(file.raw_write(&message), Err(Errno::FAULT), "message {kind}");
    }
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_size, 0, "the device has got nothing");
    assert!(slice.iter().all(|&byte| byte == 0x55));
}
