//! Who uses the control socket, and what they may do.

use axum::extract::Request;
use axum::http::Method;
use rustix::process::geteuid;
use tokio::net::UnixStream;
use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_sys::peer;

/// Groups by which others than root and the daemon's user may use the control socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Its members may do everything.
    pub admins: Option<u32>,
    /// Its members may ask, and change nothing.
    pub readers: Option<u32>,
}

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Nobody,
    Reader,
    Admin,
}

/// The process at the other end of a connection, as it was when it connected: neither the mode of the socket file nor a later change of
/// its user or groups counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) pid: i32,
    role: Role,
}

impl Access {
    fn role(&self, own: u32, uid: u32, groups: &[u32]) -> Role {
        let is_member = |group: Option<u32>| group.is_some_and(|group| groups.contains(&group));
        if uid == 0 || uid == own || is_member(self.admins) {
            Role::Admin
        } else if is_member(self.readers) {
            Role::Reader
        } else {
            Role::Nobody
        }
    }
}

impl Caller {
    /// The peer of a connection.
    ///
    /// # Errors
    /// `EPERM` when the kernel does not tell who it is.
    pub(super) fn of(stream: &UnixStream, access: &Access) -> Result<Self, CtlError> {
        let unknown = |why: &dyn std::fmt::Display| {
            CtlError::new(Errno::PERM, format!("the credentials of the caller are unknown: {why}"))
        };
        let peer = stream.peer_cred().map_err(|error| unknown(&error))?;
        let own = geteuid().as_raw();
        let mut groups = vec![peer.gid()];
        if access.admins.or(access.readers).is_some() {
            groups.extend(peer::groups(stream).map_err(|errno| unknown(&errno))?);
        }
        let role = access.role(own, peer.uid(), &groups);
        Ok(Self { uid: peer.uid(), pid: peer.pid().unwrap_or(0), role })
    }

    /// Whether it may change anything.
    pub(super) fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }

    /// Checks that it may make a request.
    ///
    /// # Errors
    /// `EPERM`; the text says who may.
    pub(super) fn check(&self, request: &Request) -> Result<(), CtlError> {
        let needed =
            if is_question(request.method(), request.uri().path()) { Role::Reader } else { Role::Admin };
        if self.role >= needed {
            return Ok(());
        }
        let (uid, pid) = (self.uid, self.pid);
        tracing::warn!(uid, pid, method = %request.method(), path = request.uri().path(), "control request refused");
        let hint = if self.role == Role::Reader {
            "This group may only ask. Root, the daemon's user and the group of --socket-group may do the rest.".into()
        } else {
            let own = geteuid().as_raw();
            format!(
                "Only root, the daemon's user (uid {own}) and the groups of --socket-group and --socket-readers may use the control socket."
            )
        };
        Err(CtlError::new(Errno::PERM, "Operation not permitted").with_hint(hint))
    }
}

/// Whether a request changes nothing and tells nothing of a client's memory, as the state of a device that moves does: its addresses.
fn is_question(method: &Method, path: &str) -> bool {
    let of_state = path.split('/').nth(4) == Some("state");
    matches!(*method, Method::GET | Method::HEAD) && !of_state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_both_groups_has_the_greater_role() {
        let access = Access { admins: Some(10), readers: Some(20) };
        let role = |uid, groups: &[u32]| access.role(1000, uid, groups);
        assert_eq!((role(0, &[]), role(1000, &[])), (Role::Admin, Role::Admin));
        assert_eq!((role(5, &[10]), role(5, &[20, 10])), (Role::Admin, Role::Admin));
        assert_eq!((role(5, &[20]), role(5, &[0, 30])), (Role::Reader, Role::Nobody));
        // Without groups: as it always was.
        assert_eq!(Access::default().role(1000, 5, &[0]), Role::Nobody);
    }

    #[test]
    fn readers_ask_and_do_not_see_addresses() {
        assert!(is_question(&Method::GET, "/v1/devs/state") && is_question(&Method::GET, "/metrics"));
        assert!(!is_question(&Method::GET, "/v1/devs/a/state"));
        for method in [Method::POST, Method::PATCH, Method::PUT, Method::DELETE, Method::OPTIONS] {
            assert!(!is_question(&method, "/v1/devs"), "{method}");
        }
    }
}
