//! Memory and rings in one process, for tests of devices and drivers.
