//! The times of an update.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use vdpa_core::Errno;
use vdpa_sys::uapi::report::UpdateReport;

use super::{Strategy, UpdateError, Way};
use crate::device::DeviceFile;
use crate::error::chain;
use crate::session::Session;

/// The times of one update, for all devices together and for each. Durations are in ns of `CLOCK_MONOTONIC`, which continues
/// over an exec and is the same in both processes of a hand-over. 0 means that the step did not happen.
///
/// ```
/// use vdpa_client::update::{DeviceReport, Report, Strategy, Way};
///
/// let mut report = Report::new(Way::HandOver);
/// report.total = 120_000;
/// report.devices.push(DeviceReport { new_owner: 35_000, ..DeviceReport::new("disk0", Strategy::Live) });
/// assert!(report.to_string().starts_with("hand-over of 1 device in 0.120 ms"));
/// let json = serde_json::to_string(&report)?;
/// assert_eq!(serde_json::from_str::<Report>(&json)?, report);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The way of the update.
    pub way: Way,
    /// Process that had the devices.
    pub predecessor: i32,
    /// Process that has them now; the same for an exec.
    pub successor: i32,
    /// When the update was begun, in ns since 1970-01-01 UTC.
    pub begun_unix_ns: u64,
    /// Preparing, while the devices run and are driven. Not part of the total.
    pub prepare: u64,
    /// Collecting the state.
    pub save: u64,
    /// From the complete state until the successor has it. For an exec: execve and the start of the new image up to the entry
    /// of [`incoming`](super::incoming()). Otherwise: the message to the waiting process.
    pub transfer: u64,
    /// Reading and checking the state in the switch. For an exec: all of it, and mapping all memory. Otherwise: the ring
    /// positions.
    pub load: u64,
    /// The commit and its confirmation; part of the total only as far as the successor waits for it.
    pub commit: u64,
    /// From the beginning of the switch to its end: the downtime of the driver.
    pub total: u64,
    /// Each device, in the order in which they were given.
    pub devices: Vec<DeviceReport>,
}

/// The times of one device, in ns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Name of the device.
    pub name: String,
    /// The strategy used.
    pub strategy: Strategy,
    /// SUSPEND, and for `reset` reading the vring bases and resetting, for `reopen` the close.
    pub suspend: u64,
    /// NEW_OWNER; for `reopen` open, SET_OWNER and negotiation.
    pub new_owner: u64,
    /// Setting up the vrings again.
    pub vrings: u64,
    /// REMAP of each mapping, or UPDATE of each for `reopen`.
    pub remap: u64,
    /// RESUME or DRIVER_OK.
    pub resume: u64,
    /// Mappings it has.
    pub mappings: u64,
    /// Virtqueues it has.
    pub queues: u64,
}

impl DeviceReport {
    /// A report in which nothing has taken any time yet.
    #[must_use]
    pub fn new(name: &str, strategy: Strategy) -> Self {
        Self {
            name: name.to_owned(),
            strategy,
            suspend: 0,
            new_owner: 0,
            vrings: 0,
            remap: 0,
            resume: 0,
            mappings: 0,
            queues: 0,
        }
    }

    /// All phases of one device by name, in ns, in the order in which they happen.
    #[must_use]
    pub const fn phases(&self) -> [(&'static str, u64); 5] {
        [
            ("suspend", self.suspend),
            ("new_owner", self.new_owner),
            ("vrings", self.vrings),
            ("remap", self.remap),
            ("resume", self.resume),
        ]
    }
}

impl Report {
    /// A report in which nothing has taken any time yet.
    #[must_use]
    pub const fn new(way: Way) -> Self {
        Self {
            way,
            predecessor: 0,
            successor: 0,
            begun_unix_ns: 0,
            prepare: 0,
            save: 0,
            transfer: 0,
            load: 0,
            commit: 0,
            total: 0,
            devices: Vec::new(),
        }
    }

    /// All phases of the switch by name, in ns, in the order in which they happen. Phases of devices are summed.
    #[must_use]
    pub fn phases(&self) -> [(&'static str, u64); 9] {
        let sum = |time: fn(&DeviceReport) -> u64| self.devices.iter().map(time).fold(0, u64::saturating_add);
        [
            ("suspend", sum(|d| d.suspend)),
            ("save", self.save),
            ("transfer", self.transfer),
            ("load", self.load),
            ("new_owner", sum(|d| d.new_owner)),
            ("vrings", sum(|d| d.vrings)),
            ("remap", sum(|d| d.remap)),
            ("resume", sum(|d| d.resume)),
            ("commit", self.commit),
        ]
    }

    /// The downtime of the driver: from the beginning of the switch to its end.
    #[must_use]
    pub const fn total(&self) -> Duration {
        Duration::from_nanos(self.total)
    }

    /// Sends the times of this update to the server of device `name`, for its operators (`vdpactl update show`). One request;
    /// blocks until it is answered. Call it when the device is driven again, so that it does not add to the downtime.
    ///
    /// # Errors
    /// `ENOTTY` from a server without this request, such as the kernel; `EINVAL` when `name` is not in this report.
    pub fn report_to_server<D: DeviceFile>(&self, name: &str, session: &Session<D>) -> Result<(), Errno> {
        let device = self.device(name).ok_or(Errno::INVAL)?;
        session.parts().0.report_update(&self.of(device))
    }

    fn of(&self, device: &DeviceReport) -> UpdateReport {
        let few = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        UpdateReport {
            way: position(&Way::ALL, self.way),
            strategy: position(&Strategy::ALL, device.strategy),
            predecessor: self.predecessor,
            successor: self.successor,
            begun_unix: self.begun_unix_ns,
            prepare: self.prepare,
            total: self.total,
            save: self.save,
            transfer: self.transfer,
            load: self.load,
            commit: self.commit,
            suspend: device.suspend,
            new_owner: device.new_owner,
            vrings: device.vrings,
            remap: device.remap,
            resume: device.resume,
            mappings: few(device.mappings),
            queues: few(device.queues),
            ..UpdateReport::default()
        }
    }

    /// The report of an update that was rolled back.
    pub(super) fn rolled_back(
        way: Way,
        strategy: Strategy,
        begun_unix_ns: u64,
        why: &UpdateError,
    ) -> UpdateReport {
        let own = super::steps::own_pid();
        let mut report = UpdateReport {
            way: position(&Way::ALL, way),
            strategy: position(&Strategy::ALL, strategy),
            outcome: 1,
            predecessor: own,
            successor: own,
            begun_unix: begun_unix_ns,
            ..UpdateReport::default()
        };
        report.set_reason(&chain(why));
        report
    }

    /// A device by its name.
    #[must_use]
    pub fn device(&self, name: &str) -> Option<&DeviceReport> {
        self.devices.iter().find(|d| d.name == name)
    }
}

fn position<T: PartialEq>(all: &[T], one: T) -> u8 {
    all.iter().position(|other| *other == one).and_then(|at| u8::try_from(at).ok()).unwrap_or(0)
}

/// Milliseconds with three digits.
fn ms(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000, ns / 1_000 % 1_000)
}

/// The table of an operator: one line for the whole, one for each device.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = if self.devices.len() == 1 { "device" } else { "devices" };
        writeln!(f, "{} of {} {devices} in {} ms", self.way, self.devices.len(), ms(self.total))?;
        writeln!(
            f,
            "prepare {}  save {}  transfer {}  load {}  commit {}  (ms; the devices run during prepare)",
            ms(self.prepare),
            ms(self.save),
            ms(self.transfer),
            ms(self.load),
            ms(self.commit)
        )?;
        let width = self.devices.iter().map(|d| d.name.len()).max().unwrap_or(0).max("device".len());
        write!(f, "{:width$}  strategy", "device")?;
        for (name, _) in DeviceReport::new("", Strategy::Live).phases() {
            write!(f, "  {name:>9}")?;
        }
        write!(f, "  mappings  queues")?;
        for device in &self.devices {
            write!(f, "\n{:width$}  {:8}", device.name, device.strategy)?;
            for (_, ns) in device.phases() {
                write!(f, "  {:>9}", ms(ns))?;
            }
            write!(f, "  {:>8}  {:>6}", device.mappings, device.queues)?;
        }
        Ok(())
    }
}
