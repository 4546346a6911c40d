//! A server that is replaced by its next version while clients are connected, without the clients noticing.
//!
//! It serves a disk on a Unix socket with a protocol of lines: `write BLOCK TEXT`, `read BLOCK`, `version`. A second server,
//! started with `--take-over`, connects to the control socket of the first one. It receives the disk, the listening socket
//! and all connections, and continues where the first one stopped, even in the middle of a line.
//!
//! ```text
//! upgrade_server 1 /run/vdpad/dev/vhost-vdpa-0 /tmp/disk.sock &
//! upgrade_server 2 --take-over /tmp/disk.sock &
//! ```

#[path = "support/blk.rs"]
mod blk;

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{Devices, Incoming, Plan, Restored, Via};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use blk::{BLOCK, Disk, Result};

const SECTION: &str = "example/server";

/// State for the next version: for each client, the incomplete line it has sent so far. All versions of this program so far
/// use version 1 of the section.
#[derive(Default, Serialize, Deserialize)]
struct Saved {
    unfinished: Vec<String>,
}

struct Client {
    stream: UnixStream,
    unfinished: String,
}

struct Server {
    version: String,
    disk: Disk<VhostVdpaFd>,
    listener: UnixListener,
    /// The socket to which successors connect.
    control: UnixListener,
    clients: Vec<Client>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let server = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [version, "--take-over", path] => take_over(version, path)?,
        [version, device, path] => Server {
            version: version.to_owned(),
            disk: Disk::open(device)?,
            listener: bind(path)?,
            control: bind(&control(path))?,
            clients: Vec::new(),
        },
        _ => return Err("usage: upgrade_server VERSION (DEVICE | --take-over) SOCKET".into()),
    };
    println!("version {} serves", server.version);
    server.run()
}

fn control(path: &str) -> String {
    format!("{path}.control")
}

fn bind(path: &str) -> Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Takes over from a running server: the successor's part of a hand-over.
fn take_over(version: &str, path: &str) -> Result<Server> {
    let incoming = Incoming::<VhostVdpaFd>::receive(UnixStream::connect(control(path))?)?;
    // If this version cannot read the state of the other one, it refuses here, before anything was changed.
    let restored = incoming.understands(&[(SECTION, 1..=1)])?.take_over()?;
    restored.report_to_server();
    let Restored { mut devices, mut sections, mut descriptors, report, .. } = restored;
    println!("{report}");
    let saved: Saved = sections.take(SECTION).ok_or("no section of this program")?.parse(1)?;
    let mut take = |name: &str| descriptors.remove(name).ok_or(format!("no descriptor \"{name}\""));
    let clients = saved.unfinished.into_iter().enumerate().map(|(at, unfinished)| {
        Ok::<_, String>(Client { stream: take(&format!("client{at}"))?.into(), unfinished })
    });
    let clients = clients.collect::<std::result::Result<Vec<_>, String>>()?;
    Ok(Server {
        version: version.to_owned(),
        disk: Disk { session: devices.take("disk").ok_or("no disk")? },
        listener: take("listener")?.into(),
        control: take("control")?.into(),
        clients,
    })
}

impl Server {
    fn run(mut self) -> Result<()> {
        loop {
            self.wait()?;
            if let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(true)?;
                self.clients.push(Client { stream, unfinished: String::new() });
            }
            let mut clients = std::mem::take(&mut self.clients);
            clients.retain_mut(|client| self.serve(client).unwrap_or(false));
            self.clients = clients;
            if let Ok((successor, _)) = self.control.accept() {
                match self.hand_over(successor)? {
                    None => return Ok(()),
                    Some(server) => self = server,
                }
            }
        }
    }

    /// Blocks until a socket is readable.
    fn wait(&self) -> Result<()> {
        let streams = self.clients.iter().map(|client| client.stream.as_fd());
        let fds: Vec<BorrowedFd<'_>> =
            [self.listener.as_fd(), self.control.as_fd()].into_iter().chain(streams).collect();
        let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut fds, None)?;
        Ok(())
    }

    /// Answers every complete line. Returns whether the client is still connected.
    fn serve(&mut self, client: &mut Client) -> Result<bool> {
        let mut bytes = [0; 4096];
        let there = match client.stream.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(len) => &bytes[..len],
            Err(e) if e.kind() == ErrorKind::WouldBlock => &[],
            Err(_) => return Ok(false),
        };
        client.unfinished.push_str(&String::from_utf8_lossy(there));
        while let Some((line, rest)) = client.unfinished.split_once('\n') {
            let answer = self.answer(line).unwrap_or_else(|e| format!("error: {e}"));
            client.unfinished = rest.to_owned();
            client.stream.write_all(format!("{answer}\n").as_bytes())?;
        }
        Ok(true)
    }

    fn answer(&mut self, line: &str) -> Result<String> {
        match line.splitn(3, ' ').collect::<Vec<_>>()[..] {
            ["version"] => Ok(self.version.clone()),
            ["read", block] => {
                let data = self.disk.read(block.parse()?)?;
                let end = data.iter().position(|&byte| byte == 0).unwrap_or(BLOCK);
                Ok(String::from_utf8_lossy(&data[..end]).into_owned())
            }
            ["write", block, text] if text.len() < BLOCK => {
                let mut data = [0; BLOCK];
                data[..text.len()].copy_from_slice(text.as_bytes());
                self.disk.begin_write(0, block.parse()?, &data)?;
                self.disk.next_done()?;
                Ok("written".to_owned())
            }
            _ => Err("write BLOCK TEXT, read BLOCK and version are understood".into()),
        }
    }

    /// Hands over to a successor: the predecessor's part. Returns `None` on success, or this server if it has to continue.
    fn hand_over(self, successor: UnixStream) -> Result<Option<Self>> {
        let Self { version, disk, listener, control, clients } = self;
        let devices = Devices::one("disk", disk.session);
        let mut saved = Saved::default();
        let mut plan = Plan::new().descriptor("listener", &listener).descriptor("control", &control);
        for (at, client) in clients.iter().enumerate() {
            plan = plan.descriptor(&format!("client{at}"), &client.stream);
            saved.unfinished.push(client.unfinished.clone());
        }
        let plan = plan.section(Section::json(SECTION, 1, &saved)?);
        let (error, mut devices) = match plan.prepare(&devices, Via::HandOver(successor)) {
            Err(error) => (error, devices),
            Ok(prepared) => match prepared.switch(devices, Sections::new()) {
                Ok(departed) => {
                    println!("version {version} has handed over to process {}", departed.report.successor);
                    return Ok(None);
                }
                Err(failed) => (failed.error, failed.devices),
            },
        };
        println!("version {version} goes on: {}", vdpa_client::error::chain(&error));
        let session = devices.take("disk").ok_or("the disk is lost")?;
        Ok(Some(Self { version, disk: Disk { session }, listener, control, clients }))
    }
}
