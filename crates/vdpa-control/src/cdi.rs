//! What a container needs to use a device, and the CDI specification that says so to container runtimes.
//!
//! CDI is the Container Device Interface of the CNCF (<https://github.com/cncf-tags/container-device-interface>): a file in `/etc/cdi` or
//! `/var/run/cdi` tells podman, containerd, CRI-O and Docker by which changes a container gets the device `vdpa-live.org/vhost-vdpa=disk0`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::api::DevInfo;

/// The version of CDI that the specification is written in. The oldest that has all that is used, as CDI asks of those that write one, so
/// that runtimes of Debian 12 read it: device names that begin with a digit, and `hostPath` of device nodes, are of 0.5.0.
pub const VERSION: &str = "0.5.0";

/// Vendor and class of the devices.
pub const KIND: &str = "vdpa-live.org/vhost-vdpa";

/// The directory in which a container finds its devices, by name.
pub const DIRECTORY: &str = "/dev/vdpa";

/// Name of the device of the specification that stands for all.
pub const ALL: &str = "all";

/// A device as a container gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// Its name.
    pub name: String,
    /// Its device file on the host.
    pub host: PathBuf,
    /// Its device file in the container: its name in the directory that was asked for.
    pub container: PathBuf,
    /// What the device file is.
    pub kind: FileKind,
}

/// What a device file is, and so how it gets into a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file of a FUSE mount: by a bind mount. It is no device node, and the container needs no right to one.
    File,
    /// A character device (CUSE, or vhost-vdpa of the kernel): by a device node, which the runtime makes and allows.
    Character,
}

/// Why a container cannot be given a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotGiven {
    /// CDI has no such names.
    #[error(
        "the name of device \"{name}\" is none of CDI, which has letters and digits, and \"_\", \"-\", \".\", \":\" between them; \
         make the device anew with such a name"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The name has a meaning of its own.
    #[error(
        "the name \"{ALL}\" stands for all devices of a specification; make the device anew with another name"
    )]
    Reserved,
    /// A driver of the kernel has it.
    #[error(
        "device {name} is with a driver of the kernel and has no vhost-vdpa file; \"bind vhost\" in place of \"bind virtio\" gives it one"
    )]
    KernelDriver {
        /// Name of the device.
        name: String,
    },
}

impl Given {
    /// How a container gets the device, below `directory` of the container.
    ///
    /// `sysfs` is where the kernel's devices are looked for, `/sys` but in tests: of a device that the kernel has (front `vduse`), the
    /// file that a client opens is that of the kernel's vhost-vdpa.
    ///
    /// # Errors
    /// [`NotGiven`].
    pub fn of(info: &DevInfo, directory: &Path, sysfs: &Path) -> Result<Self, NotGiven> {
        let name = info.name.clone();
        if !is_name(&name) {
            return Err(NotGiven::Name { name });
        }
        if name == ALL {
            return Err(NotGiven::Reserved);
        }
        let (host, kind) = match info.front.as_str() {
            "cuse" => (info.path.clone(), FileKind::Character),
            "vduse" => match vhost_vdpa_of(sysfs, &name) {
                Some(path) => (path, FileKind::Character),
                None => return Err(NotGiven::KernelDriver { name }),
            },
            _ => (info.path.clone(), FileKind::File),
        };
        Ok(Self { container: directory.join(&name), name, host, kind })
    }

    /// Its name in full, as `podman run --device` takes it.
    #[must_use]
    pub fn qualified(&self) -> String {
        format!("{KIND}={}", self.name)
    }
}

/// Whether CDI has such names of devices.
fn is_name(name: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    ends(name.chars().next())
        && ends(name.chars().last())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-.:".contains(c))
}

/// The file of the vhost-vdpa driver for a device of the kernel's vdpa bus, if it has that driver.
fn vhost_vdpa_of(sysfs: &Path, name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(sysfs.join("bus/vdpa/devices").join(name)).ok()?;
    let file = entries.filter_map(Result::ok).map(|entry| entry.file_name()).find(|file| {
        let number = file.to_str().and_then(|file| file.strip_prefix("vhost-vdpa-"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    })?;
    Some(Path::new("/dev").join(file))
}

/// A specification: each device, and [`ALL`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    cdi_version: &'static str,
    kind: &'static str,
    devices: Vec<Device>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    container_edits: Edits,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Edits {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    device_nodes: Vec<Node>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<Mount>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    path: PathBuf,
    host_path: PathBuf,
    permissions: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    host_path: PathBuf,
    container_path: PathBuf,
    options: [&'static str; 4],
}

impl Edits {
    fn add(&mut self, Given { host, container, kind, .. }: &Given) {
        let (host, container) = (host.clone(), container.clone());
        match kind {
            // Not "mknod": nobody needs to make one.
            FileKind::Character => {
                self.device_nodes.push(Node { path: container, host_path: host, permissions: "rw" });
            }
            FileKind::File => self.mounts.push(Mount {
                host_path: host,
                container_path: container,
                options: ["bind", "rw", "nosuid", "noexec"],
            }),
        }
    }
}

impl Spec {
    /// The specification of these devices; `None` for no devices, since CDI has no specification without any.
    #[must_use]
    pub fn new(devices: &[Given]) -> Option<Self> {
        if devices.is_empty() {
            return None;
        }
        let (mut all, mut described) = (Edits::default(), Vec::with_capacity(devices.len() + 1));
        for device in devices {
            let mut own = Edits::default();
            own.add(device);
            all.add(device);
            described.push(Device { name: device.name.clone(), container_edits: own });
        }
        described.push(Device { name: ALL.into(), container_edits: all });
        Some(Self { cdi_version: VERSION, kind: KIND, devices: described })
    }

    /// The specification as a file has it.
    #[must_use]
    pub fn text(&self) -> String {
        // Strings and lists of strings; a path that is not UTF-8 does not come out of the daemon's JSON.
        serde_json::to_string_pretty(self).map(|text| text + "\n").unwrap_or_default()
    }

    /// Writes it to `path`, so that a runtime finds the former file or this one, and nothing between.
    ///
    /// # Errors
    /// Those of the file system; the former file is as it was then.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // Runtimes read *.json and *.yaml of the directory.
        let mut unfinished = std::ffi::OsString::from(".");
        unfinished.push(name);
        unfinished.push(".new");
        let unfinished = directory.unwrap_or(Path::new(".")).join(unfinished);
        let written = fs::File::create(&unfinished)
            .and_then(|mut file| file.write_all(self.text().as_bytes()).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&unfinished, path));
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DevState;

    fn info(name: &str, front: &str, path: &str) -> DevInfo {
        DevInfo {
            name: name.into(),
            device_id: 2,
            mgmtdev: "blk".into(),
            vendor_id: 0,
            max_vqs: 1,
            max_vq_size: 256,
            min_vq_size: 1,
            path: path.into(),
            front: front.into(),
            passed: false,
            state: DevState::default(),
        }
    }

    fn given(info: &DevInfo) -> Result<Given, NotGiven> {
        Given::of(info, Path::new(DIRECTORY), Path::new("/nonexistent"))
    }

    #[test]
    fn files_are_mounted_and_character_devices_are_nodes() {
        let devices = [
            given(&info("disk0", "fuse", "/run/vdpad/dev/vhost-vdpa-0")).unwrap(),
            given(&info("9p", "cuse", "/dev/vhost-vdpa-1")).unwrap(),
        ];
        assert_eq!(devices.first().unwrap().qualified(), "vdpa-live.org/vhost-vdpa=disk0");
        let spec: serde_json::Value = serde_json::from_str(&Spec::new(&devices).unwrap().text()).unwrap();
        let mount = serde_json::json!({"hostPath": "/run/vdpad/dev/vhost-vdpa-0", "containerPath": "/dev/vdpa/disk0",
            "options": ["bind", "rw", "nosuid", "noexec"]});
        let node =
            serde_json::json!({"path": "/dev/vdpa/9p", "hostPath": "/dev/vhost-vdpa-1", "permissions": "rw"});
        let expected = serde_json::json!({"cdiVersion": "0.5.0", "kind": "vdpa-live.org/vhost-vdpa", "devices": [
            {"name": "disk0", "containerEdits": {"mounts": [mount]}},
            {"name": "9p", "containerEdits": {"deviceNodes": [node]}},
            {"name": "all", "containerEdits": {"mounts": [mount], "deviceNodes": [node]}},
        ]});
        assert_eq!(spec, expected);
        assert_eq!(Spec::new(&[]), None);
    }

    #[test]
    fn names_that_cdi_has_not_are_refused_with_what_is_right() {
        for name in ["", "-a", "a-", "a/b", "a b", "disk\u{e9}"] {
            let refused = given(&info(name, "fuse", "/x")).unwrap_err();
            assert_eq!(refused, NotGiven::Name { name: name.into() });
            assert!(refused.to_string().contains("letters and digits"), "{refused}");
        }
        for name in ["a", "0", "a.b:c_d-e", "A9"] {
            assert!(given(&info(name, "fuse", "/x")).is_ok(), "{name}");
        }
        assert_eq!(given(&info("all", "fuse", "/x")), Err(NotGiven::Reserved));
    }

    #[test]
    fn of_a_device_that_the_kernel_has_the_file_is_that_of_its_driver() {
        let sysfs = tempfile::tempdir().unwrap();
        let of = |name| Given::of(&info(name, "vduse", "/dev/vduse/x"), Path::new("/d"), sysfs.path());
        let refused = of("v0").unwrap_err();
        assert!(refused.to_string().contains("bind vhost"), "{refused}");
        fs::create_dir_all(sysfs.path().join("bus/vdpa/devices/v0/virtio0")).unwrap();
        assert_eq!(of("v0"), Err(NotGiven::KernelDriver { name: "v0".into() }));
        fs::create_dir_all(sysfs.path().join("bus/vdpa/devices/v0/vhost-vdpa-12")).unwrap();
        let found = of("v0").unwrap();
        assert_eq!((found.host, found.kind), (PathBuf::from("/dev/vhost-vdpa-12"), FileKind::Character));
        assert_eq!(found.container, Path::new("/d/v0"));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_or_stays() {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec::new(&[given(&info("a", "fuse", "/x")).unwrap()]).unwrap();
        let path = dir.path().join("vdpa.json");
        fs::write(&path, "before").unwrap();
        spec.write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), spec.text());
        // A directory cannot be replaced by a file: the rename fails, and nothing is left behind.
        let taken = dir.path().join("taken.json");
        fs::create_dir(&taken).unwrap();
        spec.write(&taken).unwrap_err();
        let left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}
