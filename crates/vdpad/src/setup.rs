//! What the process is before it serves: its user, its rights, and its places.

use std::path::PathBuf;
use std::process::ExitCode;

use vdpa_control::Front;
use vdpad::given_mount;
use vdpad::rights::Rights;

use crate::{Clients, EXIT_ENVIRONMENT, EXIT_RUNTIME, EXIT_USAGE, Mounting, Serve, report};

impl Serve {
    /// Whether it serves processes of all users, as root does.
    pub(crate) fn is_service(&self) -> bool {
        rustix::process::geteuid().is_root() || self.user.is_some()
    }

    /// The directory of the files of a mount, and the path of the control socket.
    pub(crate) fn places(&self) -> Option<(PathBuf, PathBuf)> {
        let default = |name| default_path(name, self.is_service());
        let dir = self.dir.clone().or_else(|| default("dev"))?;
        Some((dir, self.socket.clone().or_else(|| default("control.sock"))?))
    }

    /// Makes or ends the mount for a service, if that is all that is to be done.
    pub(crate) fn mount_for_service(&self) -> Option<ExitCode> {
        let done = |outcome: Result<(), given_mount::GivenMountError>| match outcome {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                report(&error);
                ExitCode::from(EXIT_RUNTIME)
            }
        };
        let usage = |text: &str| {
            eprintln!("vdpad: {text}");
            Some(ExitCode::from(EXIT_USAGE))
        };
        match self.mount {
            Mounting::Own => None,
            Mounting::Given if !self.holder => usage("--mount given needs --holder, which gets the mount"),
            Mounting::Given => None,
            Mounting::Make | Mounting::End if !rustix::process::geteuid().is_root() => {
                usage("--mount make and --mount end need root: in a unit, ExecStartPre=+ and ExecStopPost=+")
            }
            // Whatever the options of a file say of the front end.
            Mounting::Make | Mounting::End if self.front == Front::Cuse => {
                tracing::info!("character devices have no mount");
                Some(ExitCode::SUCCESS)
            }
            Mounting::Make => Some(done(given_mount::make(&self.mount_dir()).map(|(dir, new)| {
                tracing::info!(dir = %dir.display(), new, "the service manager has the mount");
            }))),
            Mounting::End => {
                // As systemd.exec(5) says; another service manager says nothing.
                let restarts = std::env::var("SERVICE_RESULT").is_ok_and(|result| result != "success");
                Some(done(given_mount::end(&self.mount_dir(), restarts).map(|ended| {
                    tracing::info!(ended, restarts, "the mount of the service");
                })))
            }
        }
    }

    /// The directory of the files of a mount, of a service.
    fn mount_dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| PathBuf::from("/run/vdpad/dev"))
    }

    /// Becomes the user of `--user`. Before any thread is started: each has rights of its own.
    pub(crate) fn take_rights(&self) -> Result<(), ExitCode> {
        let (Some(user), Some((dir, socket))) = (&self.user, self.places()) else { return Ok(()) };
        let mounts = self.front != Front::Cuse && self.mount == Mounting::Own;
        let own = socket.parent().into_iter().chain(mounts.then_some(dir.as_path()));
        // That of a name alone is the present directory.
        let own: Vec<_> = own.filter(|dir| !dir.as_os_str().is_empty()).collect();
        let also = self.capability.iter().copied().collect();
        Rights { user, others: self.clients == Clients::Any, mounts, also }.take(&own).map_err(|error| {
            report(&error);
            ExitCode::from(EXIT_ENVIRONMENT)
        })
    }
}

/// Default path of a file or directory; `None` without root and without XDG_RUNTIME_DIR.
fn default_path(name: &str, root: bool) -> Option<PathBuf> {
    let base = if root { PathBuf::from("/run") } else { std::env::var_os("XDG_RUNTIME_DIR")?.into() };
    Some(base.join("vdpad").join(name))
}
