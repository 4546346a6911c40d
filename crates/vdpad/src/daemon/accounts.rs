//! Users and groups by their names.

use std::fs;

/// Where groups are.
const GROUPS: &str = "/etc/group";

/// Where users are.
const USERS: &str = "/etc/passwd";

/// A user, and the groups that its processes have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Number of the user.
    pub uid: u32,
    /// Number of its first group.
    pub gid: u32,
    /// Its other groups.
    pub groups: Vec<u32>,
}

/// A user: by a name in `/etc/passwd`, with the groups in `/etc/group` that name it, or as `UID:GID`. Those of a directory service are given
/// by number.
///
/// # Errors
/// A text for the command line, which says what would be right.
pub fn user(text: &str) -> Result<User, String> {
    if let Some((uid, gid)) = text.split_once(':') {
        let number = |text: &str| text.parse().ok().filter(|number| *number != u32::MAX);
        return match (number(uid), number(gid)) {
            (Some(uid), Some(gid)) => Ok(User { uid, gid, groups: Vec::new() }),
            _ => Err("two numbers are right, UID:GID, or a name".into()),
        };
    }
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    find_user(&read(USERS)?, &read(GROUPS)?, text).ok_or_else(|| {
        format!(
            "there is no user of this name in {USERS}: \"useradd --system {text}\" makes one, or give UID:GID"
        )
    })
}

/// The user `name` in the lines of passwd(5), with its groups in those of group(5).
fn find_user(users: &str, groups: &str, name: &str) -> Option<User> {
    let fields = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let (uid, gid) = fields.into_iter().find_map(|fields| match fields.as_slice() {
        [found, _, uid, gid, ..] if *found == name => Some((uid.parse().ok()?, gid.parse().ok()?)),
        _ => None,
    })?;
    let has = |line: &&str| {
        line.rsplit(':').next().is_some_and(|members| members.split(',').any(|member| member == name))
    };
    let number = |line: &str| line.split(':').nth(2)?.parse().ok();
    Some(User { uid, gid, groups: groups.lines().filter(has).filter_map(number).collect() })
}

/// The number of a group: given as such, or by a name in `/etc/group`. Those of a directory service are given by number.
///
/// # Errors
/// A text for the command line, which says what would be right.
pub fn group(text: &str) -> Result<u32, String> {
    if let Ok(number) = text.parse() {
        // That one means "leave it as it is" to chown(2).
        return if number == u32::MAX { Err("this is no number of a group".into()) } else { Ok(number) };
    }
    let groups = fs::read_to_string(GROUPS).map_err(|error| format!("{GROUPS}: {error}"))?;
    find(&groups, text).ok_or_else(|| {
        format!("there is no group of this name in {GROUPS}: \"groupadd --system {text}\" makes one, or give a number")
    })
}

/// The number of `name` in the lines of group(5).
fn find(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_the_groups_that_name_them() {
        assert_eq!(user("4800:4801"), Ok(User { uid: 4800, gid: 4801, groups: vec![] }));
        assert!(user("4800:").is_err() && user(":").is_err() && user("1:-1").is_err());
        assert_eq!(user("root").map(|user| (user.uid, user.gid)), Ok((0, 0)));
        assert!(user("no-such-user-here").unwrap_err().contains("useradd"));
        let users = "root:x:0:0::/:/bin/sh\nbroken\nvdpad:x:107:110::/:/bin/false\n";
        let groups = "root:x:0:\nkvm:x:109:alice,vdpad\nvdpad:x:110:\ndisk:x:6:vdpad\nnot:x:7:vdpad2\n";
        let found = find_user(users, groups, "vdpad");
        assert_eq!(found, Some(User { uid: 107, gid: 110, groups: vec![109, 6] }));
        assert_eq!(find_user(users, groups, "alice"), None);
    }

    #[test]
    fn groups_are_found_by_name_and_number() {
        assert_eq!((group("4711"), group("root")), (Ok(4711), Ok(0)));
        assert!(group("no-such-group-here").unwrap_err().contains("groupadd"));
        assert!(group("4294967295").is_err() && group("-1").is_err());
        let lines = "root:x:0:\nvdpa:x:107:alice,bob\nbroken\nvdpa2:x:none:\n";
        assert_eq!(
            (find(lines, "vdpa"), find(lines, "vdpa2"), find(lines, "broken")),
            (Some(107), None, None)
        );
    }
}
