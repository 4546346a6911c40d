//! Placeholder front page.
#![forbid(unsafe_code)]

pub mod device;
pub mod front;
mod rate;
pub mod service;
pub mod worker;

pub use device::{Outcome, Request, RequestHandler, SimpleDevice};
pub use service::{Service, ServiceError};
