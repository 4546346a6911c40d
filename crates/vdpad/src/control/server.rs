//! [`Server`]: serves the control API on its socket.
//!
//! One thread serves all connections. The methods of the backend run on other threads, so a slow one delays its caller only
//! (deleting a device can wait for its requests).

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Backend;

mod routes;
mod socket;

pub use socket::BindError;
use socket::SocketFile;

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
    thread: Option<JoinHandle<()>>,
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

    /// As [`start`](Self::start), in place of a daemon that listens on the socket and is to end. That one can still answer who is
    /// connected to it.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn replace(path: &Path, backend: Arc<dyn Backend>) -> Result<Self, StartError> {
        Self::start_on(socket::replace(path)?, path, backend, Limits::default())
    }

    /// As [`start`](Self::start), under other limits.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_limited(path: &Path, backend: Arc<dyn Backend>, limits: Limits) -> Result<Self, StartError> {
        Self::start_on(socket::bind(path)?, path, backend, limits)
    }

    fn start_on(
        (listener, file): (StdListener, SocketFile),
        path: &Path,
        backend: Arc<dyn Backend>,
        limits: Limits,
    ) -> Result<Self, StartError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(limits.calls)
            .thread_name("ctl-call")
            .build()
            .map_err(StartError::Thread)?;
        let listener = {
            let _context = runtime.enter();
            UnixListener::from_std(listener).map_err(StartError::Thread)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("ctl".into())
            .spawn(move || {
                runtime.block_on(serve(listener, file, backend, limits, stopped));
                // Does not wait for calls of the backend, which may hang.
                runtime.shutdown_background();
            })
            .map_err(StartError::Thread)?;
        Ok(Self { path: path.into(), stop: Some(stop), thread: Some(thread) })
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
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

async fn serve(
    listener: UnixListener,
    file: SocketFile,
    backend: Arc<dyn Backend>,
    limits: Limits,
    mut stopped: oneshot::Receiver<()>,
) {
    let slots = Arc::new(Semaphore::new(limits.connections));
    let connections = GracefulShutdown::new();
    tracing::info!(path = %file.path().display(), "control socket ready");
    loop {
        let accepted = tokio::select! {
            _ = &mut stopped => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        match accepted {
            Ok((stream, slot)) => {
                let connection = connection(stream, Arc::clone(&backend), limits);
                let watched = connections.watch(connection);
                tokio::spawn(async move {
                    if let Err(error) = watched.await {
                        tracing::debug!(%error, "control connection ended early");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Most likely out of file descriptors, which become available when connections end.
                tracing::warn!(%error, "cannot accept a control connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    drop(file);
    if tokio::time::timeout(limits.shutdown, connections.shutdown()).await.is_err() {
        tracing::warn!("control requests still in progress at shutdown");
    }
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

type Connection =
    hyper::server::conn::http1::Connection<TokioIo<UnixStream>, TowerToHyperService<axum::Router>>;

fn connection(stream: UnixStream, backend: Arc<dyn Backend>, limits: Limits) -> Connection {
    let router = routes::router(backend, limits, socket::authorised(&stream));
    hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
}
