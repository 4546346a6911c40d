#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]
