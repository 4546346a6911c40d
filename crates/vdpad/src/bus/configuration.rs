//! The configuration files, and what runs.

use vdpa_control::api::{AddRequest, CtlError, Reloaded};
use vdpa_control::files::Configuration;
use vdpa_core::Errno;

use super::Bus;
use crate::control::Backend;

impl Bus {
    /// Adds the devices that are written and do not run. Changes none that runs: its client would lose it.
    ///
    /// # Errors
    /// As [`Backend::reload`]. Devices before the one that cannot be added have been.
    pub(super) fn reload_configuration(&self) -> Result<Reloaded, CtlError> {
        let written = Configuration::read(&self.configuration)
            .map_err(|error| CtlError::new(Errno::INVAL, error.to_string()))?;
        let mut done = Reloaded::default();
        let running = self.running()?.devices;
        for device in &written.devices {
            let name = &device.request.name;
            match running.iter().find(|other| other.name == *name) {
                Some(other) if is_same(other, &device.request) => {}
                Some(_) => done.differ.push(name.clone()),
                None => {
                    self.add(device.request.clone(), Vec::new()).map_err(|error| {
                        let hint = error.hint.unwrap_or_default();
                        CtlError::new(error.errno, format!("{}: device {name}: {}", device.at, error.message))
                            .with_hint(hint)
                    })?;
                    done.added.push(name.clone());
                }
            }
        }
        done.unwritten = running.into_iter().map(|request| request.name).collect();
        done.unwritten.retain(|name| written.device(name).is_none());
        tracing::info!(?done, "configuration read again");
        Ok(done)
    }
}

/// Whether both ask for the same, in whatever order.
fn is_same(one: &AddRequest, other: &AddRequest) -> bool {
    let sorted = |request: &AddRequest| {
        let mut attrs: Vec<_> =
            request.attrs.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        attrs.sort();
        attrs
    };
    one.mgmtdev == other.mgmtdev && sorted(one) == sorted(other)
}
