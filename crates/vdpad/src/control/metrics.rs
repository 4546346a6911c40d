//! What a monitoring system is told, in the text format of OpenMetrics.

use std::fmt;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use vdpa_control::api::{DaemonInfo, DaemonRole, DevInfo, UpdateInfo};
use vdpa_core::features::Status;
use vdpa_core::host::PAGE_SIZE;

/// Type of the answer.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfDevice {
    device: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfQueue {
    device: String,
    queue: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfError {
    device: String,
    queue: u16,
    kind: &'static str,
}

type Seconds = Gauge<f64, AtomicU64>;

/// What is told: the daemon, and its devices as far as they answer (`None`: they do not).
pub(super) struct Told<'a> {
    pub(super) daemon: &'a DaemonInfo,
    pub(super) devices: Option<&'a [DevInfo]>,
    pub(super) updates: Option<&'a [UpdateInfo]>,
}

impl Told<'_> {
    /// The text. Counters are those that survive crashes and upgrades.
    ///
    /// # Errors
    /// Of the formatter; none is known.
    pub(super) fn encode(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("vdpad");
        self.daemon(&mut registry);
        let complete = Gauge::<i64>::default();
        complete.set(i64::from(self.devices.is_some() && self.updates.is_some()));
        registry.register(
            "devices_complete",
            "Whether every device has answered; if not, none is told of",
            complete,
        );
        self.devices.into_iter().for_each(|devices| devices_of(&mut registry, devices));
        self.devices.into_iter().for_each(|devices| queues_of(&mut registry, devices));
        self.updates.into_iter().for_each(|updates| updates_of(&mut registry, updates));
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }

    fn daemon(&self, registry: &mut Registry) {
        let DaemonInfo { version, since, role, poison, holder, .. } = self.daemon;
        registry.register("build", "The version of the daemon", Info::new([("version", version.clone())]));
        let at = Seconds::default();
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit")]
        at.set(*since as f64);
        registry.register_with_unit(
            "start_time",
            "When this daemon began to serve, since 1970",
            Unit::Seconds,
            at,
        );
        let failed = Gauge::<i64>::default();
        failed.set(i64::from(*role == DaemonRole::Failed));
        registry.register("failed", "Whether it has crashed too often and answers with errors", failed);
        count(registry, "poison_requests", "Requests refused because daemons had died of them", *poison);
        let Some(holder) = holder else { return };
        count(registry, "upgrades", "Upgrades of the daemon since its holder runs", holder.upgrades);
        count(registry, "crashes", "Crashes of the daemon since its holder runs", holder.crashes);
        let held = Gauge::<i64>::default();
        held.set(signed(holder.held));
        registry.register("held_descriptors", "Descriptors that the holder keeps", held);
        if let Some(crash) = &holder.last_crash {
            let recovery = Seconds::default();
            recovery.set(crash.recovery_ms / 1e3);
            let help = "From the notice of the last crash until the next daemon served";
            registry.register_with_unit("last_recovery", help, Unit::Seconds, recovery);
        }
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn count(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let counter = Counter::<u64>::default();
    counter.inc_by(value);
    registry.register(name, help, counter);
}

fn devices_of(registry: &mut Registry, devices: &[DevInfo]) {
    let mut gauge = |name: &str, help: &str, unit: Option<Unit>, value: fn(&DevInfo) -> u64| {
        let family = Family::<OfDevice, Gauge>::default();
        for info in devices {
            family.get_or_create(&OfDevice { device: info.name.clone() }).set(signed(value(info)));
        }
        match unit {
            Some(unit) => registry.register_with_unit(name, help, unit, family),
            None => registry.register(name, help, family),
        }
    };
    gauge("device_open", "Whether a client has the device open", None, |info| info.state.open.into());
    gauge("device_suspended", "Whether the device is suspended", None, |info| info.state.suspended.into());
    let needs_reset = |info: &DevInfo| info.state.status.contains(Status::NEEDS_RESET).into();
    gauge("device_needs_reset", "Whether the device has failed and needs a reset", None, needs_reset);
    gauge("device_mappings", "Mappings of client memory", None, |info| info.state.mappings);
    let pinned = |info: &DevInfo| info.state.pinned_pages * PAGE_SIZE;
    gauge("device_pinned", "Client memory charged as pinned for the device", Some(Unit::Bytes), pinned);
}

fn queues_of(registry: &mut Registry, devices: &[DevInfo]) {
    let requests = Family::<OfQueue, Counter>::default();
    let bytes = Family::<OfQueue, Counter>::default();
    let errors = Family::<OfError, Counter>::default();
    let running = Family::<OfQueue, Gauge>::default();
    for info in devices {
        for queue in &info.state.queues {
            let (device, index) = (info.name.clone(), queue.index);
            let labels = OfQueue { device: device.clone(), queue: index };
            requests.get_or_create(&labels).inc_by(queue.requests);
            bytes.get_or_create(&labels).inc_by(queue.bytes);
            running.get_or_create(&labels).set(queue.running.into());
            for (kind, number) in
                [("failed", queue.errors.saturating_sub(queue.poison)), ("poison", queue.poison)]
            {
                let labels = OfError { device: device.clone(), queue: index, kind };
                errors.get_or_create(&labels).inc_by(number);
            }
        }
    }
    registry.register("queue_requests", "Requests answered since the device was created", requests);
    registry.register_with_unit("queue_transferred", "Bytes of data that they moved", Unit::Bytes, bytes);
    let help =
        "Requests answered with an error: by the disk or for what they ask, or because daemons died of them";
    registry.register("queue_errors", help, errors);
    registry.register("queue_running", "Whether the device is processing the queue", running);
}

fn updates_of(registry: &mut Registry, updates: &[UpdateInfo]) {
    let mut counter = |name: &str, help: &str, value: fn(&UpdateInfo) -> u64| {
        let family = Family::<OfDevice, Counter>::default();
        for update in updates {
            family.get_or_create(&OfDevice { device: update.name.clone() }).inc_by(value(update));
        }
        registry.register(name, help, family);
    };
    counter("device_owner_changes", "Changes of the owner", |update| update.owner_changes);
    counter("device_updates", "Updates of clients that were reported as done", |update| update.updates);
    let help = "Updates of clients that were reported as rolled back";
    counter("device_updates_rolled_back", help, |update| update.rolled_back);
    let blackout = Family::<OfDevice, Seconds>::default();
    for update in updates {
        if let Some(last) = &update.last {
            #[expect(clippy::cast_precision_loss, reason = "nanoseconds of an update fit")]
            let seconds = last.total_ns as f64 / 1e9;
            blackout.get_or_create(&OfDevice { device: update.name.clone() }).set(seconds);
        }
    }
    let help = "How long no driver was there in the last update of a client";
    registry.register_with_unit("device_last_update", help, Unit::Seconds, blackout);
}
