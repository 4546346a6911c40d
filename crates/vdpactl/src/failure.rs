//! [`Failure`]: why a command did not succeed, as iproute2 words it.

use std::io;

use vdpa_control::api::CtlError;
use vdpa_control::client::ClientError;
use vdpa_core::Errno;
use vdpa_core::error::chain;

/// Why a command did not succeed. Exit status 1 in every case.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The words make no sense; the text says which.
    Words(String),
    /// The daemon refused, or could not be asked.
    Daemon(ClientError),
    /// The output could not be written.
    Output(io::Error),
    /// The system refused what every command needs.
    Runtime(io::Error),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Daemon(error)
    }
}

impl From<CtlError> for Failure {
    fn from(error: CtlError) -> Self {
        Self::Daemon(error.into())
    }
}

impl Failure {
    /// Writes it to standard error.
    pub(crate) fn print(&self) {
        match self {
            Self::Words(text) => eprintln!("{text}"),
            Self::Daemon(ClientError::Refused(error)) => {
                // The daemon stands where the kernel stands for iproute2, and scripts look for these lines.
                eprintln!("Error: vdpa: {}.", error.message.trim_end_matches('.'));
                eprintln!("kernel answers: {}", strerror(error.errno));
                if let Some(hint) = &error.hint {
                    eprintln!("{hint}");
                }
            }
            Self::Daemon(error) => eprintln!("vdpactl: {}", chain(error)),
            // The reader has seen enough: `vdpactl dev show | head`.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Self::Output(error) => eprintln!("vdpactl: cannot write the output: {error}"),
            Self::Runtime(error) => eprintln!("vdpactl: cannot start: {error}"),
        }
    }
}

fn strerror(errno: Errno) -> String {
    match errno.name() {
        Some(_) => errno.text().into(),
        None => format!("Unknown error {}", errno.raw()),
    }
}
