//! The other side of the card: a network namespace with the sockets that packets go to and come from.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_timeout};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use vdpa_sys::memfd;

use crate::client::Result;
use crate::packets::{GUEST, GUEST_MAC, HOST, HOST_MAC};

/// Ports of the host: packets that nobody reads, those that come back, streams to it, and streams from it.
pub(crate) const SINK: u16 = 9000;
pub(crate) const ECHO: u16 = 9001;
pub(crate) const STREAM_SINK: u16 = 9002;
pub(crate) const STREAM_SOURCE: u16 = 9003;
/// The first port of the host that packets come from.
pub(crate) const FLOW: u16 = 9100;
/// Name of the interface of every server that has one.
pub(crate) const INTERFACE: &str = "bench0";

const ANY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

/// Enters a network namespace, which ends with this process and those that it starts.
pub(crate) fn enter() -> Result<()> {
    // SAFETY: a network namespace concerns neither memory nor descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(|error| format!("no network namespace of its own ({error}): CAP_SYS_ADMIN is needed"))?;
    // Or the kernel sends packets of its own.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    ip(&["link", "set", "lo", "up"])
}

/// Waits for the interface of a server, until it is up if the server does that itself, and gives it the host's address.
pub(crate) fn set_up(brings_up: bool, limit: Duration) -> Result<()> {
    let begin = Instant::now();
    let is_up = || {
        let output = Command::new("ip").args(["-oneline", "link", "show", INTERFACE, "up"]).output();
        output.is_ok_and(|output| !output.stdout.is_empty())
    };
    while !vdpa_sys::tap::exists(INTERFACE)? || brings_up && !is_up() {
        if begin.elapsed() > limit {
            return Err(format!("the server has not made the interface {INTERFACE}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let (host, guest) = (Ipv4Addr::from(HOST).to_string(), Ipv4Addr::from(GUEST).to_string());
    ip(&["link", "set", INTERFACE, "down"])?;
    ip(&["link", "set", INTERFACE, "address", &text(HOST_MAC), "mtu", "1500", "txqueuelen", "1000", "up"])?;
    ip(&["addr", "replace", &format!("{host}/24"), "dev", INTERFACE])?;
    ip(&["neigh", "replace", &guest, "lladdr", &text(GUEST_MAC), "dev", INTERFACE])
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr)).into())
}

/// The sockets that wait for packets and connections, on threads that end with this.
pub(crate) struct Host {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Nobody reads it: what does not fit is counted by the kernel.
    _sink: UdpSocket,
}

impl Host {
    pub(crate) fn start() -> Result<Self> {
        let sink = UdpSocket::bind((ANY, SINK))?;
        set_socket_recv_buffer_size(&sink, 2048)?;
        let ends = Arc::new(AtomicBool::new(false));
        let mut this = Self { ends, threads: Vec::new(), _sink: sink };
        let echo = UdpSocket::bind((ANY, ECHO))?;
        echo.set_read_timeout(Some(Duration::from_millis(100)))?;
        this.thread(move |ends| {
            while !ends.load(Ordering::Relaxed) {
                let mut packet = [0; 2048];
                if let Ok((len, from)) = echo.recv_from(&mut packet) {
                    let _ = echo.send_to(packet.get(..len).unwrap_or_default(), from);
                }
            }
        })?;
        this.listen(STREAM_SINK, |mut stream, ends| {
            // Discards in the kernel: a program's copy is nobody's figure.
            while !ends.load(Ordering::Relaxed) {
                match discard(&stream) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(_) if stream.read(&mut []).is_err() => break,
                    Err(_) => {}
                }
            }
        })?;
        let source = memfd::create(c"stream", 1 << 20, None)?;
        this.listen(STREAM_SOURCE, move |mut stream, ends| {
            // Without a copy of the program's.
            while !ends.load(Ordering::Relaxed) {
                let mut at = 0;
                match rustix::fs::sendfile(stream.as_fd(), &source, Some(&mut at), 1 << 20) {
                    Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                    Err(_) => break,
                }
            }
            let _ = stream.flush();
        })?;
        Ok(this)
    }

    fn thread(&mut self, job: impl FnOnce(Arc<AtomicBool>) + Send + 'static) -> Result<()> {
        let ends = Arc::clone(&self.ends);
        self.threads.push(thread::Builder::new().name("host".into()).spawn(move || job(ends))?);
        Ok(())
    }

    /// Accepts one connection after the other.
    fn listen(
        &mut self,
        port: u16,
        serve: impl Fn(std::net::TcpStream, &AtomicBool) + Send + 'static,
    ) -> Result<()> {
        let listener = TcpListener::bind((ANY, port))?;
        set_socket_timeout(&listener, rustix::net::sockopt::Timeout::Recv, Some(Duration::from_millis(100)))?;
        self.thread(move |ends| {
            while !ends.load(Ordering::Relaxed) {
                let Ok((stream, _)) = listener.accept() else { continue };
                let limit = Some(Duration::from_millis(100));
                let _ = stream.set_read_timeout(limit).and_then(|()| stream.set_write_timeout(limit));
                serve(stream, &ends);
            }
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Throws away what has come; how many bytes that was.
fn discard(stream: &std::net::TcpStream) -> std::io::Result<usize> {
    // SAFETY: with MSG_TRUNC the kernel writes nothing for TCP (tcp(7)), and the address is not used.
    let got = unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), 1 << 20, libc::MSG_TRUNC) };
    usize::try_from(got).map_err(|_| std::io::Error::last_os_error())
}

/// Packets of UDP that have reached sockets of the namespace, those that were dropped there included.
pub(crate) fn udp_arrived() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("Udp:")).collect();
    let [names, values] = lines[..] else { return Err("no counters of UDP".into()) };
    let counter = |name: &str| {
        let at = names.split(' ').position(|known| known == name)?;
        values.split(' ').nth(at)?.parse::<u64>().ok()
    };
    let both = counter("InDatagrams").zip(counter("RcvbufErrors"));
    Ok(both.map(|(read, dropped)| read + dropped).ok_or("no counters of UDP")?)
}

/// A flow of packets of the host's to the guest.
pub(crate) struct Flow {
    socket: UdpSocket,
    data: Vec<u8>,
    len: usize,
}

impl Flow {
    /// The flow that this packet of the guest asks for, of packets with `len` bytes of data.
    pub(crate) fn bind(port: u16) -> Result<UdpSocket> {
        let socket = UdpSocket::bind((ANY, port))?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        Ok(socket)
    }

    /// Answers whoever has sent a packet to the socket, with packets of `len` bytes of data, `burst` at a time.
    pub(crate) fn answer(socket: UdpSocket, len: usize, burst: usize) -> Result<Self> {
        let mut packet = [0; 2048];
        let (_, from) = socket.recv_from(&mut packet)?;
        socket.connect(from)?;
        let size = libc::c_int::try_from(len)?;
        // SAFETY: the argument is an int, which lives during the call.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_UDP,
                libc::UDP_SEGMENT,
                (&raw const size).cast(),
                libc::socklen_t::try_from(size_of::<libc::c_int>())?,
            )
        };
        if set != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        socket.set_nonblocking(true)?;
        Ok(Self { socket, data: vec![0; len * burst], len })
    }

    /// Sends a burst; how many packets that was.
    pub(crate) fn send(&self) -> usize {
        match self.socket.send(&self.data) {
            Ok(sent) => sent / self.len,
            // The queue of the interface is full.
            Err(_) => 0,
        }
    }
}
