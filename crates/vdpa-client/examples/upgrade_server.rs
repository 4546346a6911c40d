//! A server with connected clients that is replaced by its next version without anybody noticing.
//!
//! It serves a disk on a Unix socket, a line at a time: `write BLOCK TEXT`, `read BLOCK`, `version`. A second one that is
//! started with `--take-over` connects to the control socket of the first, is given the disk, the listening socket and
//! every connection, and goes on where that one was, in the middle of a line if need be.
//!
//! ```text
//! upgrade_server 1 /run/vdpa/dev/vhost-vdpa-0 /tmp/disk.sock &
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

/// What the next version is told: for each client what it has sent of an unfinished line. Version 1 of the section is that
/// of all versions of this program so far.
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
    /// Where successors ask.
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

/// The successor's side.
fn take_over(version: &str, path: &str) -> Result<Server> {
    let incoming = Incoming::<VhostVdpaFd>::receive(UnixStream::connect(control(path))?)?;
    // Should this version not know what the other one has to say, it says so now, and nothing has happened.
    let restored = incoming.understands(&[(SECTION, 1..=1)])?.take_over()?;
    restored.report_to_server();
    let Restored { mut devices, mut sections, mut descriptors, report } = restored;
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

    /// Until there is something to do.
    fn wait(&self) -> Result<()> {
        let streams = self.clients.iter().map(|client| client.stream.as_fd());
        let fds: Vec<BorrowedFd<'_>> =
            [self.listener.as_fd(), self.control.as_fd()].into_iter().chain(streams).collect();
        let mut fds: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        poll(&mut fds, None)?;
        Ok(())
    }

    /// Answers every whole line; returns whether the client is still there.
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

    /// The predecessor's side: nothing if it is done, this server if it has to go on.
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
