//! Plain lines, or JSON in the layout of iproute2.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};
use serde_json::{Map, Value};

use crate::failure::Failure;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Plain lines.
    Plain,
    /// One line.
    Json,
    /// Several lines, indented by 4.
    PrettyJson,
}

/// An entry of the output: its text, and its JSON member.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Key of the member.
    pub(crate) name: String,
    /// The lines, each with a newline at its end.
    pub(crate) plain: String,
    /// Value of the member.
    pub(crate) json: Map<String, Value>,
}

/// Prints `entries` under `section`. If they are an error, prints an empty section and returns the error.
///
/// iproute2 opens the section before it sends its request, and closes it in any case, so its JSON has an empty section after an
/// error as well (uapi-spec 7.4).
pub(crate) fn section(
    format: Format,
    section: &str,
    entries: Result<Vec<Entry>, Failure>,
) -> Result<(), Failure> {
    let (entries, outcome) = match entries {
        Ok(entries) => (entries, Ok(())),
        Err(failure) => (Vec::new(), Err(failure)),
    };
    let mut stdout = io::stdout().lock();
    let written = match format {
        Format::Plain => entries.iter().try_for_each(|entry| stdout.write_all(entry.plain.as_bytes())),
        Format::Json => json(&mut stdout, section, entries, CompactFormatter),
        Format::PrettyJson => json(&mut stdout, section, entries, Iproute2::default()),
    };
    outcome.and(written.and_then(|()| stdout.flush()).map_err(Failure::Output))
}

fn json(out: &mut impl Write, section: &str, entries: Vec<Entry>, layout: impl Formatter) -> io::Result<()> {
    let members: Map<_, _> =
        entries.into_iter().map(|entry| (entry.name, Value::Object(entry.json))).collect();
    let document = Map::from_iter([(section.to_owned(), Value::Object(members))]);
    document.serialize(&mut Serializer::with_formatter(&mut *out, layout))?;
    out.write_all(b"\n")
}

/// The pretty layout of iproute2: objects on several lines, arrays of scalars on one line: `[ "a","b" ]`.
#[derive(Default)]
struct Iproute2 {
    depth: usize,
    /// Whether the object or array that ends now has members.
    filled: bool,
}

impl Iproute2 {
    fn newline<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        write!(out, "\n{:indent$}", "", indent = self.depth * 4)
    }
}

impl Formatter for Iproute2 {
    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(b"{")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(b",")?;
        }
        self.newline(out)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _out: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.newline(out)?;
        }
        out.write_all(b"}")
    }

    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(b"[ ")
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _out: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth -= 1;
        out.write_all(if self.filled { b" ]" } else { b"]" })
    }
}

/// Appends to a plain text. Writing to a string does not fail.
macro_rules! put {
    ($text:expr, $($arg:tt)*) => {{
        use std::fmt::Write as _;
        let _ = write!($text, $($arg)*);
    }};
}
pub(crate) use put;

#[cfg(test)]
mod tests {
    use super::*;

    fn pretty(value: &Value) -> String {
        let mut out = Vec::new();
        value.serialize(&mut Serializer::with_formatter(&mut out, Iproute2::default())).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_layout_is_that_of_ip_json_pretty() {
        let value =
            serde_json::json!([{"flags": ["UP", "LOWER"], "empty": [], "addr": [{"a": 1}, {"b": 2}]}]);
        // `ip -j -p addr show lo` prints this shape.
        let expected = r#"[ {
        "flags": [ "UP","LOWER" ],
        "empty": [ ],
        "addr": [ {
                "a": 1
            },{
                "b": 2
            } ]
    } ]"#;
        assert_eq!(pretty(&value), expected);
        assert_eq!(pretty(&serde_json::json!({"dev": {}})), "{\n    \"dev\": {}\n}");
    }
}
