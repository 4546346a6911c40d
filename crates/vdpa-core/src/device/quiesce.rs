//! Stopping the queues of a device to give it away, and starting them where it has got to.

use thiserror::Error;

use crate::device::Device;
use crate::errno::Errno;
use crate::features::Features;
use crate::parent::Parent;
use crate::types::{QueueIndex, Result};
use crate::vq::QueueState;

/// Why queues do not run again. Those that did are stopped again, and another attempt is possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ResumeError {
    /// A position for a queue that did not run.
    #[error("queue {index} has a position and did not run")]
    NotRunning {
        /// Its index.
        index: QueueIndex,
    },
    /// A position at which this queue cannot have stopped: of the other kind of ring, or beyond 15 bits.
    #[error("queue {index} cannot be at {state:?}")]
    Position {
        /// Its index.
        index: QueueIndex,
        /// The position.
        state: QueueState,
    },
    /// The parent is served by somebody else.
    #[error("the device cannot run: {errno}")]
    Claim {
        /// What the parent's [`claim`](Parent::claim) reports.
        errno: Errno,
    },
    /// The parent does not start a queue.
    #[error("queue {index} does not start: {errno}")]
    Start {
        /// Its index.
        index: QueueIndex,
        /// What the parent reports.
        errno: Errno,
    },
}

impl<P: Parent> Device<P> {
    /// Stops all queues, so that the device can be saved and given away, and keeps everything else: no client notices.
    /// Returns the positions of those that ran. Until [`resume_queues`](Self::resume_queues) no queue starts, and whoever
    /// called this makes no requests but those that ask something.
    ///
    /// Called by the process that gives the device away. Blocks until requests in flight are done.
    ///
    /// # Errors
    /// `EIO` when a queue does not come to rest; all queues run on then.
    pub fn quiesce(&mut self) -> Result<Vec<(QueueIndex, QueueState)>> {
        if let Err(errno) = self.stop_to_resume() {
            if !self.quiesced {
                self.start_stopped();
            }
            return Err(errno);
        }
        self.quiesced = true;
        Ok(self.stopped_queues())
    }

    /// Starts the queues that ran before [`quiesce`](Self::quiesce), or in the process the device was
    /// [restored](Self::restore) from: those in `positions` from there, the others from where they were saved.
    ///
    /// They go on with the ring they ran in, whatever the client has set meanwhile for a later start. It can change features
    /// and position, so that a position need not fit the ring. The parent decides about such a start; when it refuses, the queue stays stopped, as after GET_VRING_BASE.
    ///
    /// Called by the process that takes the device over, with the positions that a log of requests in flight gives; and
    /// by the one that gave it away, with none, when it goes on after all. A device that is not quiesced is left as it
    /// is. Does not block for long.
    ///
    /// # Errors
    /// See [`ResumeError`]; the device is still quiesced then.
    pub fn resume_queues(&mut self, positions: &[(QueueIndex, QueueState)]) -> Result<(), ResumeError> {
        if !self.quiesced {
            return Ok(());
        }
        positions.iter().try_for_each(|&(index, state)| self.check_position(index, state))?;
        let stopped = self.stopped_queues();
        if !stopped.is_empty() {
            self.parent.claim().map_err(|errno| ResumeError::Claim { errno })?;
        }
        for &(index, state) in positions {
            self.touch(index);
            if let Some(vring) = self.vrings.get_mut(usize::from(index.0)) {
                vring.set_state(state);
            }
        }
        self.quiesced = false;
        for &(index, _) in &stopped {
            if let Err(errno) = self.try_go_on(index) {
                // No attempt can start a queue whose position does not fit its ring, so that the others do not wait for it.
                if !self.position_fits(index) {
                    continue;
                }
                // What was started is stopped where it is now: it may have served requests. One that does not come to
                // rest is stopped by the next attempt to give the device away, or by a reset.
                let _ = self.stop_to_resume();
                self.quiesced = true;
                return Err(ResumeError::Start { index, errno });
            }
        }
        self.vrings.iter_mut().for_each(|vring| vring.set_resumes(false));
        self.parent.resumed();
        Ok(())
    }

    /// Whether queues are stopped to give the device away, or not started yet after it was restored.
    pub const fn is_quiesced(&self) -> bool {
        self.quiesced
    }

    /// The queues that [`resume_queues`](Self::resume_queues) starts, and where they are.
    pub fn stopped_queues(&self) -> Vec<(QueueIndex, QueueState)> {
        let set = self.features_set();
        let queues = self.queue_indices().zip(&self.vrings);
        let stopped = queues.filter(|(_, vring)| vring.resumes());
        stopped.map(|(index, vring)| (index, vring.position(vring.features(set)))).collect()
    }

    /// Checks that a queue can have stopped at `state`. The ring size is not compared; whoever uses the position for memory
    /// accesses compares it with the ring.
    fn check_position(&self, index: QueueIndex, state: QueueState) -> Result<(), ResumeError> {
        let vring = self.vrings.get(usize::from(index.0)).filter(|vring| vring.resumes());
        let vring = vring.ok_or(ResumeError::NotRunning { index })?;
        let started = vring.position(vring.features(self.features_set()));
        let possible = match (started, state) {
            (QueueState::Split { .. }, QueueState::Split { .. }) => true,
            // SET_VRING_BASE can express 15 bits, whatever the ring size.
            (QueueState::Packed { .. }, QueueState::Packed { .. }) => state.is_encodable(),
            _ => false,
        };
        if possible { Ok(()) } else { Err(ResumeError::Position { index, state }) }
    }

    /// Whether a queue's position is one of the ring with which it goes on.
    fn position_fits(&self, index: QueueIndex) -> bool {
        let set = self.features_set();
        self.vrings.get(usize::from(index.0)).is_some_and(|vring| {
            let features = vring.features(set);
            let packed = features.has(Features::RING_PACKED);
            match vring.position(features) {
                QueueState::Split { .. } => !packed,
                QueueState::Packed { last_avail_idx, last_used_idx, .. } => {
                    packed && last_avail_idx < vring.size() && last_used_idx < vring.size()
                }
            }
        })
    }

    /// The features of the next start by the client.
    fn features_set(&self) -> Features {
        self.features.unwrap_or(Features::NONE)
    }

    /// Stops every queue, and remembers which ran. On an error those up to then are stopped.
    fn stop_to_resume(&mut self) -> Result<()> {
        for index in self.queue_indices() {
            let ran = self.stop(index)?;
            if let Some(vring) = self.vrings.get_mut(usize::from(index.0)).filter(|_| ran) {
                vring.set_resumes(true);
            }
        }
        Ok(())
    }

    /// Starts the queues that a quiesce has stopped before it failed.
    fn start_stopped(&mut self) {
        for (index, _) in self.stopped_queues() {
            // An error cannot be reported, as in `start`.
            let _ = self.try_go_on(index);
        }
        self.vrings.iter_mut().for_each(|vring| vring.set_resumes(false));
    }

    fn queue_indices(&self) -> impl Iterator<Item = QueueIndex> + use<P> {
        (0..self.parent.profile().queues).map(QueueIndex)
    }
}
