//! [`Failure`]: why a command failed, printed as iproute2 prints it.

use std::io;

use vdpa_control::api::CtlError;
use vdpa_control::client::ClientError;
use vdpa_core::Errno;
use vdpa_core::error::chain;

/// Why a command failed. The exit status is 1 in every case.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The arguments are invalid; the text names the argument.
    Usage(String),
    /// The daemon refused the request, or could not be reached.
    Daemon(ClientError),
    /// The output could not be written.
    Output(io::Error),
    /// The kernel refused a resource that every command needs.
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
            Self::Usage(text) => eprintln!("{text}"),
            Self::Daemon(ClientError::Refused(error)) => {
                // The same lines as iproute2 prints for an error of the kernel: scripts look for them.
                eprintln!("Error: vdpa: {}.", error.message.trim_end_matches('.'));
                eprintln!("kernel answers: {}", strerror(error.errno));
                if let Some(hint) = &error.hint {
                    eprintln!("{hint}");
                }
            }
            Self::Daemon(error) => eprintln!("vdpactl: {}", chain(error)),
            // The reader has closed the pipe, as in `vdpactl dev show | head`.
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
