//! Checks that every section of the specification that code or documents cite exists: for "uapi-spec 2.4", docs/uapi-spec.md
//! must have a section 2.4.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The text with which a citation begins.
const WORD: &str = "uapi-spec ";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// The section numbers of the specification, for example 1.6a of the heading "### 1.6a Ownership".
fn sections(specification: &str) -> BTreeSet<String> {
    let headings = specification.lines().filter_map(|line| line.trim_start_matches('#').strip_prefix(' '));
    let numbers = headings.filter_map(|heading| heading.split_whitespace().next());
    numbers
        .map(|number| number.trim_end_matches('.'))
        .filter(|number| number.starts_with(|first: char| first.is_ascii_digit()))
        .map(str::to_owned)
        .collect()
}

/// Splits a text into the section number with which it begins and the rest; `None` if it begins with no section number.
fn section(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != 'a').unwrap_or(text.len());
    let (number, _) = text.split_at(end);
    // A dot at the end belongs to the sentence and not to the number.
    let number = number.trim_end_matches('.');
    let starts = number.starts_with(|first: char| first.is_ascii_digit());
    starts.then(|| (number, text.split_at(number.len()).1))
}

/// The sections that a line cites. For "uapi-spec 3.2, 3.3 and 4.5 to 4.7" these are the four numbers in the text.
fn citations(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, _) in line.match_indices(WORD) {
        let mut rest = line.split_at(at + WORD.len()).1;
        while let Some((number, more)) = section(rest) {
            found.push(number);
            let joined = [", ", " and ", " to ", "/"].iter().find_map(|joint| more.strip_prefix(joint));
            let Some(next) = joined else { break };
            rest = next;
        }
    }
    found
}

/// Collects the source files and documents below `dir`.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && name != "target" {
                files(&path, found);
            }
        } else if ["rs", "md", "toml", "txt", "sh"]
            .iter()
            .any(|kind| path.extension().is_some_and(|e| e == *kind))
        {
            found.push(path);
        }
    }
}

#[test]
fn every_cited_section_exists() {
    let root = root();
    let sections = sections(&fs::read_to_string(root.join("docs/uapi-spec.md")).unwrap());
    let mut paths = Vec::new();
    files(&root, &mut paths);
    let mut cited = 0;
    let mut wrong = Vec::new();
    for path in paths {
        // This file has citations of sections that do not exist.
        if path.ends_with("tests/citations.rs") {
            continue;
        }
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (number, line) in text.lines().enumerate() {
            for section in citations(line) {
                cited += 1;
                if !sections.contains(section) {
                    wrong.push(format!("{}:{}: uapi-spec {section}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "sections that docs/uapi-spec.md does not have:\n{}", wrong.join("\n"));
    assert!(cited > 100, "only {cited} citations were found: does this test still see them?");
}

#[test]
fn citations_are_found_in_sentences() {
    assert_eq!(citations("as in the kernel (uapi-spec 3.3)."), ["3.3"]);
    assert_eq!(citations("uapi-spec 3.2, 3.3 and 4.5 to 4.7, which"), ["3.2", "3.3", "4.5", "4.7"]);
    assert_eq!(citations("uapi-spec 1.6a, 8.4. And uapi-spec 7 as a whole"), ["1.6a", "8.4", "7"]);
    assert_eq!(citations("uapi-spec 8.5, R2 to R7"), ["8.5"]);
    assert_eq!(citations("the uapi-spec and uapi-spec.md"), [""; 0]);
    let sections = sections("# Title\n## 2. Messages\n### 2.1 Layouts\n### 1.6a Owner\n");
    assert_eq!(sections.iter().map(String::as_str).collect::<Vec<_>>(), ["1.6a", "2", "2.1"]);
    assert!(citations("uapi-spec 2.7").iter().all(|cited| !sections.contains(*cited)));
}
