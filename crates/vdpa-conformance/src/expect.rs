//! Expectation files: the known deviations of one device, each with its reason.
//!
//! ```
//! use vdpa_conformance::expect::Expectations;
//!
//! let file = "# fuse\nfile.epoll: a FUSE file can always be polled\n";
//! let expected = Expectations::parse(file, &["file.epoll"]).unwrap();
//! assert_eq!(expected.reason("file.epoll"), Some("a FUSE file can always be polled"));
//! ```

use std::collections::BTreeMap;

use thiserror::Error;

/// The deviations that are known of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expectations {
    /// Reasons by case.
    cases: BTreeMap<String, String>,
    /// Reasons by group of cases, for those that cannot be run.
    groups: BTreeMap<String, String>,
}

/// What is wrong with an expectation file. Lines count from 1.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// A line is not `case-id: reason`.
    #[error("line {line}: not of the form `case-id: reason`: {text:?}")]
    Form {
        /// The line.
        line: usize,
        /// What it says.
        text: String,
    },
    /// A line names a case that does not exist.
    #[error("line {line}: there is no case {id:?}; `vdpa-conform --list` shows them")]
    UnknownCase {
        /// The line.
        line: usize,
        /// The name.
        id: String,
    },
    /// A case is listed twice.
    #[error("line {line}: case {id:?} is listed before")]
    Repeated {
        /// The line.
        line: usize,
        /// The case.
        id: String,
    },
}

impl Expectations {
    /// Reads a file: one `case-id: reason` per line, empty lines and those beginning with `#` left out. A line
    /// `group.*: reason` is for the cases of a group that cannot be run on the device, and excuses no failure.
    ///
    /// # Errors
    /// [`ParseError`], also for a case that is not among `known`: a file must not outlive what it speaks of.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, ParseError> {
        let mut expected = Self::default();
        for (index, text) in text.lines().enumerate() {
            let line = index + 1;
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let (id, reason) = text
                .split_once(':')
                .map(|(id, reason)| (id.trim(), reason.trim()))
                .filter(|(id, reason)| !id.is_empty() && !reason.is_empty())
                .ok_or_else(|| ParseError::Form { line, text: text.to_owned() })?;
            let (map, found) = match id.strip_suffix('*') {
                Some(group) => (&mut expected.groups, known.iter().any(|case| case.starts_with(group))),
                None => (&mut expected.cases, known.contains(&id)),
            };
            let key = id.trim_end_matches('*');
            if !found || key.is_empty() {
                return Err(ParseError::UnknownCase { line, id: id.to_owned() });
            }
            if map.insert(key.to_owned(), reason.to_owned()).is_some() {
                return Err(ParseError::Repeated { line, id: id.to_owned() });
            }
        }
        Ok(expected)
    }

    /// These and those of another file, which wins where both speak of a case.
    #[must_use]
    pub fn and(mut self, more: Self) -> Self {
        self.cases.extend(more.cases);
        self.groups.extend(more.groups);
        self
    }

    /// Why the device deviates in this case; `None` when it should not.
    #[must_use]
    pub fn reason(&self, id: &str) -> Option<&str> {
        self.cases.get(id).map(String::as_str)
    }

    /// Why this case cannot be run on the device; `None` when it should be.
    #[must_use]
    pub fn excuse(&self, id: &str) -> Option<&str> {
        let group = id.split_inclusive('.').next()?;
        self.reason(id).or_else(|| self.groups.get(group).map(String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_reasons_with_colons_and_leaves_comments_out() {
        let expected = Expectations::parse("\n# x\n a.b : since 6.12: no limit \n", &["a.b"]).unwrap();
        assert_eq!(expected.reason("a.b"), Some("since 6.12: no limit"));
        assert_eq!(expected.reason("a"), None);
    }

    #[test]
    fn a_group_excuses_what_cannot_be_run_only() {
        let known = ["data.read", "data.write", "file.open"];
        let expected = Expectations::parse("data.*: no disk\ndata.read: why", &known).unwrap();
        assert_eq!(expected.excuse("data.read"), Some("why"));
        assert_eq!(expected.excuse("data.write"), Some("no disk"));
        assert_eq!((expected.reason("data.write"), expected.excuse("file.open")), (None, None));
        for id in ["*", "nosuch.*"] {
            assert!(
                matches!(
                    Expectations::parse(&format!("{id}: x"), &known),
                    Err(ParseError::UnknownCase { .. })
                ),
                "{id}"
            );
        }
        let more = Expectations::parse("data.read: other\nfile.*: y", &known).unwrap();
        let both = expected.and(more);
        assert_eq!((both.reason("data.read"), both.excuse("file.open")), (Some("other"), Some("y")));
    }

    #[test]
    fn refuses_what_could_rot() {
        let known = ["a.b"];
        assert_eq!(
            Expectations::parse("a.b: x\na.c: y", &known),
            Err(ParseError::UnknownCase { line: 2, id: "a.c".to_owned() })
        );
        assert_eq!(
            Expectations::parse("a.b: x\na.b: y", &known),
            Err(ParseError::Repeated { line: 2, id: "a.b".to_owned() })
        );
        for text in ["a.b", "a.b:", ": x"] {
            assert!(
                matches!(Expectations::parse(text, &known), Err(ParseError::Form { line: 1, .. })),
                "{text}"
            );
        }
    }
}
