//! FUSE requests, as bytes read from `/dev/fuse`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vdpa_sys::fuse::{Operation, Request};

fuzz_target!(|data: &[u8]| {
    check(data);
    // The header's length is hard to guess: try again with the right one, which the kernel always sends.
    let mut bytes = data.to_vec();
    if let (Some(length), Ok(len)) = (bytes.get_mut(..4), u32::try_from(data.len())) {
        length.copy_from_slice(&len.to_ne_bytes());
        check(&bytes);
    }
});

fn check(bytes: &[u8]) {
    match Request::decode(bytes) {
        Ok(request) => {
            assert_eq!(request.header.len as usize, bytes.len());
            match request.operation {
                Operation::BatchForget(forgets) => assert!(forgets.iter().count() * 16 <= bytes.len()),
                Operation::Ioctl { args, input } => assert_eq!(args.in_size as usize, input.len()),
                Operation::Write { args, data } => assert_eq!(args.size as usize, data.len()),
                Operation::Lookup { name } | Operation::Getxattr { name, .. } => assert!(!name.contains(&0)),
                _ => {}
            }
        }
        // Every request with a complete header gets an answer.
        Err(error) => {
            assert_eq!(error.unique().is_some(), bytes.len() >= 40);
            assert!(!error.to_string().is_empty());
        }
    }
}
