//! Replacing the program image of this process.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::FdFlags;
use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::exec::{Program, execve, set_close_on_exec};
use vdpa_sys::keeper::AddressSpaceKeeper;
use vdpa_sys::memfd;

use super::{Cause, PID_VARIABLE, Phase, Report, STATE_VARIABLE, Strategy, UpdateError, steps};
use crate::device::DeviceFile;
use crate::queue::Queue;
use crate::session::{Session, Setup};
use crate::state::{self, Section, Sections, v1};

/// What to replace this program by, and what to tell it.
///
/// ```
/// use vdpa_client::state::Section;
/// use vdpa_client::update::{Plan, Strategy};
///
/// let plan = Plan::new("/usr/bin/my-vmm")
///     .strategy(Strategy::Resume)
///     .args(["my-vmm", "--as-before"])
///     .section(Section::new("my-vmm/cpu", 4, vec![]));
/// ```
#[derive(Debug)]
pub struct Plan {
    image: PathBuf,
    args: Vec<OsString>,
    strategy: Option<Strategy>,
    sections: Sections,
    keep: Vec<OwnedFd>,
}

impl Plan {
    /// The new image is the file `image`, run with the arguments and the environment of this process.
    #[must_use]
    pub fn new(image: impl Into<PathBuf>) -> Self {
        Self {
            image: image.into(),
            args: std::env::args_os().collect(),
            strategy: None,
            sections: Sections::default(),
            keep: Vec::new(),
        }
    }

    /// All arguments of the new image, its own name first.
    #[must_use]
    pub fn args<S: Into<OsString>>(self, args: impl IntoIterator<Item = S>) -> Self {
        Self { args: args.into_iter().map(Into::into).collect(), ..self }
    }

    /// Uses this strategy, and not the best one the device offers.
    #[must_use]
    pub fn strategy(self, strategy: Strategy) -> Self {
        Self { strategy: Some(strategy), ..self }
    }

    /// State of the caller for [`Restored::sections`](super::Restored::sections).
    #[must_use]
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// Keeps an open file over the exec, under the same number. The caller tells the new image the number in a
    /// section of its own; the new image adopts it with `vdpa_sys::inherit::take`.
    #[must_use]
    pub fn keep(mut self, fd: OwnedFd) -> Self {
        self.keep.push(fd);
        self
    }
}

/// An update that did not happen.
#[derive(Debug)]
pub struct Failed<D> {
    /// What failed.
    pub error: UpdateError,
    /// The session as it was, working; or, when undoing failed too, why. The device is closed then.
    pub session: Result<Session<D>, UpdateError>,
    /// The descriptors given to [`Plan::keep`], in that order, close-on-exec as they were.
    pub kept: Vec<OwnedFd>,
}

/// Replaces this program by the plan's image, which takes the session over with [`restore`](super::restore()).
///
/// Returns only on failure, with everything undone. Blocks while the device comes to rest. The caller makes
/// sure that nothing is driven meanwhile.
#[must_use = "only a failure returns, and the session is in it"]
pub fn exec<D: DeviceFile>(session: Session<D>, plan: Plan) -> Failed<D> {
    let (ops, setup) = session.into_parts();
    let Plan { image, args, strategy, sections, keep } = plan;
    let (strategy, launch) = match check(&setup, strategy, &image, args, &sections) {
        Ok(checked) => checked,
        Err(cause) => {
            let error = UpdateError { phase: Phase::Check, source: cause };
            return Failed { error, session: Ok(Session::new(ops, setup)), kept: keep };
        }
    };
    let mut leave = Leave { launch, sections, keep: &keep, report: Report::new(strategy) };
    let (error, session) = match strategy {
        Strategy::Live => {
            let error = leave.go(Some(&ops), &setup, None);
            (error, Ok(Session::new(ops, setup)))
        }
        Strategy::Resume => by_resume(ops, setup, &mut leave),
        Strategy::Reset => by_reset(ops, setup, &mut leave),
        Strategy::Reopen => by_reopen(ops, setup, &mut leave),
    };
    Failed { error, session, kept: keep }
}

type Outcome<D> = (UpdateError, Result<Session<D>, UpdateError>);

fn by_resume<D: DeviceFile>(ops: D, setup: Setup, leave: &mut Leave<'_>) -> Outcome<D> {
    let suspended = steps::timed(&mut leave.report.suspend, || steps::suspend(&ops));
    let error = match suspended {
        Ok(()) => leave.go(Some(&ops), &setup, None),
        Err(e) => UpdateError { phase: Phase::Suspend, source: e.into() },
    };
    // Also after a failed SUSPEND: RESUME of a device that is not suspended changes nothing.
    let undone = steps::resume(&ops).map_err(UpdateError::at(Phase::Resume));
    steps::kick_all(&setup);
    (error, undone.map(|()| Session::new(ops, setup)))
}

fn by_reset<D: DeviceFile>(ops: D, setup: Setup, leave: &mut Leave<'_>) -> Outcome<D> {
    let mut bases = None;
    let stopped = steps::timed(&mut leave.report.suspend, || {
        steps::suspend(&ops)?;
        let found = bases.insert(steps::bases(&ops, &setup)?);
        steps::reset(&ops).map(|()| found.clone())
    });
    let error = match stopped {
        Ok(found) => leave.go(Some(&ops), &setup, Some(&found)),
        Err(e) => UpdateError { phase: Phase::Suspend, source: e.into() },
    };
    // Where the bases are not known the device refused to stop or to say where; it still has its vrings, and
    // only RESUME can help, if it knows it.
    let undone = match bases {
        Some(bases) => steps::undo_reset(&ops, &setup, &bases),
        None if setup.backend.has(BackendFeatures::RESUME) => steps::resume(&ops),
        None => Ok(()),
    };
    (error, undone.map_err(UpdateError::at(Phase::Resume)).map(|()| Session::new(ops, setup)))
}

fn by_reopen<D: DeviceFile>(ops: D, setup: Setup, leave: &mut Leave<'_>) -> Outcome<D> {
    let suspends = setup.backend.has(BackendFeatures::SUSPEND);
    let begin = monotonic_ns();
    let stopped =
        (if suspends { steps::suspend(&ops) } else { Ok(()) }).and_then(|()| steps::bases(&ops, &setup));
    let bases = match stopped {
        Ok(bases) => bases,
        Err(e) => {
            let error = UpdateError { phase: Phase::Suspend, source: e.into() };
            let undone =
                if setup.backend.has(BackendFeatures::RESUME) { steps::resume(&ops) } else { Ok(()) };
            return (
                error,
                undone.map_err(UpdateError::at(Phase::Resume)).map(|()| Session::new(ops, setup)),
            );
        }
    };
    drop(ops);
    leave.report.suspend = monotonic_ns().saturating_sub(begin);
    let error = leave.go::<D>(None, &setup, Some(&bases));
    let path = setup.path.clone().unwrap_or_default();
    let reopened = steps::reopen::<D>(&path, &setup, &bases, &mut Report::new(Strategy::Reopen));
    (error, reopened.map(|ops| Session::new(ops, setup)))
}

/// Everything that can be known before the device is touched.
fn check(
    setup: &Setup,
    strategy: Option<Strategy>,
    image: &Path,
    args: Vec<OsString>,
    sections: &Sections,
) -> Result<(Strategy, Launch), Cause> {
    let strategy = strategy.unwrap_or_else(|| Strategy::pick(setup.offered));
    strategy.check(setup.offered)?;
    if let Some(region) = setup.regions.iter().find(|r| r.object().is_none()) {
        return Err(Cause::PrivateMemory { name: region.name().to_owned() });
    }
    if strategy == Strategy::Reopen {
        if setup.path.is_none() {
            return Err(Cause::NoPath);
        }
        let in_flight = setup.queues.iter().map(|q| usize::from(q.in_flight())).sum();
        if in_flight > 0 && !setup.backend.has(BackendFeatures::SUSPEND) {
            return Err(Cause::InFlight { in_flight });
        }
    }
    v1::State::check_names(sections)?;
    state::encode(sections)?;
    let launch = Launch::new(image, args)?;
    Ok((strategy, launch))
}

/// The new image, ready to be called.
struct Launch {
    image: CString,
    args: Vec<CString>,
    /// Without [`STATE_VARIABLE`] and [`PID_VARIABLE`].
    env: Vec<CString>,
}

impl Launch {
    fn new(image: &Path, args: Vec<OsString>) -> Result<Self, Cause> {
        let unusable = |source: std::io::Error| Cause::Image { path: image.to_owned(), source };
        let metadata = std::fs::metadata(image).map_err(unusable)?;
        if !metadata.is_file() {
            return Err(unusable(std::io::Error::other("it is not a regular file")));
        }
        accessat(CWD, image, Access::EXEC_OK, AtFlags::EACCESS).map_err(|e| unusable(e.into()))?;
        let text = |bytes: Vec<u8>, what| CString::new(bytes).map_err(|_| Cause::Nul { what });
        let args = args.into_iter().map(|a| text(a.into_vec(), "argument")).collect::<Result<Vec<_>, _>>()?;
        let env = std::env::vars_os()
            .filter(|(name, _)| name != STATE_VARIABLE && name != PID_VARIABLE)
            .map(|(name, value)| text(variable(&name, &value), "environment"))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { image: text(image.as_os_str().as_bytes().to_vec(), "path")?, args, env })
    }
}

fn variable(name: &OsStr, value: &OsStr) -> Vec<u8> {
    [name.as_bytes(), b"=", value.as_bytes()].concat()
}

/// The last steps of the old image.
struct Leave<'a> {
    launch: Launch,
    sections: Sections,
    keep: &'a [OwnedFd],
    report: Report,
}

impl Leave<'_> {
    /// Saves and execs. Returns the reason why this image still runs; close-on-exec flags are as before then.
    fn go<D: DeviceFile>(&mut self, ops: Option<&D>, setup: &Setup, bases: Option<&[u32]>) -> UpdateError {
        match self.try_go(ops.map(AsFd::as_fd), setup, bases) {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn try_go(
        &mut self,
        device: Option<BorrowedFd<'_>>,
        setup: &Setup,
        bases: Option<&[u32]>,
    ) -> Result<Infallible, UpdateError> {
        let begin = monotonic_ns();
        let saved = saved(device, setup, bases).map_err(UpdateError::at(Phase::Save))?;
        let exec_begin = monotonic_ns();
        self.report.save = exec_begin.saturating_sub(begin);
        let file = self.write(saved, exec_begin).map_err(UpdateError::at(Phase::Save))?;

        let mut open = Open::default();
        let regions = setup.regions.iter().filter_map(|r| r.object());
        let events = setup.queues.iter().flat_map(|q| [q.kick().as_fd(), q.call().as_fd()]);
        let kept = self.keep.iter().map(AsFd::as_fd);
        let all = regions.chain(events).chain(kept).chain(device).chain([file.as_fd()]);
        for fd in all {
            open.inherit(fd).map_err(UpdateError::at(Phase::Exec))?;
        }
        let mut env = self.launch.env.clone();
        for (name, number) in [(STATE_VARIABLE, file.as_raw_fd()), (PID_VARIABLE, steps::own_pid())] {
            let variable = CString::new(format!("{name}={number}"));
            env.push(variable.map_err(|_| UpdateError::at(Phase::Exec)(Cause::Nul { what: "environment" }))?);
        }
        // The page tables of this image are taken down after the exec and not in it. Where that is not possible, the
        // update is slower and otherwise the same. Dropped when the exec fails.
        let _keeper = AddressSpaceKeeper::spawn();
        execve(Program::Path(&self.launch.image), &self.launch.args, &env).map_err(|source| UpdateError {
            phase: Phase::Exec,
            source: Cause::System { action: "execve the new image", source },
        })
    }

    /// The sealed memfd with everything in it.
    fn write(&self, saved: Saved, exec_begin_ns: u64) -> Result<OwnedFd, Cause> {
        let update = v1::Update {
            strategy: self.report.strategy.name().to_owned(),
            pid: steps::own_pid(),
            suspend_ns: self.report.suspend,
            save_ns: self.report.save,
            exec_begin_ns,
        };
        let Saved { session, memory, queues } = saved;
        let mut sections = self.sections.clone();
        v1::State { update, session, memory, queues }.put(&mut sections)?;
        memfd::sealed(c"vdpa-live-state", &state::encode(&sections)?)
            .map_err(|source| Cause::System { action: "write the state", source })
    }
}

struct Saved {
    session: v1::Session,
    memory: v1::Memory,
    queues: v1::Queues,
}

fn saved(device: Option<BorrowedFd<'_>>, setup: &Setup, bases: Option<&[u32]>) -> Result<Saved, Cause> {
    let path = setup.path.as_deref().map(|p| p.to_str().map(str::to_owned));
    let session = v1::Session {
        device_fd: device.map(|fd| fd.as_raw_fd()),
        // A path that is not UTF-8 matters only to reopen.
        path: match path {
            Some(None) if device.is_none() => {
                let reason = "it is not UTF-8".to_owned();
                return Err(Cause::Invalid { what: "path of the device".to_owned(), reason });
            }
            path => path.flatten(),
        },
        device_id: setup.device_id,
        features: setup.features.0,
        backend_features: setup.backend.0,
        running: setup.running,
    };
    let regions = setup.regions.iter().filter_map(|r| {
        Some(v1::Region {
            name: r.name().to_owned(),
            fd: r.object()?.as_raw_fd(),
            iova: r.range().first(),
            size: r.range().size(),
            perm: r.perm().0,
            asid: 0,
        })
    });
    let memory = v1::Memory { regions: regions.collect() };
    let queues =
        setup.queues.iter().enumerate().map(|(at, q)| saved_queue(q, bases.and_then(|b| b.get(at).copied())));
    Ok(Saved { session, memory, queues: v1::Queues { queues: queues.collect() } })
}

fn saved_queue(queue: &Queue, base: Option<u32>) -> v1::Queue {
    let layout = queue.layout();
    v1::Queue {
        index: queue.index().0,
        size: layout.size,
        region: queue.region().to_owned(),
        desc: layout.desc,
        avail: layout.avail,
        used: layout.used,
        kick_fd: queue.kick().as_fd().as_raw_fd(),
        call_fd: queue.call().as_fd().as_raw_fd(),
        base,
        driver: queue.saved(),
    }
}

/// Descriptors that are to stay open over the exec. Dropping it puts their flags back.
#[derive(Default)]
struct Open<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Open<'a> {
    fn inherit(&mut self, fd: BorrowedFd<'a>) -> Result<(), Cause> {
        let system = |source| Cause::System { action: "keep a descriptor open over the exec", source };
        let flags = rustix::io::fcntl_getfd(fd).map_err(|e| system(Errno::from_raw(e.raw_os_error())))?;
        if flags.contains(FdFlags::CLOEXEC) {
            set_close_on_exec(fd, false).map_err(system)?;
            self.0.push(fd);
        }
        Ok(())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        for fd in &self.0 {
            // Cannot fail for a descriptor whose flag was just changed; and there is nobody to tell.
            let _ = set_close_on_exec(fd, true);
        }
    }
}
