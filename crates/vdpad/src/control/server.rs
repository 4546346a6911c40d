//! [`Server`]: serves the control API on its socket.
//!
//! One thread serves all connections. The methods of the backend run on other threads, so a slow one delays its caller only
//! (deleting a device can wait for its requests).

use std::fs::File;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::Backend;
use vdpa_holder::progress;

mod caller;
mod passing;
mod public;
mod routes;
mod socket;

pub use caller::Access;
use caller::Caller;
use passing::{Passed, Passing};
pub use public::MetricsSocket;
pub use socket::{BindError, ControlSocket};

/// Limits on requests and connections.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Time for the head of a request; an idle connection is closed after it.
    pub head: Duration,
    /// Time for the body of a request.
    pub body: Duration,
    /// Most bytes of the body of a request.
    pub body_bytes: usize,
    /// Time for a call of the backend; after it the caller gets `ETIMEDOUT`, and the call runs on.
    pub backend: Duration,
    /// Most connections at a time; further ones wait.
    pub connections: usize,
    /// Most calls of the backend at a time; further ones wait.
    pub calls: usize,
    /// Time for requests in progress when the server shuts down.
    pub shutdown: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(10),
            body: Duration::from_secs(10),
            body_bytes: 64 << 10,
            backend: Duration::from_secs(60),
            connections: 64,
            calls: 16,
            shutdown: Duration::from_secs(5),
        }
    }
}

/// A running control server. Dropping it shuts it down.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    pauses: mpsc::UnboundedSender<Pause>,
    thread: Option<JoinHandle<()>>,
}

/// How long a client may take to send its request after it has connected, when the server ends: a connection without a request
/// is ended then.
const REQUEST_GRACE: Duration = Duration::from_millis(20);

/// As [`Limits::head`], for a connection that has the last descriptor: others wait for it.
const LAST_HEAD: Duration = Duration::from_millis(100);

/// A request to accept no more connections.
#[derive(Debug)]
struct Pause {
    /// Told when none is accepted any more.
    paused: oneshot::Sender<()>,
    /// Comes when the requests in progress are to be answered, and is told when they are. Without it the server goes on.
    finish: oneshot::Receiver<oneshot::Sender<()>>,
}

/// Pauses a [`Server`]. Any thread outside it may use it, after the server's end too.
#[derive(Clone, Debug)]
pub struct Pauser(mpsc::UnboundedSender<Pause>);

/// The server accepts no connections while this exists. They wait in the socket, for this process or a successor that listens on it.
#[derive(Debug)]
pub struct Paused(Option<oneshot::Sender<oneshot::Sender<()>>>);

impl Pauser {
    /// Accepts no more connections. Those that are there go on.
    #[must_use]
    pub fn pause(&self) -> Paused {
        let (paused, wait) = oneshot::channel();
        let (guard, finish) = oneshot::channel();
        if self.0.send(Pause { paused, finish }).is_err() || wait.blocking_recv().is_err() {
            // The server has ended, which is as good.
            return Paused(None);
        }
        Paused(Some(guard))
    }
}

impl Paused {
    /// Blocks until the requests in progress are answered, for at most [`Limits::shutdown`], and ends their connections. The server
    /// accepts no more.
    pub fn finish(mut self) {
        let (told, wait) = oneshot::channel();
        if self.0.take().is_some_and(|finish| finish.send(told).is_ok()) {
            let _ = wait.blocking_recv();
        }
    }
}

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The socket could not be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system refused a thread, an epoll instance or the like.
    #[error("cannot start the thread of the control socket")]
    Thread(#[source] io::Error),
    /// The socket for metrics could not be bound.
    #[error("cannot serve metrics there: choose another address with --metrics")]
    Metrics(#[source] io::Error),
}

impl Server {
    /// Serves `backend` on a Unix socket at `path`, under [`Limits::default`].
    ///
    /// The socket file has mode 0600. The socket of a daemon that has ended is replaced. When this returns, clients can
    /// connect.
    ///
    /// # Errors
    /// [`StartError`]; a socket on which a daemon listens is [`BindError::InUse`].
    pub fn start(path: &Path, backend: Arc<dyn Backend>) -> Result<Self, StartError> {
        Self::start_limited(path, backend, Limits::default())
    }

    /// As [`start`](Self::start), under other limits.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_limited(path: &Path, backend: Arc<dyn Backend>, limits: Limits) -> Result<Self, StartError> {
        Self::start_on(ControlSocket::bind(path, Access::default())?, backend, limits)
    }

    /// As [`start_limited`](Self::start_limited), on a socket that is bound already.
    ///
    /// # Errors
    /// [`StartError::Thread`].
    pub fn start_on(
        socket: ControlSocket,
        backend: Arc<dyn Backend>,
        limits: Limits,
    ) -> Result<Self, StartError> {
        Self::start_public(socket, backend, limits, None)
    }

    /// As [`start_on`](Self::start_on), and serves the metrics on `metrics`, to everybody who can connect.
    ///
    /// # Errors
    /// [`StartError::Thread`].
    pub fn start_public(
        socket: ControlSocket,
        backend: Arc<dyn Backend>,
        limits: Limits,
        metrics: Option<MetricsSocket>,
    ) -> Result<Self, StartError> {
        let ControlSocket { listener, file, access } = socket;
        let path = file.path().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(limits.calls)
            .thread_name("ctl-call")
            .on_thread_park(progress::idle)
            .on_thread_unpark(progress::busy)
            .build()
            .map_err(StartError::Thread)?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(listener).map_err(StartError::Thread)?
        };
        let metrics = {
            let _context = runtime.enter();
            metrics.map(MetricsSocket::into_tokio).transpose().map_err(StartError::Thread)?
        };
        let (stop, stopped) = oneshot::channel();
        let (pauses, requests) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name("ctl".into())
            .spawn(move || {
                // Not the threads of calls: those wait for files and for clients, and have a limit of their own.
                let _watched = progress::watch();
                if let Some(metrics) = metrics {
                    runtime.spawn(public::serve(metrics, Arc::clone(&backend), limits));
                }
                let end = runtime.block_on(serve((listener, access), backend, limits, requests, stopped));
                drop(file);
                runtime.block_on(end);
                // Does not wait for calls of the backend, which may hang.
                runtime.shutdown_background();
            })
            .map_err(StartError::Thread)?;
        Ok(Self { path, stop: Some(stop), pauses, thread: Some(thread) })
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What pauses it.
    #[must_use]
    pub fn pauser(&self) -> Pauser {
        Pauser(self.pauses.clone())
    }

    /// Stops accepting requests, removes the socket file, and waits at most [`Limits::shutdown`] for requests in progress.
    pub fn shutdown(mut self) {
        self.join();
    }

    fn join(&mut self) {
        // Dropping the sender is the signal to stop; the thread may have ended already.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the control socket has panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.join();
    }
}

/// Serves until `stopped`. Returns the end of the connections that are left, to be waited for.
async fn serve(
    (listener, access): (UnixListener, Access),
    backend: Arc<dyn Backend>,
    limits: Limits,
    mut pauses: mpsc::UnboundedReceiver<Pause>,
    mut stopped: oneshot::Receiver<()>,
) -> impl Future<Output = ()> {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let (mut reserve, mut complained) = (Reserve::new(), false);
    let mut connections = GracefulShutdown::new();
    tracing::info!("control socket ready");
    loop {
        progress::busy();
        let accepted = tokio::select! {
            _ = &mut stopped => break,
            Some(Pause { paused, finish: wanted }) = pauses.recv() => {
                let _ = paused.send(());
                // Without it, whoever asked goes on, or has ended.
                if let Ok(told) = wanted.await {
                    tokio::time::sleep(REQUEST_GRACE).await;
                    finish(std::mem::take(&mut connections), limits).await;
                    let _ = told.send(());
                    // This process is to end: who connects now is for the next one.
                    let _ = (&mut stopped).await;
                    break;
                }
                continue;
            }
            accepted = accept(&listener, &slots, &mut reserve) => accepted,
        };
        match accepted {
            Ok(Accepted { stream, slot, last }) => {
                complained = last && complained;
                let head = if last { LAST_HEAD } else { limits.head };
                let connection = connection(stream, access, Arc::clone(&backend), Limits { head, ..limits });
                let watched = connections.watch(connection);
                tokio::spawn(async move {
                    if let Err(error) = watched.await {
                        tracing::debug!(%error, "control connection ended early");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!(%error, "cannot accept a control connection");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    finish(connections, limits)
}

/// Waits for the requests in progress, and ends their connections.
async fn finish(connections: GracefulShutdown, limits: Limits) {
    if tokio::time::timeout(limits.shutdown, connections.shutdown()).await.is_err() {
        tracing::warn!("control requests are still in progress");
    }
}

/// Accepts a connection, also when this process is out of descriptors: whoever wants to delete a device then must be heard.
async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
    reserve: &mut Reserve,
) -> io::Result<Accepted> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    reserve.fill();
    let (accepted, last) = match listener.accept().await {
        Err(error) if is_out_of_descriptors(&error) && reserve.release() => {
            // Another thread may have been faster; the caller then waits in the socket, and the next round tries again.
            (tokio::time::timeout(REQUEST_GRACE, listener.accept()).await.map_err(|_| error)?, true)
        }
        accepted => (accepted, false),
    };
    accepted.map(|(stream, _)| Accepted { stream, slot, last })
}

/// A connection.
struct Accepted {
    stream: UnixStream,
    slot: OwnedSemaphorePermit,
    /// It has the last descriptor.
    last: bool,
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    let out = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
    error.raw_os_error().is_some_and(|raw| out.iter().any(|errno| errno.raw_os_error() == raw))
}

/// A descriptor that is kept for a connection when there are no others.
#[derive(Debug)]
struct Reserve(Option<File>);

impl Reserve {
    fn new() -> Self {
        let mut reserve = Self(None);
        reserve.fill();
        reserve
    }

    /// Takes one again, if there is one.
    fn fill(&mut self) {
        if self.0.is_none() {
            self.0 = File::open("/dev/null").ok();
        }
    }

    /// Gives it away. Returns whether there was one.
    fn release(&mut self) -> bool {
        self.0.take().is_some()
    }
}

type Connection = hyper::server::conn::http1::Connection<TokioIo<Passing>, TowerToHyperService<axum::Router>>;

fn connection(stream: UnixStream, access: Access, backend: Arc<dyn Backend>, limits: Limits) -> Connection {
    let (caller, passed) = (Caller::of(&stream, &access), Passed::default());
    let is_admin = caller.as_ref().is_ok_and(Caller::is_admin);
    let stream = Passing::new(stream, is_admin.then(|| passed.clone()));
    let router = routes::router(backend, limits, caller, passed);
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
}
