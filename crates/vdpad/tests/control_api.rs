//! The control API as curl sees it: raw HTTP on the socket.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod support;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Fixture, SIM_NET, Setup};
use vdpa_control::api::{
    AddRequest, Attrs, DevInfo, ErrorBody, MgmtDev, QueueVstats, SetAnswer, SetRequest, Version,
};
use vdpa_control::client::{Client, ClientError};
use vdpa_control::config::DevConfig;
use vdpad::control::Backend;
use vdpad::control::{BindError, Limits, Server, StartError};

fn error(answer: &(u16, String)) -> (u16, String, i64) {
    let body: Value = serde_json::from_str(&answer.1).unwrap_or_else(|_| panic!("not JSON: {answer:?}"));
    let errno = body["errno"].as_str().unwrap_or_else(|| panic!("no errno: {answer:?}"));
    assert!(body["error"].is_string(), "{answer:?}");
    (answer.0, errno.into(), body["code"].as_i64().unwrap())
}

fn refused(status: u16, errno: &str, code: i64) -> (u16, String, i64) {
    (status, errno.into(), code)
}

#[test]
fn reading() {
    let setup =
        Setup::new(Fixture::simulators().with_net(Some(SIM_NET)).with_vstats(1, None, &[("tx packets", 3)]));
    let get = |path: &str| {
        let (status, body) = setup.http("GET", path, "");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()
    };
    assert_eq!(get("/v1/version")["daemon"], "vdpad");
    assert_eq!(
        get("/v1/mgmtdevs")[0],
        json!({"name": "vdpasim_net", "supported_classes": [1], "max_supported_vqs": 3, "dev_features": "0x308830028"})
    );
    assert_eq!(get("/v1/devs").as_array().unwrap().len(), 1);
    assert_eq!(get("/v1/devs/vdpa0")["path"], "/run/vdpad/dev/vdpa0");
    assert_eq!(
        get("/v1/devs/vdpa0/config"),
        json!({
            "name": "vdpa0", "device_id": 1, "device_features": "0x308830028",
            "negotiated_features": "0x308830028",
            "net": {"mac": "00:11:22:33:44:55", "status": 1, "mtu": 1500},
        })
    );
    assert_eq!(get("/v1/devs/vdpa0/vstats?qidx=1")["counters"], json!([["tx packets", 3]]));
}

/// With `VDPA_WRITE_SEEDS` the bodies are written as seeds of the fuzz target `control_json`.
#[test]
fn bodies_are_read_as_they_were_written() {
    let setup = Setup::new(Fixture::simulators().with_net(Some(SIM_NET)).with_vstats(1, None, &[("rx", 3)]));
    let blk = Setup::new(Fixture::simulators().with_blk());
    let first = |body: &str| serde_json::from_str::<Vec<Value>>(body).unwrap()[0].to_string();
    let bodies = [
        ("version", r#"{"daemon":"vdpad","version":"0.1.0","pid":1}"#.to_owned()),
        ("mgmtdev", first(&setup.http("GET", "/v1/mgmtdevs", "").1)),
        ("net", setup.http("GET", "/v1/devs/vdpa0", "").1),
        ("net-config", setup.http("GET", "/v1/devs/vdpa0/config", "").1),
        ("vstats", setup.http("GET", "/v1/devs/vdpa0/vstats?qidx=1", "").1),
        ("blk", blk.http("GET", "/v1/devs/blk0", "").1),
        ("blk-config", blk.http("GET", "/v1/devs/blk0/config", "").1),
        ("error", blk.http("GET", "/v1/devs/none", "").1),
        ("set", r#"{"mac":"52:54:00:12:34:56"}"#.to_owned()),
        ("set-answer", r#"{"warning":"blk0 device not supported"}"#.to_owned()),
        (
            "add",
            r#"{"name":"b1","mgmtdev":"sim-blk","attrs":{"path":"/a","queues":"4","direct":"on"}}"#
                .to_owned(),
        ),
    ];
    let again = |text: &str, name: &str| -> Value {
        let value = match name {
            "version" => serde_json::to_value(serde_json::from_str::<Version>(text).unwrap()),
            "mgmtdev" => serde_json::to_value(serde_json::from_str::<MgmtDev>(text).unwrap()),
            "net" | "blk" => serde_json::to_value(serde_json::from_str::<DevInfo>(text).unwrap()),
            "net-config" | "blk-config" => {
                serde_json::to_value(serde_json::from_str::<DevConfig>(text).unwrap())
            }
            "vstats" => serde_json::to_value(serde_json::from_str::<QueueVstats>(text).unwrap()),
            "set" => serde_json::to_value(serde_json::from_str::<SetRequest>(text).unwrap()),
            "set-answer" => serde_json::to_value(serde_json::from_str::<SetAnswer>(text).unwrap()),
            "error" => serde_json::to_value(serde_json::from_str::<ErrorBody>(text).unwrap()),
            _ => serde_json::to_value(serde_json::from_str::<AddRequest>(text).unwrap()),
        };
        value.unwrap()
    };
    for (name, body) in bodies {
        assert_eq!(again(&body, name), serde_json::from_str::<Value>(&body).unwrap(), "{name}");
        if let Some(dir) = std::env::var_os("VDPA_WRITE_SEEDS") {
            let dir = std::path::Path::new(&dir).join("control_json");
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join(name), body).unwrap();
        }
    }
}

#[test]
fn creating_and_removing() {
    let setup = Setup::new(Fixture::simulators().with_blk());
    let request = r#"{"name":"b1","mgmtdev":"vdpasim_blk","attrs":{"path":"/a","queues":4,"direct":true}}"#;
    assert_eq!(setup.http("POST", "/v1/devs", request), (201, String::new()));
    assert_eq!(setup.http("DELETE", "/v1/devs/blk0?force=1", ""), (204, String::new()));
    assert_eq!(error(&setup.http("DELETE", "/v1/devs/blk0", "")), refused(409, "EBUSY", 16));
    assert_eq!(
        setup.log(),
        [
            "add b1 on vdpasim_blk path=/a queues=4 direct=on",
            "delete blk0 force true",
            "delete blk0 force false"
        ]
    );
}

#[test]
fn changing() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_blk());
    let patch = |name: &str, body: &str| setup.http("PATCH", &format!("/v1/devs/{name}"), body);
    assert_eq!(patch("vdpa0", r#"{"mac":"52:54:0:12:34:56"}"#), (200, "{}".into()));
    assert_eq!(patch("vdpa0", "{}"), (200, "{}".into()));
    let (status, body) = patch("blk0", r#"{"mac":"52:54:00:12:34:56"}"#);
    assert_eq!((status, body.as_str()), (200, r#"{"warning":"blk0 device not supported"}"#));
    assert_eq!(error(&patch("nosuch", "{}")), refused(404, "ENODEV", 19));
    for body in ["", "null", r#"{"mac":"zz"}"#, r#"{"mac":1}"#, r#"{"mtu":1400}"#] {
        let answer = patch("vdpa0", body);
        assert_eq!(error(&answer), refused(400, "EINVAL", 22), "{body}");
        assert!(answer.1.contains(r#"{\"mac\":\"52:54:00:12:34:56\"} would be one."#), "{answer:?}");
    }
    assert_eq!(
        setup.log(),
        [
            "set vdpa0 mac 52:54:00:12:34:56",
            "set vdpa0 mac ",
            "set blk0 mac 52:54:00:12:34:56",
            "set nosuch mac "
        ]
    );
}

#[test]
fn states_of_devices_are_bytes() {
    let setup = Setup::new(Fixture::simulators().with_net(Some(SIM_NET)));
    assert_eq!(setup.http("GET", "/v1/devs/vdpa0/state", ""), (200, "state of vdpa0".into()));
    assert_eq!(setup.http("PUT", "/v1/devs/vdpa0/state", "abc").0, 204);
    assert!(setup.log().contains(&"load 3 bytes into vdpa0".to_owned()), "{:?}", setup.log());
    let too_long = "x".repeat((1 << 20) + 1);
    assert_eq!(error(&setup.http("PUT", "/v1/devs/vdpa0/state", &too_long)), refused(413, "EMSGSIZE", 90));
    for method in ["GET", "PUT"] {
        assert_eq!(error(&setup.http(method, "/v1/devs/none/state", "")), refused(404, "ENODEV", 19));
    }
}

#[test]
fn errors_have_their_status() {
    let setup = Setup::new(Fixture::simulators().with_net(None).with_blk().with_fs());
    let post = |body: &str| error(&setup.http("POST", "/v1/devs", body));
    let get = |path: &str| error(&setup.http("GET", path, ""));
    assert_eq!(get("/v1/devs/nosuch"), refused(404, "ENODEV", 19));
    assert_eq!(get("/v1/devs/fs0/config"), refused(422, "EOPNOTSUPP", 95));
    assert_eq!(get("/v1/devs/blk0/vstats"), refused(400, "EINVAL", 22));
    assert_eq!(get("/v1/devs/vdpa0/vstats?qidx=32769"), refused(400, "ERANGE", 34));
    assert_eq!(get("/v1/devs/blk0/vstats?qidx=32769"), refused(422, "EOPNOTSUPP", 95));
    assert_eq!(get("/v1/devs/blk0/vstats?qidx=x"), refused(400, "EINVAL", 22));
    assert_eq!(get("/v1/devs/blk0/vstats?queue=1"), refused(400, "EINVAL", 22));
    assert_eq!(post(r#"{"name":"blk0","mgmtdev":"vdpasim_blk"}"#), refused(409, "EEXIST", 17));
    assert_eq!(post(r#"{"name":"b1","mgmtdev":"nosuch"}"#), refused(404, "ENODEV", 19));
    assert_eq!(
        post(r#"{"name":"b1","mgmtdev":"vduse","attrs":{"colour":"blue"}}"#),
        refused(422, "EOPNOTSUPP", 95)
    );
    assert_eq!(error(&setup.http("DELETE", "/v1/devs/blk0?force=maybe", "")), refused(400, "EINVAL", 22));
}

#[test]
fn malformed_requests_are_refused_before_the_backend() {
    let setup = Setup::new(Fixture::simulators());
    let post = |body: &str| error(&setup.http("POST", "/v1/devs", body));
    for body in [
        "",
        "{",
        "[]",
        "null",
        r#"{"name":"a"}"#,
        r#"{"name":"","mgmtdev":"vduse"}"#,
        r#"{"name":1,"mgmtdev":"vduse"}"#,
        r#"{"name":"a","mgmtdev":"vduse","atrs":{}}"#,
        r#"{"name":"a","mgmtdev":"vduse","attrs":{"path":["/a"]}}"#,
        r#"{"name":"a","mgmtdev":"vduse","attrs":{"path":"/a","path":"/b"}}"#,
        r#"{"name":"a","mgmtdev":"vduse"} {}"#,
    ] {
        assert_eq!(post(body), refused(400, "EINVAL", 22), "{body}");
    }
    let long = format!(r#"{{"name":"{}","mgmtdev":"vduse"}}"#, "a".repeat(70_000));
    assert_eq!(post(&long), refused(413, "EMSGSIZE", 90));
    assert_eq!(error(&setup.http("GET", "/v2/devs", "")), refused(404, "ENOENT", 2));
    assert_eq!(error(&setup.http("PUT", "/v1/devs", "")), refused(405, "EOPNOTSUPP", 95));
    assert!(setup.raw(b"nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    assert!(setup.log().is_empty(), "{:?}", setup.log());
    assert_eq!(setup.http("GET", "/v1/version", "").0, 200);
}

#[test]
fn slow_callers_are_cut_off() {
    let limits =
        Limits { head: Duration::from_millis(100), body: Duration::from_millis(100), ..Limits::default() };
    let setup = Setup::limited(Fixture::simulators(), limits);
    assert_eq!(setup.raw(b""), "");
    let idle = setup.raw(b"GET /v1/version HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(idle.starts_with("HTTP/1.1 200"), "{idle}");
    let headless = setup.raw(b"GET /v1/ver");
    assert!(headless.is_empty() || headless.starts_with("HTTP/1.1 408"), "{headless}");
    let bodiless =
        setup.raw(b"POST /v1/devs HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{");
    assert!(bodiless.starts_with("HTTP/1.1 408") && bodiless.contains("ETIMEDOUT"), "{bodiless}");
}

#[test]
fn a_slow_backend_is_reported_and_holds_up_nobody() {
    let limits = Limits { backend: Duration::from_millis(50), ..Limits::default() };
    let setup = Setup::limited(Fixture::simulators(), limits);
    let held = setup.fixture.hold.lock().unwrap();
    let slow = setup.http("POST", "/v1/devs", r#"{"name":"slow","mgmtdev":"vduse"}"#);
    assert_eq!(error(&slow), refused(504, "ETIMEDOUT", 110));
    let client = Client::new(&setup.socket).unwrap();
    assert_eq!(client.version().unwrap().daemon, "vdpad");
    drop(held);
}

#[test]
fn a_panic_in_the_backend_costs_one_request() {
    let setup = Setup::new(Fixture::simulators());
    let broken = setup.http("POST", "/v1/devs", r#"{"name":"panic","mgmtdev":"vduse"}"#);
    assert_eq!(error(&broken), refused(500, "EIO", 5));
    assert_eq!(setup.http("GET", "/v1/devs", "").0, 200);
}

#[test]
fn shutdown_waits_for_nobody_who_hangs() {
    let limits = Limits { shutdown: Duration::from_millis(50), ..Limits::default() };
    let setup = Setup::limited(Fixture::simulators(), limits);
    let fixture = Arc::clone(&setup.fixture);
    let held = fixture.hold.lock().unwrap();
    let socket = setup.socket.clone();
    let caller = std::thread::spawn(move || {
        Client::new(&socket).unwrap().add(&AddRequest {
            name: "slow".into(),
            mgmtdev: "vduse".into(),
            attrs: Attrs::new(),
        })
    });
    while fixture.log.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    setup.shutdown();
    let outcome = caller.join().unwrap();
    assert!(matches!(outcome, Err(ClientError::Interrupted { .. })), "{outcome:?}");
    drop(held);
}

#[test]
fn connections_beyond_the_limit_wait() {
    let setup = Setup::limited(Fixture::simulators(), Limits { connections: 1, ..Limits::default() });
    let idle = UnixStream::connect(&setup.socket).unwrap();
    let client = Client::new(&setup.socket).unwrap().with_timeout(Duration::from_millis(100));
    assert!(matches!(client.version(), Err(ClientError::TimedOut { .. })));
    drop(idle);
    let client = client.with_timeout(Duration::from_secs(20));
    assert_eq!(client.version().unwrap().pid, std::process::id());
}

#[test]
fn a_second_server_is_refused_and_shutdown_removes_the_socket() {
    let setup = Setup::new(Fixture::simulators());
    let socket = setup.socket.clone();
    let backend: Arc<dyn Backend> = setup.fixture.clone();
    let second = Server::start(&socket, Arc::clone(&backend));
    assert!(
        matches!(second, Err(StartError::Bind(BindError::InUse { .. }))),
        "a second server took the socket of the first"
    );
    setup.shutdown();
    assert!(!socket.exists());
}

#[test]
fn curl_can_be_used() {
    let setup = Setup::new(Fixture::simulators().with_blk());
    let mut curl = std::process::Command::new("curl");
    curl.args(["--silent", "--max-time", "20", "--unix-socket"]).arg(&setup.socket);
    curl.args(["--write-out", " %{http_code}", "--json"]);
    curl.args([r#"{"name":"b1","mgmtdev":"vdpasim_blk"}"#, "http://vdpad/v1/devs"]);
    let outcome = support::run(&mut curl);
    assert_eq!(outcome.stdout, " 201", "{outcome:?}");
}
