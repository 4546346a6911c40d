//! [`queue_methods!`](crate::queue_methods): what every device does whose queues a worker thread serves.

/// The methods of a [`Parent`](vdpa_core::parent::Parent) that are those of a
/// [`QueueControl`](crate::worker::QueueControl): `start_queue`, `stop_queue`, `needs_reset` and `set_config_call`.
///
/// For the `impl` block of a device. After the name that `self` has comes the expression for the control:
///
/// ```ignore
/// impl Parent for Disk {
///     type Host = LinuxHost;
///
///     vdpa_backend::queue_methods!(self => self.memory.queues());
///     // profile, read_config, ...
/// }
/// ```
///
/// [`SimpleDevice`](crate::SimpleDevice) is made so.
#[macro_export]
macro_rules! queue_methods {
    ($this:ident => $queues:expr) => {
        fn start_queue(
            &mut $this,
            index: $crate::exports::QueueIndex,
            setup: &$crate::exports::QueueSetup<$crate::exports::LinuxHost>,
            state: $crate::exports::QueueState,
        ) -> $crate::exports::Result<()> {
            $queues.start(index, setup, state)
        }

        fn stop_queue(
            &mut $this,
            index: $crate::exports::QueueIndex,
        ) -> $crate::exports::Result<Option<$crate::exports::QueueState>> {
            $queues.stop(index)
        }

        fn needs_reset(&$this) -> bool {
            $queues.needs_reset()
        }

        fn set_config_call(&mut $this, event: Option<&$crate::exports::EventFd>) {
            $queues.set_config_call(event);
        }
    };
}
