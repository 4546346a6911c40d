//! Completion in the order of availability (`VIRTIO_F_IN_ORDER`), for the device side of both ring formats.

use std::collections::VecDeque;

/// Requests of a ring that must publish completions in order (virtio 1.2 sections 2.7.9 and 2.8.13).
///
/// The device completes requests in any order. Each waits here until all earlier ones are completed. A run of completed
/// requests becomes one used element, that of the last.
#[derive(Debug)]
pub(super) struct InOrder {
    /// In the order of availability.
    requests: VecDeque<Request>,
    /// Sequence number of the first request, modulo 65536.
    first: u16,
    /// By request number: the sequence number of the request.
    numbers: Vec<Option<u16>>,
    /// A request from before the start is missing, so no later request may ever be published.
    stalled: bool,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    name: u16,
    writable: u64,
    /// Bytes written; `None` until the request is completed.
    written: Option<u32>,
}

/// Completed requests at the front for which one used element can stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of requests, at least 1.
    pub(super) count: u16,
    /// The last request.
    pub(super) name: u16,
    /// Bytes written for the last request. The writable buffers of all others are full, as the driver assumes.
    pub(super) written: u32,
}

impl InOrder {
    /// An empty queue for requests with numbers 0 to `size - 1`.
    pub(super) fn new(size: u16) -> Self {
        Self {
            requests: VecDeque::with_capacity(size.into()),
            first: 0,
            numbers: vec![None; size.into()],
            stalled: false,
        }
    }

    /// Stops publication for good.
    pub(super) const fn stall(&mut self) {
        self.stalled = true;
    }

    /// Adds the request `name`; `false` if it is present already.
    pub(super) fn add(&mut self, name: u16, writable: u64) -> bool {
        let Some(slot @ None) = self.numbers.get_mut(usize::from(name)) else { return false };
        let count = u16::try_from(self.requests.len()).unwrap_or(u16::MAX);
        *slot = Some(self.first.wrapping_add(count));
        self.requests.push_back(Request { name, writable, written: None });
        true
    }

    /// Says how many writable bytes the request `name` has, when that was not known as it was added.
    pub(super) fn set_writable(&mut self, name: u16, writable: u64) {
        let Some(&Some(number)) = self.numbers.get(usize::from(name)) else { return };
        if let Some(request) = self.requests.get_mut(usize::from(number.wrapping_sub(self.first))) {
            request.writable = writable;
        }
    }

    /// Removes the request added last.
    pub(super) fn remove_last(&mut self) {
        if let Some(request) = self.requests.pop_back() {
            self.forget(request.name);
        }
    }

    /// Marks the request `name` as completed; `false` if it is not present or was completed before.
    pub(super) fn complete(&mut self, name: u16, written: u32) -> bool {
        let Some(&Some(number)) = self.numbers.get(usize::from(name)) else { return false };
        let position = usize::from(number.wrapping_sub(self.first));
        let Some(request) = self.requests.get_mut(position) else { return false };
        if request.written.is_some() {
            return false;
        }
        request.written = Some(written);
        true
    }

    /// The longest run at the front; `None` if the first request is not completed.
    pub(super) fn run(&self) -> Option<Run> {
        if self.stalled {
            return None;
        }
        let mut run = None;
        for (count, request) in (1..).zip(&self.requests) {
            let Some(written) = request.written else { break };
            run = Some(Run { count, name: request.name, written });
            if u64::from(written) != request.writable {
                break;
            }
        }
        run
    }

    /// The numbers of the first `count` requests.
    pub(super) fn names(&self, count: u16) -> impl Iterator<Item = u16> {
        self.requests.iter().take(count.into()).map(|request| request.name)
    }

    /// Removes the first `count` requests.
    pub(super) fn drop_first(&mut self, count: u16) {
        for _ in 0..count {
            if let Some(request) = self.requests.pop_front() {
                self.forget(request.name);
                self.first = self.first.wrapping_add(1);
            }
        }
    }

    fn forget(&mut self, name: u16) {
        if let Some(slot) = self.numbers.get_mut(usize::from(name)) {
            *slot = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_before_an_incomplete_request_and_after_a_short_one() {
        let mut order = InOrder::new(4);
        for name in [2, 0, 3, 1] {
            assert!(order.add(name, 10));
        }
        assert!(!order.add(3, 1), "present already");
        assert!(order.complete(0, 10) && order.complete(3, 4) && order.complete(1, 10));
        assert!(!order.complete(3, 4), "completed already");
        assert_eq!(order.run(), None, "the first is not completed");
        assert!(order.complete(2, 10));
        assert_eq!(order.run(), Some(Run { count: 3, name: 3, written: 4 }));
        assert!(order.names(3).eq([2, 0, 3]));
        order.drop_first(3);
        assert_eq!(order.run(), Some(Run { count: 1, name: 1, written: 10 }));
        assert!(order.add(3, 0), "its number is free again");
        order.remove_last();
        assert!(!order.complete(3, 0));
        order.stall();
        assert_eq!(order.run(), None);
    }

    #[test]
    fn sequence_numbers_wrap() {
        let mut order = InOrder::new(2);
        order.first = u16::MAX;
        assert!(order.add(1, 0) && order.add(0, 0) && order.complete(0, 0) && order.complete(1, 0));
        assert_eq!(order.run(), Some(Run { count: 2, name: 0, written: 0 }));
    }
}
