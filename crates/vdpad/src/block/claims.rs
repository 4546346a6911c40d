//! Bytes of a disk that operations in flight change, where some of them may not be changed by two at a time.

use std::num::NonZeroU32;

/// Bytes of the disk that an operation changes, until its request is answered or only has to become stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// The first one.
    pub(crate) first: u64,
    /// The one behind the last.
    pub(crate) end: u64,
    /// Nobody else may change any of them meanwhile: they are read, and written back with changes.
    pub(crate) alone: bool,
}

impl Claim {
    const fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end && other.first < self.end
    }

    /// Whether the two cannot be carried out at the same time.
    const fn conflicts(&self, other: &Self) -> bool {
        (self.alone || other.alone) && self.overlaps(other)
    }
}

/// Names a claim that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClaimId(NonZeroU32);

/// The claims that were granted, and what waits for one.
#[derive(Debug)]
pub(super) struct Claims<T> {
    granted: Vec<Option<Claim>>,
    free: Vec<ClaimId>,
    /// In the order in which they came, so that none waits for ever.
    waiting: Vec<(Claim, T)>,
}

impl<T> Default for Claims<T> {
    fn default() -> Self {
        Self { granted: Vec::new(), free: Vec::new(), waiting: Vec::new() }
    }
}

impl<T> Claims<T> {
    /// Grants a claim to what comes with it, or keeps both until nothing that came before is in its way.
    pub(super) fn ask(&mut self, claim: Claim, what: T) -> Option<(ClaimId, T)> {
        if self.is_in_the_way(&claim, self.waiting.len()) {
            self.waiting.push((claim, what));
            return None;
        }
        Some((self.grant(claim), what))
    }

    /// Gives a claim back; what has waited for it and is granted its own now.
    pub(super) fn release(&mut self, id: ClaimId) -> Vec<(ClaimId, T)> {
        let Some(released) = self.granted.get_mut(id.place()).and_then(Option::take) else {
            return Vec::new();
        };
        self.free.push(id);
        let mut granted = Vec::new();
        let mut at = 0;
        while let Some((claim, _)) = self.waiting.get(at) {
            let claim = *claim;
            if claim.conflicts(&released) && !self.is_in_the_way(&claim, at) {
                let (claim, what) = self.waiting.remove(at);
                granted.push((self.grant(claim), what));
            } else {
                at += 1;
            }
        }
        granted
    }

    /// What waits.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter().map(|(_, what)| what)
    }

    /// What waits, to be changed.
    pub(super) fn waiting_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.waiting.iter_mut().map(|(_, what)| what)
    }

    /// How many wait.
    pub(super) const fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether something that was granted, or one of the first `before` that wait, conflicts with a claim.
    fn is_in_the_way(&self, claim: &Claim, before: usize) -> bool {
        self.granted.iter().flatten().any(|other| other.conflicts(claim))
            || self.waiting.iter().take(before).any(|(other, _)| other.conflicts(claim))
    }

    fn grant(&mut self, claim: Claim) -> ClaimId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.granted.push(None);
            // There are as many as requests in flight.
            ClaimId(
                u32::try_from(self.granted.len()).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MAX),
            )
        });
        if let Some(place) = self.granted.get_mut(id.place()) {
            *place = Some(claim);
        }
        id
    }
}

impl ClaimId {
    const fn place(self) -> usize {
        self.0.get() as usize - 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(first: u64, end: u64, alone: bool) -> Claim {
        Claim { first, end, alone }
    }

    #[test]
    fn plain_claims_share_and_lone_ones_wait_for_their_turn() {
        let mut claims = Claims::default();
        let (first, _) = claims.ask(claim(0, 8, false), 'a').unwrap();
        let (second, _) = claims.ask(claim(4, 12, false), 'b').unwrap();
        assert_eq!(claims.ask(claim(7, 8, true), 'c'), None);
        assert_eq!(claims.ask(claim(7, 8, false), 'd'), None, "it does not overtake one that waits");
        assert!(
            claims.ask(claim(8, 9, true), 'e').is_none() && claims.ask(claim(20, 21, true), 'f').is_some()
        );
        assert_eq!(claims.release(first), [], "the second is in the way of the third");
        let granted = claims.release(second);
        assert_eq!(granted.iter().map(|(_, what)| *what).collect::<String>(), "ce");
        assert_eq!(claims.release(granted[1].0), []);
        assert_eq!(claims.release(granted[0].0).iter().map(|(_, what)| *what).collect::<String>(), "d");
        assert_eq!(claims.waiting_len(), 0);
    }

    proptest! {
        /// Whatever is granted at the same time does not conflict, and everything is granted in the end.
        #[test]
        fn nothing_conflicts_and_nothing_is_forgotten(
            asked in prop::collection::vec((0u64..32, 1u64..8, any::<bool>(), 0usize..4), 1..60)
        ) {
            let mut claims = Claims::default();
            let mut held: Vec<(ClaimId, Claim)> = Vec::new();
            let mut seen = 0;
            for &(first, len, alone, releases) in &asked {
                let new = claim(first, first + len, alone);
                held.extend(claims.ask(new, new));
                for _ in 0..releases.min(held.len()) {
                    let (id, _) = held.remove(releases * 7 % held.len());
                    seen += 1;
                    held.extend(claims.release(id));
                }
                for (at, (_, one)) in held.iter().enumerate() {
                    prop_assert!(held[..at].iter().all(|(_, other)| !other.conflicts(one)));
                }
            }
            while let Some((id, _)) = held.pop() {
                seen += 1;
                held.extend(claims.release(id));
            }
            prop_assert_eq!((seen, claims.waiting_len()), (asked.len(), 0));
        }
    }
}
