//! What a holder leaves to the program that replaces it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vdpa_holder::holder::fuzzing::saved(data));
