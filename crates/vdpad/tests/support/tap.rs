//! A TAP interface in a network namespace that ends with the test, and packets for the kernel behind it.
#![expect(unsafe_code, reason = "a test enters a network namespace of its own")]

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::time::Duration;

use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

/// The address of the card.
pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0x11, 0x12, 0x34, 0x56];

/// Enters a network namespace with the interface `tap0`, which is persistent. `None` where that is not permitted.
pub(crate) fn namespace(multi_queue: bool) -> Option<()> {
    // SAFETY: a network namespace concerns neither memory nor descriptors.
    if let Err(error) = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) } {
        skip(&format!("no network namespace: {error}"));
        return None;
    }
    if fs::metadata("/dev/net/tun").is_err() || Command::new("ip").arg("-V").output().is_err() {
        skip("no /dev/net/tun, or no program ip");
        return None;
    }
    // Or the kernel sends packets of its own.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let queues: &[&str] = if multi_queue { &["multi_queue"] } else { &[] };
    ip(&[&["tuntap", "add", "tap0", "mode", "tap"], queues].concat());
    Some(())
}

fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
    if let Some(log) = std::env::var_os("VDPA_SKIP_LOG") {
        let line = format!("net: {why}\n");
        let file = fs::File::options().append(true).create(true).open(log);
        file.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes())).unwrap();
    }
}

#[track_caller]
pub(crate) fn ip(args: &[&str]) {
    let output = Command::new("ip").args(args).output().unwrap();
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Has the kernel know 10.0.0.2 behind `tap0`, with the address 10.0.0.1 itself; returns a socket there. Of several the last one gets
/// the packets.
pub(crate) fn host() -> UdpSocket {
    ip(&["link", "set", "tap0", "up"]);
    ip(&["addr", "replace", "10.0.0.1/24", "dev", "tap0"]);
    ip(&["neigh", "replace", "10.0.0.2", "lladdr", "52:54:11:12:34:56", "dev", "tap0"]);
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).unwrap();
    set_socket_reuseaddr(&socket, true).unwrap();
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 1), 1000)).unwrap();
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

/// The address of `tap0`.
fn host_mac() -> Vec<u8> {
    let output = Command::new("ip").args(["-o", "link", "show", "tap0"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

pub(crate) fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

pub(crate) fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// An Ethernet frame with a UDP packet from 10.0.0.2 to 10.0.0.1. With `offload` its checksum is to be completed.
pub(crate) fn udp(payload: &[u8], offload: bool) -> Vec<u8> {
    udp_from(2000, payload, offload)
}

/// As [`udp`], from another port.
pub(crate) fn udp_from(port: u16, payload: &[u8], offload: bool) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 8).unwrap();
    let (from, to) = ([10, 0, 0, 2], [10, 0, 0, 1]);
    let mut ip = vec![0x45, 0];
    ip.extend((length + 20).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend([from, to].concat());
    let check = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    let pseudo = sum(&from) + sum(&to) + 17 + u32::from(length);
    let mut udp = [port.to_be_bytes(), 1000_u16.to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    udp.extend(payload);
    let check = if offload { fold(pseudo) } else { !fold(pseudo + sum(&udp)) };
    udp[6..8].copy_from_slice(&check.to_be_bytes());
    [host_mac(), MAC.to_vec(), vec![8, 0], ip, udp].concat()
}
