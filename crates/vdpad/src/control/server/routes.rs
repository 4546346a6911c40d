//! The routes: turns HTTP requests into calls of the [`Backend`], and its errors into HTTP responses.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, body};
use http_body_util::LengthLimitError;
use serde::Deserialize;
use serde::Serialize;
use vdpa_core::Errno;
use vdpa_core::device::moving::STATE_MAX;

use super::Limits;
use super::caller::Caller;
use super::passing::Passed;
use crate::control::Backend;
use crate::control::metrics::{self, Told};
use vdpa_control::api::{AddRequest, CtlError, ErrorBody, SetRequest, UpgradeRequest, Version};

#[derive(Clone)]
struct App {
    backend: Arc<dyn Backend>,
    limits: Limits,
    passed: Passed,
}

/// The routes of a connection over TCP, where anybody may ask: only what nobody must hide.
pub(super) fn public(backend: Arc<dyn Backend>, limits: Limits) -> Router {
    Router::new()
        .route_service(
            "/metrics",
            get(metrics).with_state(App { backend, limits, passed: Passed::default() }),
        )
        .fallback(|| async { StatusCode::NOT_FOUND })
}

/// The routes of one connection, on which `passed` comes with requests. `caller` is at its other end.
pub(super) fn router(
    backend: Arc<dyn Backend>,
    limits: Limits,
    caller: Result<Caller, CtlError>,
    passed: Passed,
) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/daemon", get(daemon))
        .route("/v1/daemon/upgrade", post(upgrade))
        .route("/v1/config", get(running))
        .route("/v1/config/reload", post(reload))
        .route("/v1/mgmtdevs", get(mgmtdevs))
        .route("/v1/devs", get(devices).post(add))
        .route("/v1/devs/{name}", get(device).patch(set).delete(delete))
        .route("/v1/devs/{name}/config", get(config))
        .route("/v1/devs/{name}/vstats", get(vstats))
        .route("/v1/devs/{name}/update", get(update))
        .route("/v1/devs/{name}/state", get(save_state).put(load_state))
        .route("/v1/updates", get(updates))
        .route("/metrics", get(metrics))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .with_state(App { backend, limits, passed })
        .layer(middleware::from_fn(move |request: Request, next: Next| {
            let caller = caller.clone();
            async move {
                match caller.and_then(|caller| caller.check(&request).map(|()| caller)) {
                    Ok(caller) => run(caller, request, next).await,
                    Err(error) => Failure::from(error).into_response(),
                }
            }
        }))
}

/// Carries out a request, and tells the log who has changed something, or tried to.
async fn run(Caller { uid, pid, .. }: Caller, request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let (method, path) = (request.method().clone(), request.uri().clone());
    let response = next.run(request).await;
    let status = response.status().as_u16();
    let made = response.headers().get(header::LOCATION).and_then(|made| made.to_str().ok());
    tracing::info!(uid, pid, %method, %path, status, made, "control request");
    response
}

async fn version() -> Json<Version> {
    Json(Version {
        daemon: "vdpad".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
    })
}

async fn daemon(State(app): State<App>) -> Result<Response, Failure> {
    app.call(|backend| backend.daemon()).await.map(ok)
}

async fn upgrade(State(app): State<App>, request: Request) -> Result<StatusCode, Failure> {
    const EXAMPLE: &str = r#"{"binary":"/usr/bin/vdpad"}"#;
    let request: UpgradeRequest = read_json(request.into_body(), &app.limits, EXAMPLE).await?;
    app.call(move |backend| backend.upgrade(request)).await?;
    Ok(StatusCode::ACCEPTED)
}

async fn running(State(app): State<App>) -> Result<Response, Failure> {
    app.call(|backend| backend.running()).await.map(ok)
}

async fn reload(State(app): State<App>) -> Result<Response, Failure> {
    app.call(|backend| backend.reload()).await.map(ok)
}

async fn mgmtdevs(State(app): State<App>) -> Result<Response, Failure> {
    app.call(|backend| backend.mgmtdevs()).await.map(ok)
}

async fn devices(State(app): State<App>) -> Result<Response, Failure> {
    app.call(|backend| backend.devices()).await.map(ok)
}

async fn device(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    app.call(move |backend| backend.device(&name)).await.map(ok)
}

async fn config(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    app.call(move |backend| backend.config(&name)).await.map(ok)
}

async fn vstats(
    State(app): State<App>,
    Path(name): Path<String>,
    query: QueryOf<VstatsQuery>,
) -> Result<Response, Failure> {
    let index = query?.0.qidx.ok_or_else(|| {
        CtlError::new(Errno::INVAL, "Required vendor stats queue index is missing")
            .with_hint("Name a queue with qidx, for example qidx 0.")
    })?;
    app.call(move |backend| backend.vstats(&name, index)).await.map(ok)
}

async fn updates(State(app): State<App>) -> Result<Response, Failure> {
    app.call(|backend| backend.updates()).await.map(ok)
}

async fn update(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    app.call(move |backend| backend.update(&name)).await.map(ok)
}

/// For monitoring systems. Devices that do not answer are no reason to say nothing.
async fn metrics(State(app): State<App>) -> Result<Response, Failure> {
    let text = app.call(|backend| {
        let daemon = backend.daemon()?;
        let (devices, updates) = (backend.devices().ok(), backend.updates().ok());
        let told = Told { daemon: &daemon, devices: devices.as_deref(), updates: updates.as_deref() };
        told.encode().map_err(|_| CtlError::new(Errno::IO, "the metrics cannot be written"))
    });
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text.await?).into_response())
}

async fn add(State(app): State<App>, request: Request) -> Result<Response, Failure> {
    const EXAMPLE: &str = r#"{"name":"vdpa0","mgmtdev":"blk","attrs":{"path":"/images/a"}}"#;
    let request: AddRequest = read_json(request.into_body(), &app.limits, EXAMPLE).await?;
    if request.name.is_empty() {
        return Err(CtlError::new(Errno::INVAL, "device name is not set")
            .with_hint("Give \"name\" as a non-empty string.")
            .into());
    }
    let location = format!("/v1/devs/{}", request.name);
    let passed = app.passed.take();
    app.call(move |backend| backend.add(request, passed)).await?;
    let mut response = StatusCode::CREATED.into_response();
    // The backend refuses names that a header cannot carry.
    if let Ok(location) = location.parse() {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

async fn set(
    State(app): State<App>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    const EXAMPLE: &str = r#"{"mac":"52:54:00:12:34:56"}"#;
    let request: SetRequest = read_json(request.into_body(), &app.limits, EXAMPLE).await?;
    app.call(move |backend| backend.set(&name, request)).await.map(ok)
}

async fn save_state(State(app): State<App>, Path(name): Path<String>) -> Result<Response, Failure> {
    let state = app.call(move |backend| backend.save_state(&name)).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], state).into_response())
}

async fn load_state(
    State(app): State<App>,
    Path(name): Path<String>,
    request: Request,
) -> Result<StatusCode, Failure> {
    let state = read_body(request.into_body(), &app.limits, STATE_MAX).await?;
    app.call(move |backend| backend.load_state(&name, &state)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
    query: QueryOf<DeleteQuery>,
) -> Result<StatusCode, Failure> {
    let force = match query?.0.force.as_deref() {
        None | Some("0" | "false") => false,
        Some("" | "1" | "true") => true,
        Some(other) => {
            return Err(CtlError::new(Errno::INVAL, format!("force is \"{other}\""))
                .with_hint("force=1 or force=0 is right.")
                .into());
        }
    };
    app.call(move |backend| backend.delete(&name, force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn no_such_path(request: Request) -> Failure {
    let error = CtlError::new(Errno::NOENT, format!("there is nothing at {}", request.uri().path()))
        .with_hint("The paths are /v1/version, /v1/daemon[/upgrade], /v1/config[/reload], /v1/mgmtdevs, /v1/updates, /v1/devs, /v1/devs/NAME[/config|/vstats|/update|/state] and /metrics.");
    Failure { status: StatusCode::NOT_FOUND, error }
}

async fn no_such_method(request: Request) -> Failure {
    let error = CtlError::new(
        Errno::OPNOTSUPP,
        format!("{} does not apply to {}", request.method(), request.uri().path()),
    );
    Failure { status: StatusCode::METHOD_NOT_ALLOWED, error }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteQuery {
    force: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VstatsQuery {
    qidx: Option<u32>,
}

type QueryOf<T> = Result<Query<T>, axum::extract::rejection::QueryRejection>;

impl App {
    /// Runs a call of the backend on a thread where it may block.
    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Backend) -> Result<T, CtlError> + Send + 'static,
    ) -> Result<T, Failure> {
        let backend = Arc::clone(&self.backend);
        let running = tokio::task::spawn_blocking(move || call(&*backend));
        match tokio::time::timeout(self.limits.backend, running).await {
            Ok(Ok(answer)) => answer.map_err(Failure::from),
            Ok(Err(panicked)) => {
                tracing::error!(error = %panicked, "a control request has panicked");
                let error = CtlError::new(Errno::IO, "the request met an error in the daemon")
                    .with_hint("The daemon's log says more.");
                Err(Failure { status: StatusCode::INTERNAL_SERVER_ERROR, error })
            }
            Err(_) => {
                let error = CtlError::new(
                    Errno::TIMEDOUT,
                    format!("no answer within {} s; the operation goes on", self.limits.backend.as_secs()),
                )
                .with_hint("Ask for the device again to see how it ended.");
                Err(Failure { status: StatusCode::GATEWAY_TIMEOUT, error })
            }
        }
    }
}

/// A successful response with a body.
fn ok<T: Serialize>(value: T) -> Response {
    Json(value).into_response()
}

/// Reads and parses a body; `example` is a valid one for the error message.
async fn read_json<T: for<'de> Deserialize<'de>>(
    body: Body,
    limits: &Limits,
    example: &str,
) -> Result<T, Failure> {
    let bytes = read_body(body, limits, limits.body_bytes).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        CtlError::new(Errno::INVAL, format!("the request is not understood: {error}"))
            .with_hint(format!("{example} would be one."))
            .into()
    })
}

/// Reads a body of at most `most` bytes.
async fn read_body(body: Body, limits: &Limits, most: usize) -> Result<body::Bytes, Failure> {
    match tokio::time::timeout(limits.body, body::to_bytes(body, most)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error))
            if std::error::Error::source(&error).is_some_and(|cause| cause.is::<LengthLimitError>()) =>
        {
            let error = CtlError::new(Errno::MSGSIZE, "the request is too long")
                .with_hint(format!("The body may have {most} bytes."));
            Err(Failure { status: StatusCode::PAYLOAD_TOO_LARGE, error })
        }
        Ok(Err(error)) => Err(CtlError::new(Errno::INVAL, format!("the request broke off: {error}")).into()),
        Err(_) => {
            let error = CtlError::new(
                Errno::TIMEDOUT,
                format!("the request was not complete within {} s", limits.body.as_secs()),
            );
            Err(Failure { status: StatusCode::REQUEST_TIMEOUT, error })
        }
    }
}

/// A response that is not a success.
struct Failure {
    status: StatusCode,
    error: CtlError,
}

impl From<CtlError> for Failure {
    fn from(error: CtlError) -> Self {
        let status = match error.errno {
            Errno::NODEV | Errno::NOENT => StatusCode::NOT_FOUND,
            Errno::EXIST | Errno::BUSY => StatusCode::CONFLICT,
            Errno::INVAL | Errno::RANGE | Errno::TOOBIG => StatusCode::BAD_REQUEST,
            Errno::OPNOTSUPP => StatusCode::UNPROCESSABLE_ENTITY,
            Errno::PERM | Errno::ACCESS => StatusCode::FORBIDDEN,
            Errno::AGAIN => StatusCode::SERVICE_UNAVAILABLE,
            Errno::TIMEDOUT => StatusCode::GATEWAY_TIMEOUT,
            Errno::NOSPC => StatusCode::INSUFFICIENT_STORAGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self { status, error }
    }
}

impl From<axum::extract::rejection::QueryRejection> for Failure {
    fn from(rejection: axum::extract::rejection::QueryRejection) -> Self {
        CtlError::new(Errno::INVAL, rejection.body_text()).into()
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(ErrorBody::from(self.error))).into_response()
    }
}
