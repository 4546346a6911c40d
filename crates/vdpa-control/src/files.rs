//! The configuration files of vdpad: `/etc/vdpad/vdpad.toml`, and `conf.d/*.toml` beside it.
//!
//! ```toml
//! [daemon]
//! front = "fuse"
//!
//! [[device]]
//! name = "disk0"
//! mgmtdev = "blk"
//! path = "/images/disk0.img"
//! direct = true
//! ```
//!
//! The keys of `[daemon]` are the long options of the program; those of a `[[device]]` are `name`, `mgmtdev`, and attributes. Files of
//! `conf.d` are read in the order of their names after the main one: their options come later, which is to say that they win.

use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::api::{AddRequest, Attrs, PASSED_ATTR};

/// Where the configuration is, unless the program is told otherwise.
pub const DEFAULT: &str = "/etc/vdpad/vdpad.toml";

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct At {
    /// The file.
    pub file: PathBuf,
    /// Its line, from 1.
    pub line: usize,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// An option of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonOption {
    /// Its long name, with dashes.
    pub name: String,
    /// Its value; `None` for a switch that is on.
    pub value: Option<String>,
    /// Where it is written.
    pub at: At,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// What is to be asked of the daemon.
    pub request: AddRequest,
    /// Where it is written.
    pub at: At,
}

/// Everything that is configured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Options, in order: of two with the same name the later one counts.
    pub options: Vec<DaemonOption>,
    /// Devices, in order.
    pub devices: Vec<Device>,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// A file or directory cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// Something in a file is not right.
    #[error("{at}: {what}")]
    Invalid {
        /// Where.
        at: At,
        /// What, and what would be right.
        what: String,
    },
}

impl Configuration {
    /// Reads the file at `path`, and the files of `conf.d` beside it. Relative paths of devices begin in the directory of their file.
    ///
    /// # Errors
    /// [`FileError`]; a main file that does not exist is none, and has nothing in it.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let mut all = Self::default();
        for file in files(path)? {
            let text = match fs::read_to_string(&file) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound && file == path => continue,
                Err(source) => return Err(FileError::Read { path: file, source }),
            };
            all.add(&file, &text)?;
        }
        Ok(all)
    }

    /// Adds the contents of a file.
    fn add(&mut self, file: &Path, text: &str) -> Result<(), FileError> {
        let reader = Reader { file, text };
        let document = DeTable::parse(text).map_err(|error| {
            reader.invalid(error.span().unwrap_or_default(), format!("this is no TOML: {}", error.message()))
        })?;
        for (key, value) in document.get_ref() {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("daemon", DeValue::Table(table)) => self.options.extend(reader.options(table)?),
                ("device", DeValue::Array(devices)) => {
                    for device in devices.iter() {
                        self.add_device(reader.device(device)?)?;
                    }
                }
                (name, _) => {
                    let what = format!("\"{name}\" is not known here; [daemon] and [[device]] are right");
                    return Err(reader.invalid(key.span(), what));
                }
            }
        }
        Ok(())
    }

    fn add_device(&mut self, device: Device) -> Result<(), FileError> {
        let name = &device.request.name;
        if let Some(first) = self.devices.iter().find(|other| other.request.name == *name) {
            let what = format!(
                "there is a device \"{name}\" already, at {}; each needs a name of its own",
                first.at
            );
            return Err(FileError::Invalid { at: device.at, what });
        }
        self.devices.push(device);
        Ok(())
    }

    /// The device with this name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.request.name == name)
    }
}

/// The main file, and those of `conf.d`.
fn files(path: &Path) -> Result<Vec<PathBuf>, FileError> {
    let directory = fragments(path);
    let mut found = match fs::read_dir(&directory) {
        Ok(entries) => entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| FileError::Read { path: directory, source })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(FileError::Read { path: directory, source }),
    };
    found.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    found.sort();
    found.insert(0, path.to_owned());
    Ok(found)
}

/// The directory `conf.d` beside the main file.
fn fragments(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("/")).join("conf.d")
}

/// Reads one file.
struct Reader<'a> {
    file: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn at(&self, span: &Range<usize>) -> At {
        let before = self.text.as_bytes().get(..span.start).unwrap_or(self.text.as_bytes());
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        At { file: self.file.to_owned(), line }
    }

    fn invalid(&self, span: Range<usize>, what: String) -> FileError {
        FileError::Invalid { at: self.at(&span), what }
    }

    fn options(&self, table: &DeTable<'_>) -> Result<Vec<DaemonOption>, FileError> {
        let mut options = Vec::new();
        for (key, value) in table {
            let (name, at) = (key.get_ref().replace('_', "-"), self.at(&key.span()));
            match value.get_ref() {
                DeValue::Boolean(true) => options.push(DaemonOption { name, value: None, at }),
                DeValue::Boolean(false) => {}
                DeValue::Array(values) => {
                    for value in values.iter() {
                        let value = Some(self.scalar(key.get_ref(), value)?);
                        options.push(DaemonOption { name: name.clone(), value, at: at.clone() });
                    }
                }
                _ => options.push(DaemonOption { name, value: Some(self.scalar(key.get_ref(), value)?), at }),
            }
        }
        Ok(options)
    }

    fn device(&self, device: &Spanned<DeValue<'_>>) -> Result<Device, FileError> {
        let wrong = |what: String| self.invalid(device.span(), what);
        let DeValue::Table(table) = device.get_ref() else {
            return Err(wrong("a device is a table; [[device]] is right".into()));
        };
        let (mut name, mut mgmtdev, mut attrs) = (None, None, Attrs::new());
        for (key, value) in table {
            let text = self.scalar(key.get_ref(), value)?;
            match key.get_ref().as_ref() {
                "name" => name = Some(text),
                "mgmtdev" => mgmtdev = Some(text),
                PASSED_ATTR if text != "off" => {
                    let what = "no file can have a descriptor; give what the daemon can open, or add the device by \"vdpactl dev add\"";
                    return Err(self.invalid(key.span(), what.into()));
                }
                attr => {
                    attrs.insert(attr, text).map_err(|error| self.invalid(key.span(), error.to_string()))?
                }
            }
        }
        let needed = |what, value: Option<String>| {
            value.ok_or_else(|| {
                wrong(format!("this device has no {what}; name = \"...\" and mgmtdev = \"...\" are needed"))
            })
        };
        attrs.resolve_paths(self.file.parent().unwrap_or(Path::new("/")));
        let (name, mgmtdev) = (needed("name", name)?, needed("mgmtdev", mgmtdev)?);
        Ok(Device { request: AddRequest { name, mgmtdev, attrs }, at: self.at(&device.span()) })
    }

    /// A value as the command line has it.
    fn scalar(&self, key: &str, value: &Spanned<DeValue<'_>>) -> Result<String, FileError> {
        match value.get_ref() {
            DeValue::String(text) => Ok(text.clone().into_owned()),
            DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().into()),
            DeValue::Float(number) => Ok(number.as_str().into()),
            DeValue::Boolean(true) => Ok("on".into()),
            DeValue::Boolean(false) => Ok("off".into()),
            other => {
                let what = format!(
                    "\"{key}\" is {}; a string, a decimal number, true or false is right",
                    other.type_str()
                );
                Err(self.invalid(value.span(), what))
            }
        }
    }
}

/// The file of `conf.d` in which a device is written that a command has made persistent.
#[must_use]
pub fn device_file(configuration: &Path, name: &str) -> PathBuf {
    fragments(configuration).join(format!("device-{name}.toml"))
}

/// Writes a device to [its file](device_file), in the place of what is there. Returns the file.
///
/// # Errors
/// Those of the file system; the former file is as it was then.
pub fn write_device(configuration: &Path, request: &AddRequest) -> io::Result<PathBuf> {
    let path = device_file(configuration, &request.name);
    fs::create_dir_all(fragments(configuration))?;
    // The extension keeps an unfinished file from being read.
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, device_text(request))?;
    fs::rename(&unfinished, &path)?;
    Ok(path)
}

/// A device as a file has it.
#[must_use]
pub fn device_text(AddRequest { name, mgmtdev, attrs }: &AddRequest) -> String {
    let pairs = [("name", name.as_str()), ("mgmtdev", mgmtdev)].into_iter().chain(attrs.iter());
    let lines = pairs.map(|(key, value)| format!("{} = {}\n", quoted_key(key), quoted(value)));
    std::iter::once("[[device]]\n".to_owned()).chain(lines).collect()
}

fn quoted_key(key: &str) -> String {
    let bare =
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if bare { key.to_owned() } else { quoted(key) }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let main = dir.path().join("vdpad.toml");
        (dir, main)
    }

    #[test]
    fn options_and_devices_of_all_files_in_order() {
        let (dir, main) = directory(&[
            (
                "vdpad.toml",
                "[daemon]\nfront = \"fuse\"\npoll_us = 10\nholder = true\n\n[[device]]\nname = \"a\"\nmgmtdev = \"blk\"\npath = \"a.img\"\ndirect = true\nqueues = 2\n",
            ),
            ("conf.d/20.toml", "[daemon]\npoll-us = 30\n"),
            ("conf.d/10.toml", "[[device]]\nname = \"b\"\nmgmtdev = \"sim-blk\"\n"),
            ("conf.d/ignored.txt", "nonsense"),
        ]);
        let all = Configuration::read(&main).unwrap();
        let options: Vec<_> = all
            .options
            .iter()
            .map(|option| (option.name.as_str(), option.value.as_deref(), option.at.line))
            .collect();
        assert_eq!(
            options,
            [
                ("front", Some("fuse"), 2),
                ("holder", None, 4),
                ("poll-us", Some("10"), 3),
                ("poll-us", Some("30"), 2)
            ]
        );
        let a = &all.device("a").unwrap().request;
        assert_eq!(a.mgmtdev, "blk");
        assert_eq!(a.attrs.get("path"), dir.path().join("a.img").to_str());
        assert_eq!((a.attrs.get("direct"), a.attrs.get("queues")), (Some("on"), Some("2")));
        let names: Vec<_> = all.devices.iter().map(|device| device.request.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
    }

    #[test]
    fn errors_name_file_line_and_what_is_right() {
        for (text, line, words) in [
            ("[daemon]\nfront = \n", 2, "this is no TOML"),
            ("\n[deamon]\n", 2, "\"deamon\" is not known here; [daemon] and [[device]] are right"),
            ("[[device]]\nname = \"a\"\n", 1, "this device has no mgmtdev"),
            ("[[device]]\nname = \"a\"\nmgmtdev = \"blk\"\nqueues = [1]\n", 4, "\"queues\" is array"),
            (
                "[[device]]\nname = \"a\"\nmgmtdev = \"b\"\n\n[[device]]\nname = \"a\"\nmgmtdev = \"b\"\n",
                5,
                "already, at",
            ),
        ] {
            let (_dir, main) = directory(&[("vdpad.toml", text)]);
            let error = Configuration::read(&main).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}:{line}: ", main.display())), "{error}");
            assert!(error.contains(words), "{error}");
        }
        let (_dir, main) = directory(&[]);
        assert_eq!(Configuration::read(&main).unwrap(), Configuration::default());
    }

    #[test]
    fn a_device_that_is_written_is_read_again() {
        let (_dir, main) = directory(&[]);
        let mut attrs = Attrs::new();
        attrs.insert("path", "/srv/a \"b\"\\c\n.img").unwrap();
        attrs.insert("direct", "on").unwrap();
        let request = AddRequest { name: "disk0".into(), mgmtdev: "blk".into(), attrs };
        let path = write_device(&main, &request).unwrap();
        assert_eq!(path, main.with_file_name("conf.d/device-disk0.toml"));
        let read = Configuration::read(&main).unwrap();
        let found = &read.device("disk0").unwrap().request;
        assert_eq!(found.attrs.get("path"), request.attrs.get("path"));
        assert_eq!(found.attrs.get("direct"), Some("on"));
    }
}
