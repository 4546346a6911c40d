//! What an update is to carry, by what way, and how long it may take.

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

use super::{Cancel, Cause, PID_VARIABLE, SOCKET_VARIABLE, STATE_VARIABLE, Strategy, keeper, steps};
use crate::state::{Section, Sections, v2};

/// How long a switch may take unless the plan says otherwise.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long a successor that failed or is late has to let go of the devices, unless the plan says otherwise.
pub const GRACE: Duration = Duration::from_secs(2);

/// By what way devices get from one program to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// This process execs the new image and keeps its id, its children and its pinned buffers.
    Exec,
    /// This process starts the new image as its child, which takes the devices over when it is ready.
    Fork,
    /// A process that runs already takes the devices over.
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

/// A name that is no way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" is no way to update; there are exec, fork and hand-over")]
pub struct UnknownWay {
    /// What was given.
    pub name: String,
}

/// By what way, with what that way needs.
#[derive(Debug)]
pub enum Via {
    /// Exec this image in place.
    Exec(Image),
    /// Start this image as a child.
    Fork(Image),
    /// Hand over to the process at the other end, which calls [`Incoming::receive`](super::Incoming::receive).
    HandOver(UnixStream),
}

impl Via {
    /// Which way it is.
    #[must_use]
    pub const fn way(&self) -> Way {
        match self {
            Self::Exec(_) => Way::Exec,
            Self::Fork(_) => Way::Fork,
            Self::HandOver(_) => Way::HandOver,
        }
    }
}

/// A program to run in place of this one.
#[derive(Clone, Debug)]
pub struct Image {
    path: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
}

impl Image {
    /// The file `path`, run with the arguments and the environment of this process.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let own = [STATE_VARIABLE, PID_VARIABLE, SOCKET_VARIABLE, keeper::VARIABLE];
        Self {
            path: path.into(),
            args: std::env::args_os().collect(),
            env: std::env::vars_os().filter(|(name, _)| own.iter().all(|own| name != own)).collect(),
        }
    }

    /// All its arguments, its own name first.
    #[must_use]
    pub fn args<S: Into<OsString>>(self, args: impl IntoIterator<Item = S>) -> Self {
        Self { args: args.into_iter().map(Into::into).collect(), ..self }
    }

    /// One more variable of its environment, or another value of one.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        let name = name.into();
        self.env.retain(|(present, _)| *present != name);
        self.env.push((name, value.into()));
        self
    }

    /// Checks what can be known without running it.
    pub(super) fn check(&self) -> Result<(), Cause> {
        let unusable = |source: std::io::Error| Cause::Image { path: self.path.clone(), source };
        let metadata = std::fs::metadata(&self.path).map_err(unusable)?;
        if !metadata.is_file() {
            return Err(unusable(std::io::Error::other("it is not a regular file")));
        }
        accessat(CWD, &self.path, Access::EXEC_OK, AtFlags::EACCESS).map_err(|e| unusable(e.into()))?;
        self.strings().map(drop)
    }

    /// What execve is given: path, arguments, environment.
    pub(super) fn strings(&self) -> Result<(CString, Vec<CString>, Vec<CString>), Cause> {
        let text = |bytes: Vec<u8>, what| CString::new(bytes).map_err(|_| Cause::Nul { what });
        let path = text(self.path.as_os_str().as_bytes().to_vec(), "path")?;
        let args = self.args.iter().map(|a| text(a.clone().into_vec(), "argument"));
        let env = self.env.iter().map(|(name, value)| text(variable(name, value), "environment"));
        Ok((path, args.collect::<Result<_, _>>()?, env.collect::<Result<_, _>>()?))
    }

    /// Reads the image into the page cache, as far as the kernel likes, so that the switch does not wait for a disk.
    pub(super) fn prefetch(&self) {
        if let Ok(file) = std::fs::File::open(&self.path) {
            // Advice: whether it is taken shows in the timings only.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed);
        }
    }

    /// Starts it as a child that inherits `socket` and is told of it.
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

/// What an update is to carry, and how.
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
    /// The first descriptor that could not be copied.
    pub(super) broken: Option<(String, Errno)>,
    pub(super) deadline: Option<Duration>,
    pub(super) grace: Duration,
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
    /// Nothing but the devices, the best strategy for each, [`DEADLINE`] and [`GRACE`].
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
            cancel: None,
            allowed_uid: None,
            dry_run: false,
        }
    }

    /// Uses this strategy for every device, and not the best one that each offers.
    #[must_use]
    pub fn strategy(self, strategy: Strategy) -> Self {
        Self { strategy: Some(strategy), ..self }
    }

    /// Uses this strategy for one device.
    #[must_use]
    pub fn strategy_of(mut self, device: &str, strategy: Strategy) -> Self {
        self.strategies.push((device.to_owned(), strategy));
        self
    }

    /// State of the caller that is known now. The successor sees it before anything stops.
    #[must_use]
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// Announces a section that [`Prepared::switch`](super::Prepared::switch) will be given, so that the successor can
    /// say in time that it does not know it. An `optional` one may be left out.
    #[must_use]
    pub fn late_section(mut self, name: &str, version: u32, optional: bool) -> Self {
        self.late.push(v2::Late { name: name.to_owned(), version, optional });
        self
    }

    /// An open file for the successor, under a name. It is copied (`dup`): what the caller does with its own does not
    /// matter afterwards.
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

    /// How long the switch may take, from its beginning until the successor has the devices. When the time is over the
    /// update is rolled back. What cannot be interrupted is not: a request to a device, and execve.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Lets the switch take as long as it takes.
    #[must_use]
    pub fn no_deadline(self) -> Self {
        Self { deadline: None, ..self }
    }

    /// How long a successor that is called off may take to say that it holds nothing any more, before it is killed. Until
    /// then this process cannot have the devices back, so this is part of how long nobody drives them when a successor
    /// hangs.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        Self { grace, ..self }
    }

    /// Lets another thread end the prepare.
    #[must_use]
    pub fn cancel(self, cancel: &Cancel) -> Self {
        Self { cancel: Some(cancel.clone()), ..self }
    }

    /// Hands over also to a process of this user, besides root and the user of this process.
    #[must_use]
    pub fn allow_uid(self, uid: u32) -> Self {
        Self { allowed_uid: Some(uid), ..self }
    }

    /// Before an exec, starts the new image once as a child that is shown everything and takes nothing: it must say that
    /// it understands every section and can map all memory. Finds out what execve would find out too late. The child
    /// ends with [`Cause::DryRun`] where it would have taken over.
    #[must_use]
    pub fn dry_run(self) -> Self {
        Self { dry_run: true, ..self }
    }

    /// Devices that have a strategy of their own. The last one given counts.
    pub(super) fn strategies(&self) -> impl Iterator<Item = (&str, Strategy)> {
        self.strategies.iter().map(|(device, strategy)| (device.as_str(), *strategy))
    }

    /// Checks what does not depend on devices, `names` of which there are.
    pub(super) fn check(&self, mut names: Vec<&str>) -> Result<(), Cause> {
        if let Some((name, source)) = &self.broken {
            return Err(Cause::Descriptor { name: name.clone(), source: *source });
        }
        let present: HashSet<&str> = names.iter().copied().collect();
        if let Some((device, _)) = self.strategies().find(|(device, _)| !present.contains(device)) {
            return Err(Cause::UnknownDevice { name: device.to_owned(), present: names.join(", ") });
        }
        names.sort_unstable();
        if let Some(name) = steps::first_twice(&names) {
            return Err(Cause::DuplicateName { what: "device", name: (*name).to_owned() });
        }
        let mut names: Vec<&str> = self.descriptors.iter().map(|(name, _)| name.as_str()).collect();
        names.sort_unstable();
        if let Some(name) = steps::first_twice(&names) {
            return Err(Cause::DuplicateName { what: "descriptor", name: (*name).to_owned() });
        }
        let sections = self.sections.iter().map(|s| s.name.as_str());
        let mut names: Vec<&str> = sections.chain(self.late.iter().map(|l| l.name.as_str())).collect();
        names.sort_unstable();
        match steps::first_twice(&names) {
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
