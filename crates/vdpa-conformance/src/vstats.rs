//! [`Vstats`]: how the suite reads a device's statistics. No request of the device file returns them, so a command of the
//! management interface does.

use std::fmt;
use std::marker::PhantomData;
use std::process::{Command, Stdio};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use vdpa_core::Errno;
use vdpa_core::types::QueueIndex;

use crate::case::Stop;
use crate::device::Device;

/// Names and values, in the device's order.
pub(crate) type Counters = Vec<(String, u64)>;

/// A command that prints the vendor statistics of one queue of the device as JSON if `qidx` and the queue's number are
/// appended to it: `vdpa -j dev vstats show NAME`, or the same command of vdpactl.
#[derive(Clone, Debug)]
pub struct Vstats {
    words: Vec<String>,
}

impl Vstats {
    /// The command with these words, of which the first one is the program.
    #[must_use]
    pub fn new(words: impl IntoIterator<Item = String>) -> Self {
        Self { words: words.into_iter().collect() }
    }

    fn counters(&self, queue: u16) -> Result<Counters, Stop> {
        let failed = |what: String| Stop::Failed(format!("{}: {what}", self.words.join(" ")));
        let (program, words) = self.words.split_first().ok_or_else(|| failed("no command".to_owned()))?;
        let output = Command::new(program)
            .args(words)
            .args(["qidx", &queue.to_string()])
            .stdin(Stdio::null())
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")));
        }
        parse(&output.stdout).ok_or_else(|| failed("not the statistics of one device, as JSON".to_owned()))
    }
}

impl From<&str> for Vstats {
    /// Splits a command line at whitespace.
    fn from(line: &str) -> Self {
        Self::new(line.split_whitespace().map(str::to_owned))
    }
}

/// Reads the statistics of a queue: with the command `vstats`, or directly if the device is in this process.
pub(crate) fn counters(vstats: Option<&Vstats>, device: &Device, queue: u16) -> Result<Counters, Stop> {
    if let Some(local) = device.local() {
        let refused = |errno: Errno| Stop::Failed(format!("vendor statistics of queue {queue}: {errno}"));
        return local.vendor_stats(QueueIndex(queue)).map_err(refused);
    }
    vstats.ok_or_else(|| Stop::CannotRun(MISSING.to_owned()))?.counters(queue)
}

/// Why a case that needs statistics is skipped.
pub(crate) const MISSING: &str = "no command that shows vendor statistics was given (--vstats)";

/// Parses the numbers of `{"vstats":{NAME:{...}}}`. Values that are not numbers are ignored.
fn parse(text: &[u8]) -> Option<Counters> {
    #[derive(Deserialize)]
    struct Root {
        vstats: Entries<Entries<Value>>,
    }
    let mut devices = serde_json::from_slice::<Root>(text).ok()?.vstats.0.into_iter();
    let (Some((_, device)), None) = (devices.next(), devices.next()) else { return None };
    Some(device.0.into_iter().filter_map(|(name, value)| Some((name, value.as_u64()?))).collect())
}

/// The entries of a JSON object in their order, which a map of `serde_json` keeps only with a feature that everybody would get.
struct Entries<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Visit<T> {
            type Value = Entries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Visit(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_in_their_order() {
        let text = br#"{"vstats":{"n0":{"queue_type":"tx","tx packets":3,"tx bytes":192,"tx errors":0}}}"#;
        let counter = |name: &str, value| (name.to_owned(), value);
        let want = vec![counter("tx packets", 3), counter("tx bytes", 192), counter("tx errors", 0)];
        assert_eq!(parse(text), Some(want));
        for text in ["", "{}", r#"{"vstats":{}}"#, r#"{"vstats":{"a":{},"b":{}}}"#, r#"{"vstats":{"a":1}}"#] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn the_error_of_a_command_has_its_name_and_its_output() {
        let counters = |line: &str| Vstats::from(line).counters(0).unwrap_err().to_string();
        assert!(counters("/nonexistent -j show").starts_with("/nonexistent -j show: "), "{}", counters("/x"));
        assert!(counters("ls /no/such/file").contains("/no/such/file"));
        assert!(counters("echo").ends_with("as JSON"));
        assert!(counters("").ends_with("no command"));
    }
}
