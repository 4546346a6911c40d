//! Expectation files: the known deviations of one device, each with its reason.
//!
//! ```text
//! file.epoll: a FUSE file can always be polled             the device deviates in this case
//! n/a net.*: it is a block device                          these cases, or this case, cannot be run on the device
//! not-run data.read-only-memory: it ends the daemon        this case must not be tried
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

use thiserror::Error;

/// The known deviations of a device: for each case, the reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expectations {
    deviations: BTreeMap<String, String>,
    /// By case, or by group with its dot.
    inapplicable: BTreeMap<String, String>,
    not_run: BTreeMap<String, String>,
}

/// Errors of an expectation file. Lines are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ParseError {
    /// A line is not `case-id: reason`, with or without `n/a` or `not-run` before it.
    #[error("line {line}: not of the form `[n/a |not-run ]case-id: reason`: {text:?}")]
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
    /// A case is listed twice.
    #[error("line {line}: case {id:?} is listed before")]
    Repeated {
        /// Number of the second line.
        line: usize,
        /// Name of the case.
        id: String,
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

    /// Adds the expectations of another file. If both have a line for a case, that of the other file applies.
    #[must_use]
    pub fn and(mut self, more: Self) -> Self {
        self.deviations.extend(more.deviations);
        self.inapplicable.extend(more.inapplicable);
        self.not_run.extend(more.not_run);
        self
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
