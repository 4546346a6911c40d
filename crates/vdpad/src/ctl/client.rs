//! [`Client`]: the control interface as blocking calls.
