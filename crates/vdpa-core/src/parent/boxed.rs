//! A boxed parent is a parent.

use super::{Dma, Parent, Profile, QueueStats, Upstream};
use crate::errno::Errno;
use crate::features::Features;
use crate::host::Host;
use crate::net::MAC_BYTES;
use crate::types::{QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

impl<P: Parent + ?Sized> Parent for Box<P> {
    type Host = P::Host;

    fn profile(&self) -> &Profile {
        (**self).profile()
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        (**self).read_config(offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        (**self).write_config(offset, data);
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        (**self).negotiate(features)
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<Self::Host>,
        state: QueueState,
    ) -> Result<(), Errno> {
        (**self).start_queue(index, setup, state)
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        (**self).stop_queue(index)
    }

    fn dma(&mut self) -> Dma<'_, Self::Host> {
        (**self).dma()
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn claim(&mut self) -> Result<()> {
        (**self).claim()
    }

    fn fail(&mut self) -> Result<()> {
        (**self).fail()
    }

    fn needs_reset(&self) -> bool {
        (**self).needs_reset()
    }

    fn set_config_call(&mut self, event: Option<&<Self::Host as Host>::Event>) {
        (**self).set_config_call(event);
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        (**self).queue_stats(index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        (**self).vendor_stats(index)
    }

    fn set_mac(&mut self, mac: [u8; MAC_BYTES]) -> Result<()> {
        (**self).set_mac(mac)
    }

    fn set_link(&mut self, up: bool) -> Result<()> {
        (**self).set_link(up)
    }

    fn save_state(&self) -> Vec<u8> {
        (**self).save_state()
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        (**self).restore_state(state)
    }

    fn moved(&mut self) {
        (**self).moved();
    }

    fn is_restored(&self) -> bool {
        (**self).is_restored()
    }

    fn upstream(&mut self) -> Option<Upstream<'_, Self::Host>> {
        (**self).upstream()
    }

    fn resumed(&mut self) {
        (**self).resumed();
    }

    fn bind_owner(&mut self, owner: Option<&<Self::Host as Host>::AddressSpace>) -> Result<()> {
        (**self).bind_owner(owner)
    }
}
