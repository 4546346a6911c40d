//! Named places in the daemon at which a test can kill it.
//!
//! With the feature `crash-points`, [`reach`] calls the hook that was set with [`on_reach`]. Without the feature it is a constant
//! function that does nothing, and the compiler removes every call.

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident = $name:literal;)*) => {
        /// A place at which a crash is delicate.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum CrashPoint {
            $($(#[$doc])* $point,)*
        }

        #[cfg(feature = "crash-points")]
        impl CrashPoint {
            /// All, in the order of the paths through the daemon.
            pub const ALL: &[Self] = &[$(Self::$point),*];

            /// The name, for logs and tests.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$point => $name,)* }
            }
        }
    };
}

points! {
    // A request on a device file.
    /// The reader has read a request from the kernel.
    RequestRead = "request-read";
    /// The device's thread has taken the request from its queue.
    RequestBegun = "request-begun";
    /// The device has executed the request, and nobody knows of it.
    RequestExecuted = "request-executed";
    /// A descriptor that the change names is about to be held.
    HoldBegun = "hold-begun";
    /// The first of the three descriptors of an address space is held.
    SpaceHalfHeld = "space-half-held";
    /// A descriptor is held, and no record names it.
    ObjectHeld = "object-held";
    /// The record of the change is complete, and not in the journal.
    RecordReady = "record-ready";
    /// The bytes of the record are in the journal, and do not count.
    RecordWritten = "record-written";
    /// The record counts.
    RecordCommitted = "record-committed";
    /// The new half of the journal is written, and the old one is in force.
    CheckpointWritten = "checkpoint-written";
    /// The new half of the journal is in force.
    CheckpointSwitched = "checkpoint-switched";
    /// A descriptor that nothing names any more was released, others were not.
    ObjectReleased = "object-released";
    /// Everything is saved, and the client has no answer.
    ReplyReady = "reply-ready";
    /// The client has its answer.
    ReplySent = "reply-sent";

    /// A queue was started, and neither its log nor the journal knows of it.
    QueueStarted = "queue-started";

    // A device is added.
    /// The device exists in the daemon only.
    AddCreated = "add-created";
    /// Journal and in-flight logs are held.
    AddLogHeld = "add-log-held";
    /// The device file is there.
    AddFileMade = "add-file-made";
    /// What the device is, is held: from here on it is restored.
    AddIdentityHeld = "add-identity-held";
    /// The device is complete.
    AddDone = "add-done";

    // A device is deleted.
    /// The device file is gone.
    DelFileRemoved = "del-file-removed";
    /// The client has lost the device.
    DelRevoked = "del-revoked";
    /// What the device is, is held no more.
    DelIdentityReleased = "del-identity-released";
    /// Nothing of it is held.
    DelDone = "del-done";

    // A request in a ring.
    /// The chain was read, and the log does not know of it.
    ChainWalked = "chain-walked";
    /// The descriptors of a packed request are in the log, and do not count.
    DescriptorsLogged = "descriptors-logged";
    /// The log says that the request was taken.
    TakenLogged = "taken-logged";
    /// Operations are about to be handed to the kernel.
    SubmitBegun = "submit-begun";
    /// The kernel has the operations, some of them may have ended.
    Submitted = "submitted";
    /// The result of an operation was taken from io_uring.
    CompletionTaken = "completion-taken";
    /// Status and data of the request are in the client's memory.
    StatusWritten = "status-written";
    /// A packet is in its receive buffer, and neither chain is answered.
    PacketCopied = "packet-copied";
    /// Some of the chains of a packet are answered, and others are not.
    PacketHalfDone = "packet-half-done";
    /// A packet is at the interface, and its chain is not answered.
    PacketSent = "packet-sent";
    /// A packet was read from the interface, and none of its buffers is answered.
    PacketRead = "packet-read";
    /// A command of a control queue has had its effect, and has no answer.
    CommandDone = "command-done";
    /// The used element is in the ring, and the log does not know of it.
    UsedWritten = "used-written";
    /// The log says that the request was answered.
    PushedLogged = "pushed-logged";
    /// The driver can see the answer, and the log does not know of it.
    UsedPublished = "used-published";
    /// The log says that the driver can see the answer.
    PublishedLogged = "published-logged";
    /// The driver can see the answer and is about to be signalled.
    SignalBegun = "signal-begun";
    /// The driver was signalled.
    Signalled = "signalled";

    // A daemon goes on for another one.
    /// Everything that is held was received.
    ItemsListed = "items-listed";
    /// The connection to the kernel was taken over, and is not served.
    ConnectionAdopted = "connection-adopted";
    /// The journal of a device was read.
    JournalRead = "journal-read";
    /// The device exists again, with its disk, without its state.
    ParentMade = "parent-made";
    /// The device has its state, and no queue runs.
    StateRestored = "state-restored";
    /// The queues were started.
    QueuesResumed = "queues-resumed";
    /// A ring was continued from its log.
    RingRecovered = "ring-recovered";
    /// A request that another process had begun is about to be done again.
    RepeatTaken = "repeat-taken";
    /// The device file is there again.
    FileRestored = "file-restored";
    /// The kernel was told to send unanswered requests again.
    Resent = "resent";
    /// The control socket is open.
    ControlOpen = "control-open";
    /// The holder knows that this process serves.
    ReadySaid = "ready-said";

    // The daemon is replaced by another program.
    /// The candidate checks what is held.
    CandidateBegun = "candidate-begun";
    /// The candidate is about to say that it is ready.
    CandidateChecked = "candidate-checked";
    /// The candidate has said that it is ready.
    CandidateReady = "candidate-ready";
    /// The daemon has had a candidate started.
    UpgradePrepared = "upgrade-prepared";
    /// The daemon knows that the candidate is ready.
    UpgradeReady = "upgrade-ready";
    /// The daemon is about to commit.
    CommitBegun = "commit-begun";
    /// The candidate is the daemon, the old one still runs.
    Committed = "committed";
    /// The candidate knows that it is the daemon.
    CommitReceived = "commit-received";
    /// The new daemon serves the rings.
    TakenOver = "taken-over";
}

/// A process has come to `point`.
#[cfg(not(feature = "crash-points"))]
#[inline]
pub const fn reach(_point: CrashPoint) {}

#[cfg(feature = "crash-points")]
pub use hook::{on_reach, reach};

#[cfg(feature = "crash-points")]
mod hook {
    use std::sync::OnceLock;

    use super::CrashPoint;

    static HOOK: OnceLock<fn(CrashPoint)> = OnceLock::new();

    /// A process has come to `point`.
    #[inline]
    pub fn reach(point: CrashPoint) {
        if let Some(hook) = HOOK.get() {
            hook(point);
        }
    }

    /// Sets what every point of this process calls, on the thread that comes to it. Only the first call has an effect.
    pub fn on_reach(hook: fn(CrashPoint)) {
        let _ = HOOK.set(hook);
    }
}
