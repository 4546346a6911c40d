//! Messages between a holder and its daemon, and the names under which a service manager keeps what is held.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vdpa_holder::fdstore::{name, parse_name};
use vdpa_holder::protocol::{ITEMS_MAX, MESSAGE_MAX, Message, RECORD_MAX};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = str::from_utf8(data)
        && let Some((key, kind, record)) = parse_name(text)
        && let Some(again) = name(key, kind, &record)
    {
        assert_eq!(parse_name(&again), Some((key, kind, record)), "{text}");
    }
    let packet = data.get(..MESSAGE_MAX).unwrap_or(data);
    let Ok((number, message)) = Message::decode(packet) else { return };
    match &message {
        Message::Hold { record, .. } | Message::HoldRing { record, .. } => assert!(record.len() <= RECORD_MAX),
        Message::Items { items, .. } => {
            assert!(items.len() <= ITEMS_MAX);
            assert!(items.iter().all(|item| item.record.len() <= RECORD_MAX));
        }
        _ => {}
    }
    let bytes = message.encode(number);
    assert!(bytes.len() <= MESSAGE_MAX);
    assert_eq!(Message::decode(&bytes), Ok((number, message)), "a message comes back as it was sent");
});
