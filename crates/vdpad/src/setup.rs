//! What the process is before it serves: its user, its rights, and its places.

use std::path::PathBuf;
use std::process::ExitCode;

use vdpa_control::Front;
use vdpad::rights::Rights;

use crate::{Clients, EXIT_ENVIRONMENT, Serve, report};

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

    /// Becomes the user of `--user`. Before any thread is started: each has rights of its own.
    pub(crate) fn take_rights(&self) -> Result<(), ExitCode> {
        let (Some(user), Some((dir, socket))) = (&self.user, self.places()) else { return Ok(()) };
        let mounts = self.front != Front::Cuse;
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
