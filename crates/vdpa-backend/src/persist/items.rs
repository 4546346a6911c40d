//! The items of a device, and those that belong to none: one table, so that no number is used twice.
//!
//! The keys of everything that is held are made of the number of a device and one of these ([`key`](super::key)).

/// Makes the constants of a table and a list of all.
macro_rules! items {
    ($(#[$doc:meta])* $all:ident: $($(#[$each:meta])* $name:ident = $number:literal,)*) => {
        $($(#[$each])* pub const $name: u32 = $number;)*

        $(#[$doc])*
        pub const $all: &[u32] = &[$($number),*];
    };
}

/// Items of a device.
pub mod device {
    items! {
        /// All of them. Those that a program has beside its [`DeviceLog`](crate::persist::DeviceLog) are [`of_program`].
        ALL:
        /// The journal.
        JOURNAL = 0,
        /// The in-flight logs of the queues.
        LOGS = 1,
        /// What the device is: without it the device was being added.
        IDENTITY = 2,
        /// The memory that is its disk.
        CONTENTS = 3,
        /// The attributes of its file.
        ATTRIBUTES = 4,
        /// The connection of its file, if it has one of its own.
        CONNECTION = 5,
        /// What reaches the keeper of a device of somebody else; of a disk on a file, the open file of the locks that QEMU respects.
        KEEPER = 6,
        /// The first queue of its interface.
        INTERFACE_0 = 7,
        /// The dirty pages.
        DIRTY = 8,
        /// The second queue of its interface, and so on.
        INTERFACE_1 = 9,
        /// As [`INTERFACE_1`].
        INTERFACE_2 = 10,
        /// As [`INTERFACE_1`].
        INTERFACE_3 = 11,
        /// As [`INTERFACE_1`].
        INTERFACE_4 = 12,
        /// As [`INTERFACE_1`].
        INTERFACE_5 = 13,
        /// As [`INTERFACE_1`].
        INTERFACE_6 = 14,
        /// As [`INTERFACE_1`].
        INTERFACE_7 = 15,
    }

    /// Items from this one on are the objects that the journal names.
    pub const FIRST_OBJECT: u32 = 16;

    /// The queues of the interface of a network card, in their order.
    pub const INTERFACE: [u32; 8] = [
        INTERFACE_0,
        INTERFACE_1,
        INTERFACE_2,
        INTERFACE_3,
        INTERFACE_4,
        INTERFACE_5,
        INTERFACE_6,
        INTERFACE_7,
    ];

    /// Those of a [`DeviceLog`](crate::persist::DeviceLog).
    pub(crate) const OF_LOG: [u32; 3] = [JOURNAL, LOGS, DIRTY];

    /// Those that a program has held beside the [`DeviceLog`](crate::persist::DeviceLog), and releases itself.
    pub fn of_program() -> impl Iterator<Item = u32> {
        ALL.iter().copied().filter(|item| !OF_LOG.contains(item))
    }
}

/// Items that belong to no device: those of device 0.
pub mod program {
    items! {
        /// All of them, but for the io_urings of worker threads: those begin at [`RINGS`](crate::persist::RINGS).
        ALL:
        /// The connection of the mount of the directory of device files.
        MOUNT = 1,
        /// Where that is mounted.
        MOUNT_DIR = 2,
        /// The control socket.
        CONTROL = 3,
        /// Attributes of the mounted directory.
        MOUNT_ATTRIBUTES = 4,
        /// The directory of character devices, each of which has a connection of its own.
        DEV_DIR = 5,
        /// The devices of the configuration have been added.
        CONFIGURED = 6,
        /// Requests that were read and not answered.
        REQUESTS = 7,
        /// The mount is new: nobody has served it, so that nothing else that is held belongs to it.
        NEW_MOUNT = 8,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::persist::RINGS;

    #[test]
    fn no_number_is_used_twice() {
        for (all, end) in [(device::ALL, device::FIRST_OBJECT), (program::ALL, RINGS)] {
            let distinct: BTreeSet<u32> = all.iter().copied().collect();
            assert_eq!(distinct.len(), all.len(), "{all:?}");
            assert!(distinct.iter().all(|item| *item < end), "{all:?} are below {end}");
        }
        assert_eq!(device::of_program().count() + device::OF_LOG.len(), device::ALL.len());
        assert!(device::INTERFACE.iter().all(|item| device::of_program().any(|known| known == *item)));
    }

    /// A program that serves what another version has held finds it under the same numbers.
    #[test]
    fn numbers_stay_as_they_are() {
        assert_eq!(device::ALL, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(program::ALL, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(device::INTERFACE, [7, 9, 10, 11, 12, 13, 14, 15]);
    }
}
