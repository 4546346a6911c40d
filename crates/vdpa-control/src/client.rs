//! [`Client`]: the control API as blocking calls.

use std::fmt::Write as _;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::api::{
    AddRequest, CtlError, DaemonInfo, DevInfo, ErrorBody, MgmtDev, QueueVstats, Reloaded, Running, SetAnswer,
    SetRequest, UpdateInfo, UpgradeRequest, Version,
};
use super::config::DevConfig;

mod passing;

use passing::Passing;

/// Longer than the daemon's own limit (60 s), so that it is the daemon that reports a timeout.
const TIMEOUT: Duration = Duration::from_secs(65);

/// Most bytes of an answer; far more than a daemon with thousands of devices sends.
const ANSWER_BYTES: usize = 64 << 20;

/// A client of the control API. Every call opens a connection and blocks until the answer is there. A call that only asks is made
/// once more when the daemon ends during it: the next daemon listens on the same socket.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
    runtime: Runtime,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// No process listens on the socket.
    #[error(
        "vdpad is not running: nobody listens on {}; start it with \"systemctl start vdpad\" or \"vdpad\", or name \
         its socket with --socket",
        path.display()
    )]
    NotRunning {
        /// Path of the socket.
        path: PathBuf,
    },
    /// This user may not connect to the socket.
    #[error("no permission to use {}; run as root, as the user of vdpad, or in the group that it has named", path.display())]
    Permission {
        /// Path of the socket.
        path: PathBuf,
    },
    /// No answer in time.
    #[error("vdpad has not answered on {} within {} s", path.display(), after.as_secs_f32())]
    TimedOut {
        /// Path of the socket.
        path: PathBuf,
        /// The timeout.
        after: Duration,
    },
    /// The daemon refused the request.
    #[error(transparent)]
    Refused(#[from] CtlError),
    /// The daemon ended while it worked on the request: by a crash, after which another one goes on, or for good.
    #[error(
        "the daemon on {} has ended during the request, which may be done or not: ask what is there, and try again",
        path.display()
    )]
    Interrupted {
        /// Path of the socket.
        path: PathBuf,
        /// The error of the connection.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The connection failed.
    #[error("cannot talk to vdpad on {}", path.display())]
    Connection {
        /// Path of the socket.
        path: PathBuf,
        /// The error of the connection.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer does not follow the protocol.
    #[error("the answer of {} is not one of vdpad ({status}): {reason}", path.display())]
    Protocol {
        /// Path of the socket.
        path: PathBuf,
        /// HTTP status of the answer.
        status: StatusCode,
        /// What is wrong with it.
        reason: String,
    },
}

impl Client {
    /// A client of the daemon at `path`. Does not connect yet.
    ///
    /// # Errors
    /// When the kernel refuses an epoll instance.
    pub fn new(path: impl Into<PathBuf>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { path: path.into(), timeout: TIMEOUT, runtime })
    }

    /// Sets the timeout of each call.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Name, version and process id of the daemon.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn version(&self) -> Result<Version, ClientError> {
        self.get("/v1/version")
    }

    /// The daemon, and the holder that starts it again.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn daemon(&self) -> Result<DaemonInfo, ClientError> {
        self.get("/v1/daemon")
    }

    /// Has the daemon replaced by another program. When this returns, that program is ready, and the daemon is about to end; with
    /// [`UpgradeRequest::dry_run`] it goes on.
    ///
    /// # Errors
    /// [`ClientError`]; the daemon goes on.
    pub fn upgrade(&self, request: &UpgradeRequest) -> Result<(), ClientError> {
        let body = serde_json::to_vec(request).unwrap_or_default();
        self.call(Method::POST, "/v1/daemon/upgrade", body).map(drop)
    }

    /// Every management device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn mgmtdevs(&self) -> Result<Vec<MgmtDev>, ClientError> {
        self.get("/v1/mgmtdevs")
    }

    /// Every device.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn devices(&self) -> Result<Vec<DevInfo>, ClientError> {
        self.get("/v1/devs")
    }

    /// One device.
    ///
    /// # Errors
    /// [`ClientError`]; `ENODEV` for an unknown name.
    pub fn device(&self, name: &str) -> Result<DevInfo, ClientError> {
        self.get(&device_path(name))
    }

    /// The configuration of one device.
    ///
    /// # Errors
    /// [`ClientError`]; `ENODEV`, `EOPNOTSUPP`.
    pub fn config(&self, name: &str) -> Result<DevConfig, ClientError> {
        self.get(&format!("{}/config", device_path(name)))
    }

    /// Vendor statistics of one queue. `None` sends no index, which the daemon refuses as the kernel does.
    ///
    /// # Errors
    /// [`ClientError`]; the errno is that of the daemon (docs/control-api.md).
    pub fn vstats(&self, name: &str, queue_index: Option<u32>) -> Result<QueueVstats, ClientError> {
        let query = queue_index.map(|index| format!("?qidx={index}")).unwrap_or_default();
        self.get(&format!("{}/vstats{query}", device_path(name)))
    }

    /// The owner of each device, and the updates of its clients.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn updates(&self) -> Result<Vec<UpdateInfo>, ClientError> {
        self.get("/v1/updates")
    }

    /// The owner of one device, and the updates of its clients.
    ///
    /// # Errors
    /// [`ClientError`]; `ENODEV` for an unknown name.
    pub fn update(&self, name: &str) -> Result<UpdateInfo, ClientError> {
        self.get(&format!("{}/update", device_path(name)))
    }

    /// Creates a device.
    ///
    /// # Errors
    /// [`ClientError`]; the errno is that of the daemon (docs/control-api.md).
    pub fn add(&self, request: &AddRequest) -> Result<(), ClientError> {
        self.add_passing(request, Vec::new())
    }

    /// As [`add`](Self::add), with descriptors that the attribute [`passed`](super::api::PASSED_ATTR) has used: of a disk, or of the
    /// queues of an interface in their order. They are closed here.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn add_passing(&self, request: &AddRequest, passed: Vec<OwnedFd>) -> Result<(), ClientError> {
        // Serialising strings and maps of strings does not fail. If it did, the daemon would refuse the empty body.
        let body = serde_json::to_vec(request).unwrap_or_default();
        self.call_passing(Method::POST, "/v1/devs", body, passed).map(drop)
    }

    /// The devices that run, as they would be asked for, and the place of the configuration.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn running(&self) -> Result<Running, ClientError> {
        self.get("/v1/config")
    }

    /// Has the daemon read its configuration and add the devices that are missing.
    ///
    /// # Errors
    /// [`ClientError`]; `EINVAL` for files that are not right, or that of a device that cannot be added.
    pub fn reload(&self) -> Result<Reloaded, ClientError> {
        let (status, body) = self.call(Method::POST, "/v1/config/reload", Vec::new())?;
        serde_json::from_slice(&body).map_err(|error| self.protocol(status, &error))
    }

    /// Changes attributes of a device.
    ///
    /// # Errors
    /// [`ClientError`]; the errno is that of the daemon (docs/control-api.md).
    pub fn set(&self, name: &str, request: &SetRequest) -> Result<SetAnswer, ClientError> {
        let body = serde_json::to_vec(request).unwrap_or_default();
        let (status, body) = self.call(Method::PATCH, &device_path(name), body)?;
        serde_json::from_slice(&body).map_err(|error| self.protocol(status, &error))
    }

    /// The state of a device that its client has suspended, or not started, for [`load_state`](Self::load_state) at another host.
    ///
    /// # Errors
    /// [`ClientError`]; the errno is that of the daemon (docs/control-api.md).
    pub fn save_state(&self, name: &str) -> Result<Vec<u8>, ClientError> {
        let (_, body) = self.call(Method::GET, &format!("{}/state", device_path(name)), Vec::new())?;
        Ok(body.to_vec())
    }

    /// Makes a device, which a client has open and has reset, what another one was when its state was saved.
    ///
    /// # Errors
    /// [`ClientError`]; the errno is that of the daemon (docs/control-api.md).
    pub fn load_state(&self, name: &str, state: Vec<u8>) -> Result<(), ClientError> {
        self.call(Method::PUT, &format!("{}/state", device_path(name)), state).map(drop)
    }

    /// Deletes a device, with `force` even one that is in use.
    ///
    /// # Errors
    /// [`ClientError`]; the errno is that of the daemon (docs/control-api.md).
    pub fn delete(&self, name: &str, force: bool) -> Result<(), ClientError> {
        let query = if force { "?force=1" } else { "" };
        self.call(Method::DELETE, &format!("{}{query}", device_path(name)), Vec::new()).map(drop)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = match self.call(Method::GET, path, Vec::new()) {
            Err(ClientError::Interrupted { .. }) => self.call(Method::GET, path, Vec::new()),
            answer => answer,
        };
        let (status, body) = answer?;
        serde_json::from_slice(&body).map_err(|error| self.protocol(status, &error))
    }

    /// Sends one request and returns the answer if it is a success.
    fn call(&self, method: Method, path: &str, body: Vec<u8>) -> Result<(StatusCode, Bytes), ClientError> {
        self.call_passing(method, path, body, Vec::new())
    }

    fn call_passing(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        passed: Vec<OwnedFd>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "vdpad")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Connection { path: self.path.clone(), source: error.into() })?;
        let exchange = async { tokio::time::timeout(self.timeout, self.exchange(request, passed)).await };
        let (status, body) = self
            .runtime
            .block_on(exchange)
            .map_err(|_| ClientError::TimedOut { path: self.path.clone(), after: self.timeout })??;
        if status.is_success() {
            return Ok((status, body));
        }
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(error) => Err(ClientError::Refused(error.into())),
            Err(error) => Err(self.protocol(status, &error)),
        }
    }

    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        passed: Vec<OwnedFd>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = Passing::new(self.connect().await?, passed);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        // Owns the sender: dropping it ends the connection.
        let exchange = async move {
            let answer = sender.send_request(request).await.map_err(|error| self.broken(error))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES)
                .collect()
                .await
                .map_err(|source| ClientError::Interrupted { path: self.path.clone(), source })?;
            Ok((status, body.to_bytes()))
        };
        // Polling the connection moves the bytes. If it ends first, `exchange` ends too, with the error.
        let (answer, _) = tokio::join!(exchange, connection);
        answer
    }

    /// Connects. Many connections may wait in the socket for the next daemon: then this one waits for room.
    async fn connect(&self) -> Result<UnixStream, ClientError> {
        loop {
            match UnixStream::connect(&self.path).await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                result => return result.map_err(|error| self.unconnected(error)),
            }
        }
    }

    fn unconnected(&self, error: io::Error) -> ClientError {
        let path = self.path.clone();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning { path },
            io::ErrorKind::PermissionDenied => ClientError::Permission { path },
            _ => ClientError::Connection { path, source: error.into() },
        }
    }

    fn broken(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Interrupted { path: self.path.clone(), source: source.into() }
    }

    fn protocol(&self, status: StatusCode, error: &serde_json::Error) -> ClientError {
        ClientError::Protocol { path: self.path.clone(), status, reason: error.to_string() }
    }
}

/// The URL path of a device, with the characters of its name escaped that have a meaning in a path.
fn device_path(name: &str) -> String {
    let mut path = String::from("/v1/devs/");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            path.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(path, "%{byte:02X}");
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_in_the_path() {
        assert_eq!(device_path("vdpa0"), "/v1/devs/vdpa0");
        assert_eq!(device_path("a/b?c%d"), "/v1/devs/a%2Fb%3Fc%25d");
    }

    #[test]
    fn the_error_without_a_daemon_names_the_socket() {
        let client = Client::new("/nonexistent/control.sock").unwrap();
        let error = client.version().unwrap_err();
        assert!(matches!(error, ClientError::NotRunning { .. }), "{error:?}");
        assert!(error.to_string().contains("/nonexistent/control.sock"), "{error}");
    }

    /// Serves connections on `listener`: closes the first after it has read the request, and answers the second.
    fn daemon_that_ends_once(listener: std::os::unix::net::UnixListener) -> usize {
        use std::io::{Read, Write};
        let body = r#"{"daemon":"vdpad","version":"1","pid":7}"#;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        listener.set_nonblocking(false).unwrap();
        let mut served = 0;
        while let Ok((mut stream, _)) = listener.accept() {
            served += 1;
            let _ = stream.read(&mut [0; 4096]).unwrap();
            if served == 2 {
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
                break;
            }
        }
        served
    }

    #[test]
    fn a_question_is_asked_again_when_the_daemon_ends_and_an_order_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let client = Client::new(&path).unwrap();
        let daemon = std::thread::spawn(move || daemon_that_ends_once(listener));
        let interrupted = client.delete("vdpa0", false).unwrap_err();
        assert!(matches!(interrupted, ClientError::Interrupted { .. }), "{interrupted:?}");
        assert_eq!(client.version().unwrap().pid, 7);
        assert_eq!(daemon.join().unwrap(), 2, "the order was not made again");

        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("t")).unwrap();
        let client = Client::new(dir.path().join("t")).unwrap();
        let daemon = std::thread::spawn(move || daemon_that_ends_once(listener));
        assert_eq!(client.version().unwrap().pid, 7);
        assert_eq!(daemon.join().unwrap(), 2, "the question was asked twice");
    }

    #[test]
    fn a_socket_with_many_waiting_connections_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let client = Client::new(&path).unwrap().with_timeout(Duration::from_millis(100));
        // Until there is no room for one more, which is told by an error of a connection that does not wait.
        let mut waiting = Vec::new();
        let full = client.runtime.block_on(async {
            loop {
                match UnixStream::connect(&path).await {
                    Ok(stream) => waiting.push(stream),
                    Err(error) => return error,
                }
            }
        });
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(matches!(client.version(), Err(ClientError::TimedOut { .. })));
        drop(listener);
    }

    #[test]
    fn a_silent_daemon_times_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let client = Client::new(&path).unwrap().with_timeout(Duration::from_millis(50));
        assert!(matches!(client.version(), Err(ClientError::TimedOut { .. })));
    }
}
