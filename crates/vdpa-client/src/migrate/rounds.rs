//! When to stop the machine: the rules of convergence.

use std::time::Duration;

/// How a migration goes. The fields have the defaults of [`Plan::default`].
#[derive(Clone, Debug)]
pub struct Plan {
    /// The machine is stopped when what is left to send is estimated to take no longer. 20 ms.
    pub downtime: Duration,
    /// Rounds at most before [`force`](Self::force) decides. 30.
    pub rounds: u32,
    /// After so many rounds in a row that leave more than nine tenths of what the round before has left, no further round helps, and
    /// `force` decides. 3.
    pub stall: u32,
    /// Whether the machine is stopped even where the downtime will be longer; otherwise the migration ends with
    /// [`NoConvergence`](super::MigrateError::NoConvergence). True.
    pub force: bool,
    /// Most bytes of memory in a second while the machine runs; `None` for as many as the stream takes. None.
    pub rate: Option<u64>,
    /// Whether pages that are written are tracked. Without, all memory is copied while the machine stands still. True.
    pub track: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(20),
            rounds: 30,
            stall: 3,
            force: true,
            rate: None,
            track: true,
        }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Another round while the machine runs.
    Round,
    /// Stop the machine.
    Stop,
    /// Give up.
    GiveUp,
}

/// The rounds so far.
#[derive(Debug, Default)]
pub(super) struct Convergence {
    rounds: u32,
    stalled: u32,
    left: Option<u64>,
    /// Bytes that arrived, and in which time: of all rounds, the newest counting half.
    speed: Option<f64>,
}

impl Convergence {
    pub(super) const fn rounds(&self) -> u32 {
        self.rounds
    }

    /// A round has sent `bytes` in `time`, and has left `left` bytes. What next?
    pub(super) fn after(&mut self, plan: &Plan, bytes: u64, time: Duration, left: u64) -> Decision {
        self.rounds += 1;
        let now = as_float(bytes) / time.as_secs_f64().max(1e-6);
        // A round of a few pages is all overhead, and says nothing of the speed.
        if bytes >= 1 << 20 || self.speed.is_none() {
            self.speed = Some(self.speed.map_or(now, |before| f64::midpoint(before, now)));
        }
        let shrinks = self.left.is_none_or(|before| as_float(left) <= as_float(before) * 0.9);
        self.stalled = if shrinks { 0 } else { self.stalled + 1 };
        self.left = Some(left);
        if self.estimate(left) <= plan.downtime {
            Decision::Stop
        } else if self.rounds < plan.rounds.max(1) && self.stalled < plan.stall.max(1) {
            Decision::Round
        } else if plan.force {
            Decision::Stop
        } else {
            Decision::GiveUp
        }
    }

    /// How long it takes to send so many bytes.
    pub(super) fn estimate(&self, bytes: u64) -> Duration {
        let seconds = as_float(bytes) / self.speed.unwrap_or(0.0).max(1.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
const fn as_float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The decisions for a machine that leaves `left` MiB after each round, over a stream of 100 MiB a second.
    fn decisions(plan: &Plan, left: impl Fn(u32) -> u64) -> (u32, Decision) {
        let mut rules = Convergence::default();
        let mut sent = 1000 * MIB;
        loop {
            let left = left(rules.rounds()) * MIB;
            let time = Duration::from_secs_f64(as_float(sent) / (100.0 * as_float(MIB)));
            match rules.after(plan, sent, time, left) {
                Decision::Round => sent = left,
                decision => return (rules.rounds(), decision),
            }
        }
    }

    #[test]
    fn the_machine_stops_when_the_rest_is_small_enough() {
        let plan = Plan::default();
        assert_eq!(decisions(&plan, |round| 500 >> round), (9, Decision::Stop), "2 MiB take 20 ms");
        assert_eq!(decisions(&plan, |_| 0), (1, Decision::Stop));
        let patient = Plan { downtime: Duration::from_secs(1), ..Plan::default() };
        assert_eq!(decisions(&patient, |round| 500 >> round), (4, Decision::Stop));
    }

    #[test]
    fn a_machine_that_writes_too_much_is_stopped_or_left_alone() {
        let plan = Plan::default();
        assert_eq!(decisions(&plan, |_| 300), (4, Decision::Stop), "three rounds that did not help");
        let careful = Plan { force: false, ..Plan::default() };
        assert_eq!(decisions(&careful, |_| 300), (4, Decision::GiveUp));
        let slow = |round| 1000 - 11 * u64::from(round) * u64::from(round).min(8);
        let few = Plan { rounds: 2, force: false, ..Plan::default() };
        assert_eq!(decisions(&few, slow), (2, Decision::GiveUp));
    }

    #[test]
    fn a_tiny_round_does_not_spoil_the_estimate() {
        let mut rules = Convergence::default();
        let plan = Plan { downtime: Duration::ZERO, ..Plan::default() };
        rules.after(&plan, 100 * MIB, Duration::from_secs(1), 10 * MIB);
        rules.after(&plan, 4096, Duration::from_secs(1), 10 * MIB);
        assert_eq!(rules.estimate(10 * MIB), Duration::from_millis(100));
        assert!(Convergence::default().estimate(MIB) > Duration::from_secs(3600), "nothing is known");
    }
}
