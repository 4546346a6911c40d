//! The committed header, list of symbols and manual page are those of the source. `VDPA_WRITE=1` writes them anew:
//! `scripts/make-c-header`.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/declarations.rs"]
mod declarations;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use declarations::Function;

fn crate_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(crate_file(name)).unwrap_or_default()
}

/// Compares a committed file with what it should be, or writes it.
fn is_current(name: &str, wanted: &str) {
    if std::env::var_os("VDPA_WRITE").is_some() {
        std::fs::write(crate_file(name), wanted).unwrap();
    }
    let there = read(name);
    let differs = there.lines().zip(wanted.lines()).position(|(there, wanted)| there != wanted);
    assert!(
        there == wanted,
        "{name} is not what the source says, from line {} on: run scripts/make-c-header",
        differs.map_or_else(|| there.lines().count().min(wanted.lines().count()), |at| at + 1)
    );
}

fn header() -> String {
    let config = cbindgen::Config::from_file(crate_file("cbindgen.toml")).unwrap();
    let bindings =
        cbindgen::Builder::new().with_crate(crate_file("")).with_config(config).generate().unwrap();
    let mut text = Vec::new();
    bindings.write(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn the_header_is_made_from_the_source() {
    is_current("include/vdpa-live.h", &header());
}

/// The list of the linker is all that the header declares, and so is what the library exports (`tests/c.rs`).
#[test]
fn every_function_of_the_header_is_in_the_list_of_symbols() {
    let functions = declarations::functions(&header());
    assert!(functions.len() > 50, "{}", functions.len());
    let mut names: Vec<&str> = functions.iter().map(|function| function.name.as_str()).collect();
    names.sort_unstable();
    let lines: String = names.iter().map(|name| format!("        {name};\n")).collect();
    let list = format!(
        "# What libvdpa-live exports. A function that is added later gets a node of its own, which names this one.\n\
         VDPA_LIVE_0.1 {{\n    global:\n{lines}    local:\n        *;\n}};\n"
    );
    is_current("libvdpa-live.map", &list);
}

/// Every function says what it does, and every exported one is declared: an attribute and no declaration would be a function
/// that cbindgen has left out.
#[test]
fn every_exported_function_is_declared_and_explained() {
    let declared: BTreeSet<String> = declarations::functions(&header())
        .into_iter()
        .map(|Function { name, comment, .. }| {
            assert!(comment.len() > 20, "{name} has no comment");
            assert!(!comment.contains("# Safety") && !comment.contains('`'), "{name}: {comment}");
            name
        })
        .collect();
    let mut exported = BTreeSet::new();
    for file in std::fs::read_dir(crate_file("src")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for part in text.split("#[unsafe(no_mangle)]").skip(1) {
            let name = part.split_once("fn ").unwrap().1;
            exported.insert(name.split('(').next().unwrap().to_owned());
        }
    }
    assert_eq!(declared, exported);
}

#[test]
fn the_manual_page_is_made_from_the_header() {
    is_current("man/libvdpa-live.3", &declarations::manual(&header(), env!("CARGO_PKG_VERSION")));
}
