//! Who is at the other end of a Unix socket, beside what `SO_PEERCRED` says.
#![expect(unsafe_code, reason = "SO_PEERGROUPS is not in rustix")]

use std::os::fd::{AsFd, AsRawFd};

use vdpa_core::Errno;

use crate::errno;

/// asm-generic/socket.h; libc has no name for it.
const SO_PEERGROUPS: libc::c_int = 59;

/// Supplementary groups that a process can have: `NGROUPS_MAX`.
const GROUPS_MAX: usize = 65536;

/// Groups for which there is room at first; more need a second call.
const GROUPS_USUAL: usize = 32;

/// The supplementary groups that the peer of a connected Unix socket had when it connected (`SO_PEERGROUPS`, Linux 4.13). Does not
/// block.
///
/// # Errors
/// `ENODATA` for a socket without a peer; `ENOPROTOOPT` for another kind of socket, and before Linux 4.13.
pub fn groups(socket: impl AsFd) -> Result<Vec<u32>, Errno> {
    let mut groups = vec![0_u32; GROUPS_USUAL];
    loop {
        let room = groups.len() * size_of::<u32>();
        let mut bytes = libc::socklen_t::try_from(room).map_err(|_| Errno::INVAL)?;
        // SAFETY: the descriptor is open while it is borrowed; the kernel writes at most `bytes` bytes to `groups`, which has as many
        // and is ours alone, and the length to `bytes`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = usize::try_from(bytes).unwrap_or(0) / size_of::<u32>();
        match if result == 0 { Ok(()) } else { Err(errno::last()) } {
            Ok(()) => {
                groups.truncate(count);
                return Ok(groups);
            }
            // It says how many there are.
            Err(Errno::RANGE) if count > groups.len() && count <= GROUPS_MAX => groups.resize(count, 0),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_has_the_groups_of_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let mut own: Vec<u32> =
            rustix::process::getgroups().unwrap().into_iter().map(rustix::process::Gid::as_raw).collect();
        let mut found = groups(&one).unwrap();
        own.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, own);
        assert!(groups(tempfile::tempfile().unwrap()).is_err());
    }
}
