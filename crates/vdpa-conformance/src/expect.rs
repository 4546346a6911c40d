//! Expectation files: the known deviations of one device, each with its reason.
//!
//! ```text
//! file.epoll: a FUSE file can always be polled             the device deviates in this case
//! n/a net.*: it is a block device                          these cases, or this case, cannot be run on the device
//! not-run data.read-only-memory: it ends the daemon        this case must not be tried
//! max_iotlb_entries 64: the attribute says so              the device has this setting, which its cases are to find
//! ```
//!
//! The run fails if a line is no longer true: a case listed as deviating must deviate, and a case listed as `n/a` must be
//! impossible to run. A `n/a` line of a group is an exception: it applies to those of the group's cases that cannot be run.
//!
//! ```
//! use vdpa_conformance::expect::Expectations;
//!
//! let file = "# fuse\nfile.epoll: a FUSE file can always be polled\n";
//! let expected = Expectations::parse(file, &["file.epoll"]).unwrap();
//! assert_eq!(expected.deviation("file.epoll"), Some("a FUSE file can always be polled"));
//! ```

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use thiserror::Error;

/// The known deviations of a device: for each case, the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expectations {
    deviations: BTreeMap<String, String>,
    /// By case, or by group with its dot.
    inapplicable: BTreeMap<String, String>,
    not_run: BTreeMap<String, String>,
    max_iotlb_entries: Option<u32>,
}

/// Name of the setting [`Expectations::max_iotlb_entries`].
const IOTLB_ENTRIES: &str = "max_iotlb_entries";
/// Entries that a table can be expected to hold. The suite makes as many mappings.
const IOTLB_ENTRIES_RANGE: RangeInclusive<u32> = 2..=1 << 20;

/// Errors of an expectation file. Lines are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ParseError {
    /// A line is neither `case-id: reason`, with or without `n/a` or `not-run` before it, nor a setting.
    #[error(
        "line {line}: not of the form `[n/a |not-run ]case-id: reason` or `{IOTLB_ENTRIES} NUMBER: reason`: {text:?}"
    )]
    Form {
        /// Number of the line.
        line: usize,
        /// Text of the line.
        text: String,
    },
    /// A line names a case that does not exist.
    #[error("line {line}: there is no case {id:?}; `vdpa-conform --list` shows them")]
    UnknownCase {
        /// Number of the line.
        line: usize,
        /// Name of the case.
        id: String,
    },
    /// A case or a setting is listed twice.
    #[error("line {line}: {id:?} is listed before")]
    Repeated {
        /// Number of the second line.
        line: usize,
        /// Name of the case or the setting.
        id: String,
    },
    /// The number of a setting is none, or out of range.
    #[error(
        "line {line}: {IOTLB_ENTRIES} is {text:?} and should be a number from {} to {}",
        IOTLB_ENTRIES_RANGE.start(),
        IOTLB_ENTRIES_RANGE.end()
    )]
    Number {
        /// Number of the line.
        line: usize,
        /// What is there in place of the number.
        text: String,
    },
}

impl Expectations {
    /// Parses the text of a file. Empty lines and lines that begin with `#` are ignored.
    ///
    /// # Errors
    /// [`ParseError`], also for a case that is not in `known`, so that no line remains after its case was removed.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, ParseError> {
        let mut expected = Self::default();
        for (index, text) in text.lines().enumerate() {
            let text = text.trim();
            if !text.is_empty() && !text.starts_with('#') {
                expected.add(index + 1, text, known)?;
            }
        }
        Ok(expected)
    }

    fn add(&mut self, line: usize, text: &str, known: &[&str]) -> Result<(), ParseError> {
        let (what, reason) = text
            .split_once(':')
            .map(|(what, reason)| (what.trim(), reason.trim()))
            .filter(|(what, reason)| !what.is_empty() && !reason.is_empty())
            .ok_or_else(|| ParseError::Form { line, text: text.to_owned() })?;
        let (map, id) = match what.split_once(' ') {
            None => (&mut self.deviations, what),
            Some(("n/a", id)) => (&mut self.inapplicable, id),
            Some(("not-run", id)) => (&mut self.not_run, id),
            Some((IOTLB_ENTRIES, number)) => return self.set_iotlb_entries(line, number.trim()),
            Some(_) => return Err(ParseError::Form { line, text: text.to_owned() }),
        };
        let group = id.strip_suffix('*').filter(|group| what != id && group.ends_with('.'));
        let found = known.iter().any(|&case| group.map_or(case == id, |group| case.starts_with(group)));
        if !found {
            return Err(ParseError::UnknownCase { line, id: id.to_owned() });
        }
        match map.insert(group.unwrap_or(id).to_owned(), reason.to_owned()) {
            None => Ok(()),
            Some(_) => Err(ParseError::Repeated { line, id: id.to_owned() }),
        }
    }

    fn set_iotlb_entries(&mut self, line: usize, text: &str) -> Result<(), ParseError> {
        let number = text.parse().ok().filter(|number| IOTLB_ENTRIES_RANGE.contains(number));
        let number = number.ok_or_else(|| ParseError::Number { line, text: text.to_owned() })?;
        match self.max_iotlb_entries.replace(number) {
            None => Ok(()),
            Some(_) => Err(ParseError::Repeated { line, id: IOTLB_ENTRIES.to_owned() }),
        }
    }

    /// Adds the expectations of another file. If both have a line for a case or a setting, that of the other file applies.
    #[must_use]
    pub fn and(mut self, more: Self) -> Self {
        self.deviations.extend(more.deviations);
        self.inapplicable.extend(more.inapplicable);
        self.not_run.extend(more.not_run);
        self.max_iotlb_entries = more.max_iotlb_entries.or(self.max_iotlb_entries);
        self
    }

    /// Most entries of an IOTLB table of the device; `None` if no line says so, and it is the kernel's default.
    #[must_use]
    pub fn max_iotlb_entries(&self) -> Option<u32> {
        self.max_iotlb_entries
    }

    /// Why the device deviates in this case; `None` if it must not deviate.
    #[must_use]
    pub fn deviation(&self, id: &str) -> Option<&str> {
        self.deviations.get(id).map(String::as_str)
    }

    /// All deviations as case and reason, sorted by case.
    pub fn deviations(&self) -> impl Iterator<Item = (&str, &str)> {
        self.deviations.iter().map(|(id, reason)| (id.as_str(), reason.as_str()))
    }

    /// Why this case cannot be run on the device; `None` if it must be run.
    #[must_use]
    pub fn inapplicable(&self, id: &str) -> Option<&str> {
        let group = id.split_inclusive('.').next()?;
        self.inapplicable.get(id).or_else(|| self.inapplicable.get(group)).map(String::as_str)
    }

    /// Whether a line names this case, and not only its group, as inapplicable.
    #[must_use]
    pub(crate) fn names_inapplicable(&self, id: &str) -> bool {
        self.inapplicable.contains_key(id)
    }

    /// Why this case must not be tried on the device; `None` if it may be tried.
    #[must_use]
    pub fn not_run(&self, id: &str) -> Option<&str> {
        self.not_run.get(id).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_reasons_with_colons_and_leaves_comments_out() {
        let expected = Expectations::parse("\n# x\n a.b : since 6.12: no limit \n", &["a.b"]).unwrap();
        assert_eq!(expected.deviation("a.b"), Some("since 6.12: no limit"));
        assert_eq!(expected.deviation("a"), None);
    }

    #[test]
    fn a_group_applies_only_to_cases_that_cannot_be_run() {
        let known = ["data.read", "data.write", "file.open"];
        let expected = Expectations::parse(
            "n/a data.*: no disk\nn/a data.read: why\nnot-run file.open: ends it",
            &known,
        );
        let expected = expected.unwrap();
        assert_eq!(expected.inapplicable("data.read"), Some("why"));
        assert_eq!(expected.inapplicable("data.write"), Some("no disk"));
        assert_eq!((expected.deviation("data.write"), expected.inapplicable("file.open")), (None, None));
        assert_eq!(expected.not_run("file.open"), Some("ends it"));
        assert!(expected.names_inapplicable("data.read") && !expected.names_inapplicable("data.write"));
        for what in ["n/a *", "n/a nosuch.*", "data.*", "n/a data*", "not-run nosuch"] {
            let parsed = Expectations::parse(&format!("{what}: x"), &known);
            assert!(matches!(parsed, Err(ParseError::UnknownCase { .. })), "{what}: {parsed:?}");
        }
        let more = Expectations::parse("data.read: other\nn/a file.*: y", &known).unwrap();
        let both = expected.and(more);
        assert_eq!((both.deviation("data.read"), both.inapplicable("file.open")), (Some("other"), Some("y")));
        assert_eq!(both.deviations().collect::<Vec<_>>(), [("data.read", "other")]);
    }

    #[test]
    fn a_setting_is_a_number_in_its_range() {
        let parse = |text: &str| Expectations::parse(text, &[]);
        let one = parse("max_iotlb_entries 64: the attribute").unwrap();
        assert_eq!(one.max_iotlb_entries(), Some(64));
        assert_eq!(one.clone().and(Expectations::default()).max_iotlb_entries(), Some(64));
        assert_eq!(one.and(parse("max_iotlb_entries  2: x").unwrap()).max_iotlb_entries(), Some(2));
        assert_eq!(Expectations::default().max_iotlb_entries(), None);
        for number in ["0", "1", "-2", "1048577", "many", "64 65"] {
            let error = parse(&format!("max_iotlb_entries {number}: x")).unwrap_err();
            assert_eq!(error, ParseError::Number { line: 1, text: number.to_owned() });
            assert!(error.to_string().contains("a number from 2 to 1048576"), "{error}");
        }
        let twice = parse("max_iotlb_entries 64: x\nmax_iotlb_entries 64: x");
        assert_eq!(twice, Err(ParseError::Repeated { line: 2, id: "max_iotlb_entries".to_owned() }));
    }

    #[test]
    fn unknown_repeated_and_malformed_lines_are_refused() {
        let known = ["a.b"];
        assert_eq!(
            Expectations::parse("a.b: x\na.c: y", &known),
            Err(ParseError::UnknownCase { line: 2, id: "a.c".to_owned() })
        );
        assert_eq!(
            Expectations::parse("a.b: x\na.b: y", &known),
            Err(ParseError::Repeated { line: 2, id: "a.b".to_owned() })
        );
        for text in ["a.b", "a.b:", ": x", "never a.b: x"] {
            assert!(
                matches!(Expectations::parse(text, &known), Err(ParseError::Form { line: 1, .. })),
                "{text}"
            );
        }
    }
}
