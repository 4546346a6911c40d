//! Groups by their names.

use std::fs;

/// Where they are.
const GROUPS: &str = "/etc/group";

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
