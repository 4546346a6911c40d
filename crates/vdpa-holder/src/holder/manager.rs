//! What the service manager and the log are told.

use std::fs;

use rustix::process::Signal;
use vdpa_sys::clock;

use super::Holder;
use crate::protocol::End;

/// Signals that end a daemon, for the log.
const NAMES: [(Signal, &str); 12] = [
    (Signal::ABORT, "SIGABRT"),
    (Signal::BUS, "SIGBUS"),
    (Signal::FPE, "SIGFPE"),
    (Signal::HUP, "SIGHUP"),
    (Signal::ILL, "SIGILL"),
    (Signal::INT, "SIGINT"),
    (Signal::KILL, "SIGKILL"),
    (Signal::QUIT, "SIGQUIT"),
    (Signal::SEGV, "SIGSEGV"),
    (Signal::SYS, "SIGSYS"),
    (Signal::TERM, "SIGTERM"),
    (Signal::TRAP, "SIGTRAP"),
];

impl Holder {
    /// Says that the daemon serves, and which it is.
    pub(super) fn tell_manager(&mut self) {
        self.reloading = false;
        if let Some(counts) = &self.counts {
            counts.save(&self.status);
        }
        let Some(store) = &self.store else { return };
        let (ready, pid, generation) =
            (if self.served { "READY=1\n" } else { "" }, self.daemon.pid, self.status.generation);
        let _ = store.notify(&format!("{ready}STATUS=daemon {pid}, generation {generation}"));
    }

    /// SIGTERM or SIGINT: the daemon is to end. One that takes the place of another and does not serve yet would die of the signal, and its
    /// mounts would be left; so would those of one that crashes at this moment. So the next that serves gets the signal too. A second
    /// signal does not wait.
    pub(super) fn stop(&mut self, signal: Signal) {
        if !self.served || self.stop_wanted.replace(signal).is_some() {
            self.stopping = true;
            self.daemon.signal(signal);
        } else if self.daemon.ready {
            self.daemon.signal(signal);
        }
    }

    /// Whether a daemon has ended because it was to end, or could not begin to serve. That it has crashed meanwhile is another matter.
    pub(super) fn has_stopped(&self, end: End) -> bool {
        match self.stop_wanted {
            Some(signal) => end.signal == 0 || (self.daemon.ready && end.signal == signal.as_raw()),
            None => !self.served && end.signal == 0,
        }
    }

    /// Whether the service is to end.
    pub(super) const fn is_stopping(&self) -> bool {
        self.stopping || self.stop_wanted.is_some()
    }

    /// SIGHUP: the daemon is to upgrade itself. One that does not serve yet would die of the signal.
    pub(super) fn reload(&mut self) {
        if !self.daemon.ready {
            self.reload_wanted = true;
            return;
        }
        self.reload_wanted = false;
        self.reloading = true;
        if let Some(store) = &self.store {
            let now = clock::monotonic_ns() / 1000;
            let _ = store.notify(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
        }
        self.daemon.signal(Signal::HUP);
    }
}

/// Logs a crash, after the daemon was collected.
pub(super) fn log_crash(end: &End) {
    let End { pid, status, core, hung, .. } = *end;
    let signal = signal_name(end.signal);
    let dump =
        core.then(|| core_place(&fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default()));
    tracing::error!(
        pid,
        signal,
        status,
        core = dump.as_deref().unwrap_or("none"),
        hung,
        "the daemon has crashed"
    );
}

fn signal_name(number: i32) -> String {
    let name = NAMES.iter().find(|(signal, _)| signal.as_raw() == number).map(|(_, name)| *name);
    match (number, name) {
        (0, _) => "none".into(),
        (_, Some(name)) => name.into(),
        _ => number.to_string(),
    }
}

/// Where the kernel puts cores under this pattern (core(5)).
fn core_place(pattern: &str) -> String {
    let pattern = pattern.trim_end();
    match pattern.strip_prefix('|') {
        Some(program) => format!("given to {}", program.split(' ').next().unwrap_or_default()),
        None => match pattern.strip_prefix('@') {
            Some(socket) => format!("sent to the socket {socket}"),
            None if pattern.starts_with('/') => format!("at {pattern}"),
            None => format!("at {pattern} in the working directory of the daemon"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_core_is_what_the_pattern_says() {
        assert_eq!(
            core_place("|/usr/lib/systemd/systemd-coredump %P %u\n"),
            "given to /usr/lib/systemd/systemd-coredump"
        );
        assert_eq!(core_place("/var/core/%e.%p\n"), "at /var/core/%e.%p");
        assert_eq!(core_place("core\n"), "at core in the working directory of the daemon");
        assert_eq!(core_place("@/run/core.socket"), "sent to the socket /run/core.socket");
        assert_eq!(
            (signal_name(9), signal_name(0), signal_name(40)),
            ("SIGKILL".into(), "none".into(), "40".into())
        );
    }
}
