//! `libvdpa-live`, installed and used as its readers do: by programs in C that are compiled outside of the tree.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/robust.rs"]
mod robust;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use robust::Vdpad;

/// What every program must compile with.
const STRICT: [&str; 6] = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-O1"];
const EXAMPLE: &str = include_str!("../../vdpa-live-c/examples/update.c");

fn source(name: &str) -> PathBuf {
    std::fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../vdpa-live-c").join(name)).unwrap()
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}{errors}", output.status);
    text
}

/// The library below a prefix of its own.
struct Installed(tempfile::TempDir);

impl Installed {
    fn new() -> Self {
        let to = tempfile::tempdir().unwrap();
        run(Command::new(source("install")).args(["--debug", "--prefix"]).arg(to.path()));
        Self(to)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn pkg_config(&self, arguments: &[&str]) -> Vec<String> {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_PATH", self.path("lib/pkgconfig")).args(arguments).arg("libvdpa-live");
        run(&mut command).split_whitespace().map(str::to_owned).collect()
    }

    /// Compiles a program with nothing but what `pkg-config` says, and returns it.
    fn compile(&self, name: &str, compiler: &str, options: &[&str], source: &Path) -> PathBuf {
        let program = self.path(name);
        let mut command = Command::new(compiler);
        command
            .current_dir(self.0.path())
            .arg("-std=c11")
            .args(STRICT)
            .args(options)
            .arg(source)
            .arg("-o")
            .arg(&program);
        run(command.args(self.pkg_config(&["--cflags", "--libs"])));
        program
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", self.path("lib"));
        command
    }
}

/// Whether a program is here; a line in the list of what was left out, if not.
fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !there {
        let reason = format!("SKIPPED: libvdpa-live: no {program}");
        eprintln!("{reason}");
        if let Some(path) = std::env::var_os("VDPA_SKIP_LOG") {
            let mut log = std::fs::File::options().append(true).create(true).open(path).unwrap();
            writeln!(log, "{reason}").unwrap();
        }
    }
    there
}

#[test]
fn what_is_installed_is_what_the_header_says() {
    if !have("pkg-config") {
        return;
    }
    let installed = Installed::new();
    let library = installed.path("lib/libvdpa-live.so");

    // Every symbol of the list, with its version, and no other.
    let text = run(Command::new("nm").args(["-D", "--defined-only", "--with-symbol-versions"]).arg(&library));
    let exported: BTreeSet<String> =
        text.lines().filter_map(|line| line.split_once(" T ")).map(|(_, name)| name.to_owned()).collect();
    let list = std::fs::read_to_string(source("libvdpa-live.map")).unwrap();
    let names = list.lines().filter_map(|line| line.trim().strip_suffix(';'));
    let listed: BTreeSet<String> = names
        .filter(|name| name.starts_with("vdpa_live_"))
        .map(|name| format!("{name}@@VDPA_LIVE_0.1"))
        .collect();
    assert_eq!(exported, listed);
    assert_eq!(text.lines().count(), listed.len() + 1, "and the version itself: {text}");
    for name in &listed {
        let page = installed.path("share/man/man3").join(name.replace("@@VDPA_LIVE_0.1", ".3"));
        assert!(page.is_file(), "{}", page.display());
    }
    let dynamic = run(Command::new("readelf").arg("-d").arg(&library));
    assert!(dynamic.contains("Library soname: [libvdpa-live.so.0.1]"), "{dynamic}");

    // In C and in C++, by both compilers.
    for (compiler, standard, language) in
        [("gcc", "c11", "c"), ("clang", "c11", "c"), ("g++", "c++17", "c++"), ("clang++", "c++17", "c++")]
    {
        if have(compiler) {
            let header = installed.path("include/vdpa-live.h");
            let mut command = Command::new(compiler);
            command.args(STRICT).arg(format!("-std={standard}")).args(["-fsyntax-only", "-x", language]);
            run(command.arg("-include").arg(header).arg("/dev/null"));
        }
    }

    // A program outside of the tree, with the shared library and with the static one.
    let program = installed.path("version.c");
    std::fs::write(&program, "#include <stdio.h>\n#include <vdpa-live.h>\nint main(void) { return puts(vdpa_live_version()) < 0; }\n").unwrap();
    let version = format!("{}\n", env!("CARGO_PKG_VERSION"));
    let dynamic = installed.compile("dynamic", "cc", &[], &program);
    assert_eq!(run(&mut installed.command(&dynamic)), version);
    assert_eq!(installed.pkg_config(&["--modversion"]).concat() + "\n", version);
    let mut command = Command::new("cc");
    command.arg(&program).arg("-o").arg(installed.path("static")).args(installed.pkg_config(&["--cflags"]));
    command.arg(installed.path("lib/libvdpa-live.a"));
    run(command
        .args(installed.pkg_config(&["--static", "--libs-only-l"]).iter().filter(|l| *l != "-lvdpa-live")));
    assert_eq!(run(&mut Command::new(installed.path("static"))), version);
}

#[test]
fn the_example_is_short() {
    assert!(EXAMPLE.lines().count() <= 200, "{} lines", EXAMPLE.lines().count());
}

mod heavy {
    use super::*;

    /// Verified I/O over updates by exec, roll-backs, transports and hand-overs; by both compilers, and under AddressSanitizer,
    /// which finds what is freed twice, used after that, or never.
    #[test]
    fn programs_in_c_replace_themselves() {
        if !have("pkg-config") {
            return;
        }
        let installed = Installed::new();
        let vdpad = Vdpad::start(Duration::from_secs(200));
        let image = vdpad.image("disk0", 8 << 20);
        let device = vdpad.add("disk0", "blk", &format!("path {}", image.display()));
        let sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
        let compilers =
            [("gcc", "gcc", &[][..]), ("clang", "clang", &[]), ("sanitized", "clang", &sanitized)];
        let mut updates = 0;
        for (name, compiler, options) in compilers {
            if !have(compiler) {
                continue;
            }
            let example = installed.path("update.c");
            std::fs::write(&example, EXAMPLE).unwrap();
            let update = installed.compile(&format!("update-{name}"), compiler, options, &example);
            let text = run(installed.command(&update).arg(&device).arg(&image).arg("5"));
            assert!(
                text.starts_with("5 updates, ") && text.ends_with(" blocks verified, nothing lost\n"),
                "{text}"
            );
            updates += 5;
            assert_eq!(vdpad.client().update("disk0").unwrap().updates, updates, "{name}");

            let options = [options, &["-Wno-unused-function"]].concat();
            let api = installed.compile(&format!("api-{name}"), compiler, &options, &source("tests/c/api.c"));
            let directory = tempfile::tempdir().unwrap();
            run(installed.command(&api).arg("texts").arg(directory.path()));
            for role in ["rolled-back", "transport", "hand-over"] {
                let text = run(installed.command(&api).arg(role).arg(&device).arg(&image));
                assert!(text.ends_with(&format!("{role}: as it should be\n")), "{name}: {text}");
            }
            // The transport and the hand-over.
            updates += 2;
            assert_eq!(vdpad.client().update("disk0").unwrap().updates, updates, "{name}");
        }
        assert!(updates > 0, "no compiler is here");
    }
}
