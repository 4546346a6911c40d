//! JSON bodies of the control API, which the daemon and its tool parse.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vdpa_control::api::{
    AddRequest, DevInfo, ErrorBody, MgmtDev, QueueVstats, SetAnswer, SetRequest, Version,
};
use vdpa_control::config::DevConfig;

fuzz_target!(|data: &[u8]| {
    round_trip::<AddRequest>(data);
    round_trip::<SetRequest>(data);
    round_trip::<SetAnswer>(data);
    round_trip::<DevInfo>(data);
    round_trip::<ErrorBody>(data);
    round_trip::<MgmtDev>(data);
    round_trip::<QueueVstats>(data);
    round_trip::<Version>(data);
    round_trip::<DevConfig>(data);
});

/// Checks that a parsed value is unchanged after it was written and parsed again.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(data) else { return };
    let text = serde_json::to_vec(&value).expect("it was read from JSON");
    let again: T = serde_json::from_slice(&text).expect("it was just written");
    assert_eq!(again, value);
}
