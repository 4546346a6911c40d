//! The plan of an update: what it carries, by which way, and its time limits.

use std::collections::HashSet;
use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, accessat, fstat};
use serde::{Deserialize, Serialize};
use vdpa_core::Errno;
use vdpa_sys::exec::spawn;

use super::{Cancel, Cause, PID_VARIABLE, SOCKET_VARIABLE, STATE_VARIABLE, Strategy, reaper, steps};
use crate::state::{Section, Sections, v2};

/// Default of [`Plan::deadline`].
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Default of [`Plan::prepare_timeout`].
pub const PREPARE_TIMEOUT: Duration = Duration::from_secs(30);

/// Default of [`Plan::grace`].
pub const GRACE: Duration = Duration::from_secs(2);

/// The way in which devices get from the predecessor to the successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// This process execs the new image. It keeps its process id, its children and its pinned buffers.
    Exec,
    /// This process starts the new image as its child. The child takes the devices over when it is ready.
    Fork,
    /// A process that already runs takes the devices over, through a Unix socket.
    HandOver,
}

impl Way {
    /// All.
    pub const ALL: [Self; 3] = [Self::Exec, Self::Fork, Self::HandOver];

    /// Its name in commands, reports and saved state.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Fork => "fork",
            Self::HandOver => "hand-over",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Way {
    type Err = UnknownWay;

    fn from_str(name: &str) -> Result<Self, UnknownWay> {
        Self::ALL.into_iter().find(|w| w.name() == name).ok_or_else(|| UnknownWay { name: name.to_owned() })
    }
}

/// The name of a way could not be parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" is no way to update; there are exec, fork and hand-over")]
pub struct UnknownWay {
    /// The text that is no way.
    pub name: String,
}

/// A [`Way`] with its parameters.
#[derive(Debug)]
#[non_exhaustive]
pub enum Via {
    /// Exec this image in this process.
    Exec(Image),
    /// Start this image as a child.
    Fork(Image),
    /// Hand over to the process at the other end of the socket, which calls [`Incoming::receive`](super::Incoming::receive).
    HandOver(UnixStream),
}

impl Via {
    /// The way without its parameters.
    #[must_use]
    pub const fn way(&self) -> Way {
        match self {
            Self::Exec(_) => Way::Exec,
            Self::Fork(_) => Way::Fork,
            Self::HandOver(_) => Way::HandOver,
        }
    }
}

/// The program that replaces this one: path, arguments, environment.
#[derive(Clone, Debug)]
pub struct Image {
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
}

impl Image {
    /// The file `path`, with the arguments and the environment of this process. The variables of this library are left out.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let own = [STATE_VARIABLE, PID_VARIABLE, SOCKET_VARIABLE, reaper::VARIABLE];
        Self {
            path: path.into(),
            args: std::env::args_os().collect(),
            env: std::env::vars_os().filter(|(name, _)| own.iter().all(|own| name != own)).collect(),
        }
    }

    /// Replaces all arguments; the first is the name of the program (`argv[0]`).
    #[must_use]
    pub fn args<S: Into<OsString>>(self, args: impl IntoIterator<Item = S>) -> Self {
        Self { args: args.into_iter().map(Into::into).collect(), ..self }
    }

    /// Removes all variables of the environment.
    #[must_use]
    pub fn no_env(self) -> Self {
        Self { env: Vec::new(), ..self }
    }

    /// Adds or replaces a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        self.env.retain(|(present, _)| *present != name);
        self.env.push((name, value.into()));
        self
    }

    /// Checks that the file exists and may be executed, and that no string has a NUL byte.
    pub(super) fn check(&self) -> Result<(), Cause> {
        let unusable = |source: std::io::Error| Cause::Image { path: self.path.clone(), source };
        let metadata = std::fs::metadata(&self.path).map_err(unusable)?;
        if !metadata.is_file() {
            return Err(unusable(std::io::Error::other("it is not a regular file")));
        }
        accessat(CWD, &self.path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|e| unusable(e.into()))?;
        self.strings().map(drop)
    }

    /// The arguments of execve: path, arguments, environment.
    pub(super) fn strings(&self) -> Result<(CString, Vec<CString>, Vec<CString>), Cause> {
        let text = |bytes: Vec<u8>, what| CString::new(bytes).map_err(|_| Cause::Nul { what });
        let path = text(self.path.as_os_str().as_bytes().to_vec(), "path")?;
        let args = self.args.iter().map(|a| text(a.clone().into_vec(), "argument"));
        let env = self.env.iter().map(|(name, value)| text(variable(name, value), "environment"));
        Ok((path, args.collect::<Result<_, _>>()?, env.collect::<Result<_, _>>()?))
    }

    /// Asks the kernel to read the image into the page cache, so that the switch does not wait for a disk.
    pub(super) fn prefetch(&self) {
        if let Ok(file) = std::fs::File::open(&self.path) {
            // Only advice: an error changes nothing but the time of the switch.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed);
        }
    }

    /// Starts it as a child that inherits `socket` and finds it by [`SOCKET_VARIABLE`].
    pub(super) fn start(&self, socket: OwnedFd) -> Result<Child, Cause> {
        let system = |e: rustix::io::Errno| Cause::System {
            action: "look at the socket of the successor",
            source: Errno::from_raw(e.raw_os_error()),
        };
        let inode = fstat(&socket).map_err(system)?.st_ino;
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        command.env_clear().envs(self.env.iter().map(|(name, value)| (name, value)));
        command.env(SOCKET_VARIABLE, format!("{}:{inode}", socket.as_raw_fd()));
        spawn(&mut command, vec![socket]).map_err(|source| Cause::Image { path: self.path.clone(), source })
    }
}

fn variable(name: &OsStr, value: &OsStr) -> Vec<u8> {
    [name.as_bytes(), b"=", value.as_bytes()].concat()
}

/// What an update passes to the successor, and how.
///
/// ```
/// use std::time::Duration;
///
/// use vdpa_client::state::Section;
/// use vdpa_client::update::{Plan, Strategy};
///
/// let plan = Plan::new()
///     .strategy_of("net0", Strategy::Reset)
///     .section(Section::new("my-vmm/config", 4, b"known before".to_vec()))
///     .late_section("my-vmm/cpu", 2, false)
///     .descriptor("log", std::io::stderr())
///     .deadline(Duration::from_millis(500));
/// ```
#[derive(Debug)]
pub struct Plan {
    pub(super) strategy: Option<Strategy>,
    strategies: Vec<(String, Strategy)>,
    pub(super) sections: Sections,
    pub(super) late: Vec<v2::Late>,
    pub(super) descriptors: Vec<(String, OwnedFd)>,
    /// The first descriptor that could not be copied; reported by prepare.
    pub(super) broken: Option<(String, Errno)>,
    pub(super) deadline: Option<Duration>,
    pub(super) grace: Duration,
    pub(super) prepare_timeout: Option<Duration>,
    pub(super) cancel: Option<Cancel>,
    pub(super) allowed_uid: Option<u32>,
    pub(super) dry_run: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self::new()
    }
}

impl Plan {
    /// A plan with no sections and no descriptors, the best strategy for each device, [`DEADLINE`] and [`GRACE`].
    #[must_use]
    pub const fn new() -> Self {
        Self {
            strategy: None,
            strategies: Vec::new(),
            sections: Sections::new(),
            late: Vec::new(),
            descriptors: Vec::new(),
            broken: None,
            deadline: Some(DEADLINE),
            grace: GRACE,
            prepare_timeout: Some(PREPARE_TIMEOUT),
            cancel: None,
            allowed_uid: None,
            dry_run: false,
        }
    }

    /// Uses this strategy for every device, instead of the best one that each offers.
    #[must_use]
    pub fn strategy(self, strategy: Strategy) -> Self {
        Self { strategy: Some(strategy), ..self }
    }

    /// Uses this strategy for one device. The last call for a name counts.
    #[must_use]
    pub fn strategy_of(mut self, device: &str, strategy: Strategy) -> Self {
        self.strategies.push((device.to_owned(), strategy));
        self
    }

    /// Adds state of the caller that is known now. The successor receives it before a device stops.
    #[must_use]
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// Announces a section that the caller will give to [`Prepared::switch`](super::Prepared::switch), so that a successor
    /// that does not know it can refuse before a device stops. An `optional` section may be missing at the switch.
    #[must_use]
    pub fn late_section(mut self, name: &str, version: u32, optional: bool) -> Self {
        self.late.push(v2::Late { name: name.to_owned(), version, optional });
        self
    }

    /// Passes an open file to the successor, under a name. The descriptor is duplicated, so the caller may close its own. If
    /// that fails, prepare returns [`Cause::Descriptor`].
    #[must_use]
    pub fn descriptor(mut self, name: &str, fd: impl AsFd) -> Self {
        match fd.as_fd().try_clone_to_owned() {
            Ok(fd) => self.descriptors.push((name.to_owned(), fd)),
            Err(e) => {
                let errno = Errno::from_raw(e.raw_os_error().unwrap_or(0));
                self.broken.get_or_insert_with(|| (name.to_owned(), errno));
            }
        }
        self
    }

    /// Limits the time from the beginning of the switch until the successor has the devices. After that the update is rolled
    /// back. Requests to a device and execve cannot be interrupted, so they may exceed it.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Removes the time limit of the switch.
    #[must_use]
    pub fn no_deadline(self) -> Self {
        Self { deadline: None, ..self }
    }

    /// Limits how long an aborted successor may take to release the devices; then it is killed. This process cannot take the
    /// devices back before that, so with a hanging successor the grace period is part of the downtime.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        Self { grace, ..self }
    }

    /// Limits how long prepare waits for the successor: for a program to start, read the state and map the memory. The default is
    /// [`PREPARE_TIMEOUT`]; the devices are driven meanwhile.
    #[must_use]
    pub fn prepare_timeout(self, time_out: Duration) -> Self {
        Self { prepare_timeout: Some(time_out), ..self }
    }

    /// Removes the time limit of prepare, for a successor that is started by hand.
    #[must_use]
    pub fn no_prepare_timeout(self) -> Self {
        Self { prepare_timeout: None, ..self }
    }

    /// Lets another thread cancel the prepare.
    #[must_use]
    pub fn cancel(self, cancel: &Cancel) -> Self {
        Self { cancel: Some(cancel.clone()), ..self }
    }

    /// Also allows a successor that runs as this user, besides root and the user of this process.
    #[must_use]
    pub fn allow_uid(self, uid: u32) -> Self {
        Self { allowed_uid: Some(uid), ..self }
    }

    /// Before an exec, starts the new image once as a child that receives the offer but no device. It must understand every
    /// section and map all memory. So errors are found before the exec, after which there is no way back. In the child,
    /// `take_over` returns [`Cause::DryRun`].
    #[must_use]
    pub fn dry_run(self) -> Self {
        Self { dry_run: true, ..self }
    }

    /// Devices with a strategy of their own. For a repeated name the last entry counts.
    pub(super) fn strategies(&self) -> impl Iterator<Item = (&str, Strategy)> {
        self.strategies.iter().map(|(device, strategy)| (device.as_str(), *strategy))
    }

    /// Checks the plan itself; `names` are those of the devices.
    pub(super) fn check(&self, mut names: Vec<&str>) -> Result<(), Cause> {
        if let Some((name, source)) = &self.broken {
            return Err(Cause::Descriptor { name: name.clone(), source: *source });
        }
        let present: HashSet<&str> = names.iter().copied().collect();
        if let Some((device, _)) = self.strategies().find(|(device, _)| !present.contains(device)) {
            return Err(Cause::UnknownDevice { name: device.to_owned(), present: names.join(", ") });
        }
        names.sort_unstable();
        if let Some(name) = steps::first_duplicate(&names) {
            return Err(Cause::DuplicateName { what: "device", name: (*name).to_owned() });
        }
        let mut names: Vec<&str> = self.descriptors.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        if let Some(name) = steps::first_duplicate(&names) {
            return Err(Cause::DuplicateName { what: "descriptor", name: (*name).to_owned() });
        }
        let sections = self.sections.iter().map(|s| s.name.as_str());
        let mut names: Vec<&str> = sections.chain(self.late.iter().map(|l| l.name.as_str())).collect();
        names.sort_unstable();
        match steps::first_duplicate(&names) {
            Some(name) => Err(Cause::DuplicateName { what: "section", name: (*name).to_owned() }),
            None => Ok(()),
        }
    }

    /// Checks that the sections given at the switch are those that were announced.
    pub(super) fn check_late(&self, late: &Sections) -> Result<(), Cause> {
        for section in late.iter() {
            let announced = self.late.iter().find(|l| l.name == section.name);
            if announced.is_none_or(|l| l.version != section.version || l.optional != section.optional) {
                return Err(Cause::Late {
                    name: section.name.clone(),
                    problem: "was not announced like this by Plan::late_section",
                });
            }
        }
        match self.late.iter().find(|l| !l.optional && late.get(&l.name).is_none()) {
            Some(missing) => {
                Err(Cause::Late { name: missing.name.clone(), problem: "was announced and not given" })
            }
            None => Ok(()),
        }
    }
}
