//! A second process that has the same open device, in place of a client's child or successor.
//!
//! The suite starts its own program with `--child`. The device is the child's standard input, since a descriptor can be
//! passed there without unsafe code. A socket is its standard output. Commands and answers are lines:
//!
//! ```text
//! ioctl NUMBER HEX|null      ok HEX | error ERRNO      the bytes after the call
//! ready                      ok
//! write HEX                  ok COUNT | error ERRNO
//! map PATH                   ok UADDR | error ERRNO    maps a file for the rest of the child's life
//! ```

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use vdpa_core::Errno;
use vdpa_sys::vhost_vdpa::RawArg;

use crate::case::Stop;
use crate::device::Device;
use crate::inprocess::LocalFile;
use crate::memory::{PAGE, Region};
use crate::request::Request;

const PROGRAM: &str = "vdpa-conform";
/// How long the child may take to answer. It is shorter than the timeout of a case, so that the case can report the cause.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Finds the program to start as a second process: this program itself, or `vdpa-conform` in its directory or in the parent
/// of that (where cargo puts it for a test).
#[must_use]
pub fn program() -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    if own.file_name() == Some(OsStr::new(PROGRAM)) {
        return Some(own);
    }
    own.ancestors().skip(1).take(2).map(|directory| directory.join(PROGRAM)).find(|program| program.is_file())
}

/// The suite's handle of the second process, which ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Child {
    process: std::process::Child,
    lines: Option<BufReader<UnixStream>>,
    /// For a device in the suite's process: the device, with the child as caller. The suite makes the child's requests.
    local: Option<LocalFile>,
}

impl Child {
    /// Starts `program` with a duplicate of the device's descriptor.
    pub(crate) fn start(program: &Path, device: &Device) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(TIMEOUT))?;
        let input = match device.file() {
            Ok(file) => Stdio::from(file.as_fd().try_clone_to_owned()?),
            Err(_) => Stdio::null(),
        };
        let process = Command::new(program)
            .arg("--child")
            .stdin(input)
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        let local = device.local().map(|local| local.for_process(process.id()));
        let mut child = Self { process, lines: Some(BufReader::new(ours)), local };
        // An answer means that the exec is complete. Before that, the child does not have its final address space.
        child.exchange("ready").map(|_| child)
    }

    /// Sets the child's RLIMIT_MEMLOCK.
    pub(crate) fn limit_memlock(&self, pages: u64) -> Result<(), Stop> {
        let pid = i32::try_from(self.process.id()).unwrap_or(0);
        vdpa_sys::rlimit::set_memlock_of(pid, pages * PAGE)
            .map_err(|errno| Stop::CannotRun(format!("RLIMIT_MEMLOCK of a second process: {errno}")))
    }

    /// Has the child make a request without an argument.
    pub(crate) fn call(&mut self, request: Request) -> Result<Result<(), Errno>, Stop> {
        self.ioctl(request, None)
    }

    /// Has the child make a request whose argument is `bytes`.
    pub(crate) fn set(&mut self, request: Request, bytes: &[u8]) -> Result<Result<(), Errno>, Stop> {
        self.ioctl(request, Some(bytes))
    }

    fn ioctl(&mut self, request: Request, bytes: Option<&[u8]>) -> Result<Result<(), Errno>, Stop> {
        if let Some(local) = &self.local {
            let mut copy = bytes.map(<[u8]>::to_vec);
            return Ok(local.request(request, copy.as_mut().map_or(RawArg::Null, |copy| RawArg::Bytes(copy))));
        }
        let number = request.wire_number().unwrap_or(0);
        let argument = bytes.map_or_else(|| "null".to_owned(), hex);
        Ok(self.execute(&format!("ioctl {number} {argument}"))?.map(drop))
    }

    /// Has the child write bytes to the device.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<Result<usize, Errno>, Stop> {
        if let Some(local) = &self.local {
            return Ok(local.write(bytes));
        }
        let answer = self.execute(&format!("write {}", hex(bytes)))?;
        answer
            .map(|text| text.parse().map_err(|_| malformed_answer(&text)))
            .map_or_else(|e| Ok(Err(e)), |n| n.map(Ok))
    }

    /// Has the child map `region`, and returns its address there.
    pub(crate) fn map(&mut self, region: &Region) -> Result<u64, Stop> {
        let answer = self.execute(&format!("map {}", region.path()))?;
        let text =
            answer.map_err(|errno| Stop::CannotRun(format!("mapping in a second process: {errno}")))?;
        text.parse().map_err(|_| malformed_answer(&text))
    }

    fn execute(&mut self, command: &str) -> Result<Result<String, Errno>, Stop> {
        let line =
            self.exchange(command).map_err(|e| Stop::Failed(format!("second process: {command}: {e}")))?;
        match line.trim_end_matches('\n').split_once(' ') {
            Some(("ok", rest)) => Ok(Ok(rest.to_owned())),
            Some(("error", number)) => match number.parse() {
                Ok(number) => Ok(Err(Errno::from_raw(number))),
                Err(_) => Err(malformed_answer(&line)),
            },
            _ => Err(malformed_answer(&line)),
        }
    }

    fn exchange(&mut self, command: &str) -> io::Result<String> {
        let lines = self.lines.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        writeln!(lines.get_mut(), "{command}")?;
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without an answer"));
        }
        Ok(line)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The child ends at the end of its input. After waiting for it, its descriptor of the device is closed.
        drop(self.lines.take());
        let _ = self.process.wait();
    }
}

fn malformed_answer(text: &str) -> Stop {
    Stop::Failed(format!("second process: cannot read its answer {text:?}"))
}

/// Executes commands until the end of input: the main loop of the child, which `vdpa-conform --child` calls.
///
/// # Errors
/// If standard input and output are not those of a child, or if the suite has ended.
pub fn serve() -> io::Result<()> {
    let device = Device::from_fd(rustix::stdio::stdin().try_clone_to_owned()?);
    let socket = UnixStream::from(rustix::stdio::stdout().try_clone_to_owned()?);
    let mut answers = socket.try_clone()?;
    // Mappings remain until the child ends, as those of a real successor do.
    let mut regions = Vec::new();
    for line in BufReader::new(socket).lines() {
        let answer = match execute(&device, &line?, &mut regions) {
            Ok(text) => format!("ok {text}"),
            Err(errno) => format!("error {}", errno.raw()),
        };
        writeln!(answers, "{answer}")?;
    }
    Ok(())
}

fn execute(device: &Device, line: &str, regions: &mut Vec<Region>) -> Result<String, Errno> {
    let words: Vec<_> = line.split(' ').collect();
    match words.as_slice() {
        ["ready"] => Ok(String::new()),
        ["ioctl", number, "null"] => {
            let number = number.parse().map_err(|_| Errno::INVAL)?;
            device.raw(number, RawArg::Null).map(|()| String::new())
        }
        ["ioctl", number, bytes] => {
            let number = number.parse().map_err(|_| Errno::INVAL)?;
            let mut bytes = unhex(bytes).ok_or(Errno::INVAL)?;
            device.raw(number, RawArg::Bytes(&mut bytes)).map(|()| hex(&bytes))
        }
        ["write", bytes] => {
            device.write(&unhex(bytes).ok_or(Errno::INVAL)?).map(|written| written.to_string())
        }
        ["map", path] => {
            let region = Region::of_path(Path::new(path))?;
            let uaddr = region.uaddr();
            regions.push(region);
            Ok(uaddr.to_string())
        }
        _ => Err(Errno::NOSYS),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_after_encoding_and_decoding() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(unhex(&hex(&bytes)).unwrap(), bytes);
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
        assert_eq!(unhex("é"), None);
    }

    #[test]
    fn a_command_returns_the_result_of_the_device() {
        let device = Device::from_fd(std::fs::File::open("/dev/null").unwrap().into());
        let mut regions = Vec::new();
        assert_eq!(execute(&device, "ioctl 44801 null", &mut regions), Err(Errno::NOTTY));
        assert_eq!(execute(&device, "write 00", &mut regions), Err(Errno::BADF));
        assert_eq!(execute(&device, "dance", &mut regions), Err(Errno::NOSYS));
        let region = Region::new(1).unwrap();
        let uaddr: u64 =
            execute(&device, &format!("map {}", region.path()), &mut regions).unwrap().parse().unwrap();
        assert!(uaddr != 0 && uaddr != region.uaddr());
    }
}
