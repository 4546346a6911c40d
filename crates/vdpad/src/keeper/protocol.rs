//! What daemon and keeper say to each other: one JSON object a packet of a `SOCK_SEQPACKET` socket, with descriptors beside it.
//!
//! A keeper may be of an earlier program than its daemon, which asks for its version first. So a request keeps its form for ever.

use serde::{Deserialize, Serialize};
use vdpa_core::types::{Asid, GroupIndex, IovaRange, Perm, QueueIndex};
use vdpa_sys::guest::ObjectId;

/// The version of the protocol. The second one added [`Request::MapAll`] and [`Request::UnmapAll`].
pub(super) const VERSION: u32 = 2;

/// Most bytes of a packet.
pub(super) const PACKET_MAX: usize = 16384;

/// Most bytes of configuration space in one request.
pub(super) const CONFIG_MAX: usize = 1024;

/// Most mappings in one answer, and in one request.
pub(super) const MAPPINGS_MAX: usize = 64;

/// In the lobby, with one end of a connection; the first one also with the device. Not answered there.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Enter {}

/// A request. Those of a device are named as those of [`VdpaOps`](vdpa_core::ops::VdpaOps), whose errors are the answer's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// First on a connection: the version of the daemon. Answered with that of the keeper if it is lower, so that both understand it.
    Hello {
        version: u32,
    },
    /// This connection is the one that may change the device from now on; one that was gets `ESTALE`.
    Take,
    /// Closes the device, which resets it: I/O has stopped when the answer comes. Every later request gets `ENODEV`.
    Close,
    /// Unbinds kick, call and error events of all queues.
    UnbindEvents,
    /// Maps memory, whose object comes with the request.
    Map {
        asid: Asid,
        mapping: KeptMapping,
    },
    /// Removes a mapping that was made so.
    Unmap {
        asid: Asid,
        range: IovaRange,
    },
    /// As [`Map`](Self::Map) for several, with an object for each, in their order. After an error those before it are mapped.
    MapAll {
        asid: Asid,
        mappings: Vec<KeptMapping>,
    },
    /// As [`Unmap`](Self::Unmap) for several. After an error those before it are removed.
    UnmapAll {
        asid: Asid,
        ranges: Vec<IovaRange>,
    },
    /// The mappings of an address space that begin above an address, or all: as many as an answer takes.
    Mappings {
        asid: Asid,
        above: Option<u64>,
    },
    BatchBegin {
        asid: Asid,
    },
    BatchEnd {
        asid: Asid,
    },
    SetOwner,
    DeviceId,
    Status,
    SetStatus {
        status: u8,
    },
    Features,
    SetFeatures {
        features: u64,
    },
    BackendFeatures,
    SetBackendFeatures {
        features: u64,
    },
    VqsCount,
    GroupNum,
    AsNum,
    IovaRange,
    ConfigSize,
    Config {
        offset: u32,
        len: usize,
    },
    SetConfig {
        offset: u32,
        data: Vec<u8>,
    },
    /// With the event, or without one to unbind; as the three that follow.
    SetConfigCall,
    SetVringKick {
        index: QueueIndex,
    },
    SetVringCall {
        index: QueueIndex,
    },
    SetVringErr {
        index: QueueIndex,
    },
    VringNum,
    SetVringNum {
        index: QueueIndex,
        num: u32,
    },
    SetVringAddr {
        index: QueueIndex,
        flags: u32,
        desc: u64,
        used: u64,
        avail: u64,
        log: u64,
    },
    SetVringBase {
        index: QueueIndex,
        num: u32,
    },
    VringBase {
        index: QueueIndex,
    },
    SetVringEnable {
        index: QueueIndex,
        enable: bool,
    },
    VringGroup {
        index: QueueIndex,
    },
    VringDescGroup {
        index: QueueIndex,
    },
    VringSize {
        index: QueueIndex,
    },
    SetGroupAsid {
        group: GroupIndex,
        asid: Asid,
    },
    Suspend,
    Resume,
}

impl Request {
    /// Whether it changes nothing, so that also a daemon may make it that has not taken over.
    pub(super) const fn only_asks(&self) -> bool {
        matches!(
            self,
            Self::Hello { .. }
                | Self::Take
                | Self::Mappings { .. }
                | Self::DeviceId
                | Self::Status
                | Self::Features
                | Self::BackendFeatures
                | Self::VqsCount
                | Self::GroupNum
                | Self::AsNum
                | Self::IovaRange
                | Self::ConfigSize
                | Self::Config { .. }
                | Self::VringNum
                | Self::VringGroup { .. }
                | Self::VringDescGroup { .. }
                | Self::VringSize { .. }
        )
    }
}

/// What is answered: a value, or an errno.
pub(super) type Answer = Result<Value, i32>;

/// The value of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Value {
    Nothing,
    Number(u64),
    Range(IovaRange),
    Bytes(Vec<u8>),
    Mappings(Vec<KeptMapping>),
}

/// A mapping that a device behind a keeper has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptMapping {
    pub(crate) range: IovaRange,
    pub(crate) perm: Perm,
    pub(crate) object: KeptObject,
}

/// The memory object of a mapping and the offset in it, as the daemon knows it: by this a later daemon finds that it is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeptObject {
    dev_major: u32,
    dev_minor: u32,
    inode: u64,
    created_ns: u64,
    pub(crate) offset: u64,
}

impl From<ObjectId> for KeptObject {
    fn from(id: ObjectId) -> Self {
        let ObjectId { dev_major, dev_minor, inode, created_ns, offset } = id;
        Self { dev_major, dev_minor, inode, created_ns, offset }
    }
}

#[cfg(test)]
mod tests {
    use vdpa_holder::protocol::ITEMS_MAX;

    use super::*;

    /// What a keeper of this version understands, and what it says.
    #[test]
    fn the_form_of_messages_is_kept() {
        let object = KeptObject { dev_major: 0, dev_minor: 1, inode: 7, created_ns: 9, offset: 4096 };
        let range = IovaRange::new(0x1000, u64::MAX).unwrap();
        let mapping = KeptMapping { range, perm: Perm::RW, object };
        for (request, json) in [
            (Request::Hello { version: 1 }, r#"{"hello":{"version":1}}"#),
            (Request::Take, r#""take""#),
            (
                Request::Map { asid: Asid(1), mapping },
                concat!(
                    r#"{"map":{"asid":1,"mapping":{"range":[4096,18446744073709551615],"perm":3,"object":"#,
                    r#"{"dev_major":0,"dev_minor":1,"inode":7,"created_ns":9,"offset":4096}}}}"#
                ),
            ),
            (
                Request::UnmapAll { asid: Asid(0), ranges: vec![IovaRange::new(0, 4095).unwrap(); 2] },
                r#"{"unmap-all":{"asid":0,"ranges":[[0,4095],[0,4095]]}}"#,
            ),
            (
                Request::MapAll { asid: Asid(0), mappings: Vec::new() },
                r#"{"map-all":{"asid":0,"mappings":[]}}"#,
            ),
            (Request::SetVringKick { index: QueueIndex(2) }, r#"{"set-vring-kick":{"index":2}}"#),
            (
                Request::SetVringAddr { index: QueueIndex(0), flags: 0, desc: 1, used: 2, avail: 3, log: 4 },
                r#"{"set-vring-addr":{"index":0,"flags":0,"desc":1,"used":2,"avail":3,"log":4}}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&request).unwrap(), json);
            assert_eq!(serde_json::from_str::<Request>(json).unwrap(), request);
        }
        for (answer, json) in [
            (Err(14), r#"{"Err":14}"#),
            (Ok(Value::Nothing), r#"{"Ok":"nothing"}"#),
            (Ok(Value::Bytes(vec![1, 2])), r#"{"Ok":{"bytes":[1,2]}}"#),
        ] {
            let answer: Answer = answer;
            assert_eq!(serde_json::to_string(&answer).unwrap(), json);
            assert_eq!(serde_json::from_str::<Answer>(json).unwrap(), answer);
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for json in [
            "",
            "{}",
            r#"{"map":{"asid":1}}"#,
            r#"{"take":{"x":1}}"#,
            r#"{"unmap":{"asid":0,"range":[2,1]}}"#,
        ] {
            assert!(serde_json::from_str::<Request>(json).is_err(), "{json}");
        }
    }

    /// The largest requests and answers fit into a packet.
    #[test]
    fn all_of_them_fit() {
        let all = u64::MAX;
        let object =
            KeptObject { dev_major: u32::MAX, dev_minor: u32::MAX, inode: all, created_ns: all, offset: all };
        let mapping = KeptMapping { range: IovaRange::new(all, all).unwrap(), perm: Perm(255), object };
        let asid = Asid(u32::MAX);
        for request in [
            Request::MapAll { asid, mappings: vec![mapping; MAPPINGS_MAX] },
            Request::UnmapAll { asid, ranges: vec![mapping.range; MAPPINGS_MAX] },
        ] {
            assert!(serde_json::to_vec(&request).unwrap().len() <= PACKET_MAX);
        }
        const { assert!(MAPPINGS_MAX <= ITEMS_MAX, "each has a descriptor") };
        let answer: Answer = Ok(Value::Mappings(vec![mapping; MAPPINGS_MAX]));
        assert!(serde_json::to_vec(&answer).unwrap().len() <= PACKET_MAX);
        let answer: Answer = Ok(Value::Bytes(vec![255; CONFIG_MAX]));
        assert!(serde_json::to_vec(&answer).unwrap().len() <= PACKET_MAX);
    }
}
