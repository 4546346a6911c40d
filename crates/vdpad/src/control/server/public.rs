//! The metrics over TCP: monitoring systems do not speak HTTP over Unix sockets.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::{Limits, routes};
use crate::control::Backend;

/// Connections at a time; further ones wait.
const CONNECTIONS: usize = 8;

/// Connections that wait.
const BACKLOG: i32 = 16;

/// A socket on which the metrics are served.
#[derive(Debug)]
pub struct MetricsSocket(std::net::TcpListener);

impl MetricsSocket {
    /// Listens on `address`, also while a daemon that this one is to replace does.
    ///
    /// # Errors
    /// Those of bind(2): `EADDRINUSE`, `EADDRNOTAVAIL`, `EACCES`.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        bind(&socket, &address)?;
        listen(&socket, BACKLOG)?;
        Ok(Self(socket.into()))
    }

    /// Its address; with the port that the kernel has chosen if it was bound to port 0.
    ///
    /// # Errors
    /// None that is known.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// In the context of a runtime.
    pub(super) fn into_tokio(self) -> io::Result<TcpListener> {
        TcpListener::from_std(self.0)
    }
}

/// Serves the metrics, as long as the runtime runs.
pub(super) async fn serve(listener: TcpListener, backend: Arc<dyn Backend>, limits: Limits) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(routes::public(Arc::clone(&backend), limits));
        tokio::spawn(async move {
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.head)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection for metrics ended early");
            }
            drop(slot);
        });
    }
}
