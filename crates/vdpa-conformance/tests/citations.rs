//! Every citation of the specification, docs/uapi-spec.md, names a section that exists.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// How code and documents name the specification: this, a space, and the number of a section.
const NAME: &str = "uapi-spec";
/// What joins the sections of one citation, as in "2.4 to 2.6, 4.6".
const SEPARATORS: [&str; 4] = [", ", "; ", " to ", " and "];

#[derive(Debug, PartialEq)]
struct Citation {
    /// Counted from 1.
    line: usize,
    section: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn specification() -> String {
    std::fs::read_to_string(root().join("docs/uapi-spec.md")).unwrap()
}

/// The numbers of its headings: `## 1. ioctls` is 1, `### 1.6a Ownership` is 1.6a.
fn sections(specification: &str) -> BTreeSet<&str> {
    let headings = specification.lines().filter(|line| line.starts_with("##"));
    headings
        .filter_map(|line| section_at(line.trim_start_matches(['#', ' '])))
        .map(|(section, _)| section)
        .collect()
}

/// The number at the start of `text`, and what follows it. A point at the end belongs to the sentence.
fn section_at(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(text.len());
    let section = text.get(..end)?.trim_end_matches('.');
    section
        .starts_with(|c: char| c.is_ascii_digit())
        .then(|| (section, text.get(section.len()..).unwrap_or_default()))
}

/// The sections at the start of `text`. Those that follow the first need a point: "8.5, 64 entries" cites one section.
fn list_at(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut next = section_at(text);
    while let Some((section, rest)) = next {
        found.push(section);
        next = SEPARATORS
            .iter()
            .find_map(|separator| section_at(rest.strip_prefix(separator)?))
            .filter(|(section, _)| section.contains('.'));
    }
    found
}

/// The text of a file with the line breaks inside comments and paragraphs replaced by one space, and for each byte of
/// it the line it comes from: a citation may continue on the next line.
fn joined(text: &str) -> (String, Vec<usize>) {
    let mut all = String::with_capacity(text.len());
    let mut lines = Vec::with_capacity(text.len());
    for (index, line) in text.lines().enumerate() {
        all.push_str(line.trim_start_matches(['/', '!', '#', '>', ' ']).trim_end());
        all.push(' ');
        lines.resize(all.len(), index + 1);
    }
    (all, lines)
}

fn citations(text: &str) -> Vec<Citation> {
    let (all, lines) = joined(text);
    let mut found = Vec::new();
    for (at, _) in all.match_indices(NAME) {
        let after = all.get(at + NAME.len() + 1..).unwrap_or_default();
        let line = lines.get(at).copied().unwrap_or_default();
        found
            .extend(list_at(after).into_iter().map(|section| Citation { line, section: section.to_owned() }));
    }
    found
}

/// All .rs and .md files of the repository, but for what is built or hidden.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_symlink() || name.starts_with('.') || name == "target" {
            continue;
        }
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
            found.push(path);
        }
    }
}

#[test]
fn every_citation_names_a_section() {
    let specification = specification();
    let sections = sections(&specification);
    let (mut paths, mut seen, mut wrong) = (Vec::new(), 0, Vec::new());
    files(&root(), &mut paths);
    paths.sort();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        for Citation { line, section } in citations(&text) {
            seen += 1;
            if !sections.contains(section.as_str()) {
                let path = path.strip_prefix(root()).unwrap_or(&path).display();
                wrong.push(format!("{path}:{line}: {NAME} {section}"));
            }
        }
    }
    assert!(wrong.is_empty(), "no such section of docs/uapi-spec.md:\n{}", wrong.join("\n"));
    assert!(seen > 100, "only {seen} citations found: did their form change?");
}

#[test]
fn the_specification_refers_to_its_own_sections() {
    let specification = specification();
    let sections = sections(&specification);
    let (all, lines) = joined(&specification);
    for (at, _) in all.match_indices('§') {
        let referred = all.get(at + '§'.len_utf8()..).and_then(section_at);
        let (section, _) =
            referred.unwrap_or_else(|| panic!("docs/uapi-spec.md:{}: § without a number", lines[at]));
        assert!(sections.contains(section), "docs/uapi-spec.md:{}: §{section}", lines[at]);
    }
}

#[test]
fn cases_and_requests_cite_sections_that_exist() {
    let specification = specification();
    let sections = sections(&specification);
    for case in vdpa_conformance::cases::all() {
        let requests = case.covers.iter().map(|request| (request.name, request.spec));
        for (what, cited) in requests.chain([(case.id, case.spec)]) {
            let list = list_at(cited);
            assert!(!list.is_empty(), "{what} cites no section: {cited}");
            for section in list {
                assert!(
                    sections.contains(section),
                    "{what}: there is no section {section} in docs/uapi-spec.md"
                );
            }
        }
    }
}

#[test]
fn citations_are_found_in_lists_and_over_line_breaks() {
    let found = |text: &str| -> Vec<(usize, String)> {
        citations(text).into_iter().map(|citation| (citation.line, citation.section)).collect()
    };
    let expected = |list: &[(usize, &str)]| -> Vec<(usize, String)> {
        list.iter().map(|(line, section)| (*line, (*section).to_owned())).collect()
    };
    assert_eq!(found(&format!("as in {NAME} 1.6a.")), expected(&[(1, "1.6a")]));
    assert_eq!(
        found(&format!("\n/// ({NAME} 2.4 to 2.6, 4.6; 8.5, R5)")),
        expected(&[(2, "2.4"), (2, "2.6"), (2, "4.6"), (2, "8.5")])
    );
    assert_eq!(found(&format!("    /// x ({NAME}\n    /// 77.1, 64 entries)")), expected(&[(1, "77.1")]));
    assert_eq!(found(&format!("the specification ({NAME})")), expected(&[]));
}
