//! A queue that moves to another host.

use super::Vring;
use crate::device::state::VringState;
use crate::host::Host;
use crate::types::{GroupIndex, QueueIndex};

impl<H: Host> Vring<H> {
    /// What is saved of queue `index` for another host: no events, and it rests.
    pub(in crate::device) const fn save_to_move(&self, index: QueueIndex, group: GroupIndex) -> VringState {
        VringState {
            index,
            group,
            num: self.num,
            addr: self.addr,
            state: self.state,
            busyloop_timeout: self.busyloop_timeout,
            enabled: self.ready,
            running: false,
            started: None,
            call_installed: false,
            kick: None,
            call: None,
            err: None,
        }
    }

    /// Makes a queue what one was on another host, which was checked. Its events stay; the call event has to be set anew, as
    /// after a reset.
    pub(in crate::device) fn load(&mut self, saved: &VringState) {
        self.num = saved.num;
        self.addr = saved.addr;
        self.state = saved.state;
        self.busyloop_timeout = saved.busyloop_timeout;
        self.ready = saved.enabled;
    }

    /// Whether the parent serves it.
    pub(in crate::device) const fn runs(&self) -> bool {
        self.running
    }
}
