//! The generic-netlink family `vdpa` of the kernel, as `vdpa` of iproute2 uses it (uapi-spec 7).

use std::fmt::Debug;
use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use vdpa_core::Errno;

use super::errno;

/// `VDPA_CMD_DEV_NEW`.
const DEV_NEW: u8 = 3;
/// `VDPA_CMD_DEV_DEL`.
const DEV_DEL: u8 = 4;
/// `VDPA_ATTR_MGMTDEV_DEV_NAME`.
const MGMTDEV_DEV_NAME: u16 = 2;
/// `VDPA_ATTR_DEV_NAME`.
const DEV_NAME: u16 = 4;
/// Messages that are read for an answer.
const ANSWERS_MAX: usize = 8;

/// A request of the family.
#[derive(Clone, Debug)]
struct Request {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl GenlFamily for Request {
    fn family_name() -> &'static str {
        "vdpa"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Request {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

/// Only acknowledgements are expected, which are no messages of the family.
impl ParseableParametrized<[u8], GenlHeader> for Request {
    fn parse_with_param(_: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        Ok(Self { command: header.cmd, attributes: Vec::new() })
    }
}

/// Puts the device `name` of the management device `mgmtdev` on the bus. The drivers that are there probe it before this returns.
///
/// # Errors
/// `EPERM` without CAP_NET_ADMIN; `EINVAL` when there is no such device; `EEXIST`; `ENOENT` without the module `vdpa`.
pub(super) fn add(mgmtdev: &str, name: &str) -> Result<(), Errno> {
    request(DEV_NEW, vec![text(MGMTDEV_DEV_NAME, mgmtdev), text(DEV_NAME, name)])
}

/// Takes it from the bus. Blocks while its driver lets it go; `vhost_vdpa` does when its client has closed it.
///
/// # Errors
/// `ENODEV` when it is not there; as [`add`].
pub(super) fn delete(name: &str) -> Result<(), Errno> {
    request(DEV_DEL, vec![text(DEV_NAME, name)])
}

fn text(kind: u16, text: &str) -> DefaultNla {
    DefaultNla::new(kind, [text.as_bytes(), &[0]].concat())
}

fn request(command: u8, attributes: Vec<DefaultNla>) -> Result<(), Errno> {
    let socket = connect().map_err(errno)?;
    let family = family(&socket)?;
    let mut message = GenlMessage::from_payload(Request { command, attributes });
    message.set_resolved_family_id(family);
    exchange(&socket, message, |_| None::<()>).map(drop)
}

fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// The number that the kernel has given the family.
fn family(socket: &Socket) -> Result<u16, Errno> {
    let nlas = vec![GenlCtrlAttrs::FamilyName(Request::family_name().into())];
    let message = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas });
    let found = exchange(socket, message, |answer: GenlCtrl| {
        answer
            .nlas
            .iter()
            .find_map(|nla| if let GenlCtrlAttrs::FamilyId(id) = nla { Some(*id) } else { None })
    })?;
    found.ok_or(Errno::NOENT)
}

/// Sends a request and reads until it is acknowledged. Returns what `of` finds in an answer before.
fn exchange<F, T>(
    socket: &Socket,
    message: GenlMessage<F>,
    of: impl Fn(F) -> Option<T>,
) -> Result<Option<T>, Errno>
where
    F: GenlFamily + Emitable + Debug + ParseableParametrized<[u8], GenlHeader>,
{
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0).map_err(errno)?;
    let mut found = None;
    for _ in 0..ANSWERS_MAX {
        let (answer, _) = socket.recv_from_full().map_err(errno)?;
        let answer = NetlinkMessage::<GenlMessage<F>>::deserialize(&answer).map_err(|_| Errno::IO)?;
        match answer.payload {
            NetlinkPayload::Error(error) => {
                return match error.code {
                    None => Ok(found),
                    Some(code) => Err(Errno::from_raw(code.get().wrapping_neg())),
                };
            }
            NetlinkPayload::InnerMessage(message) => found = found.or_else(|| of(message.payload)),
            _ => {}
        }
    }
    Err(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `strace vdpa dev add name x mgmtdev vduse` shows it.
    #[test]
    fn requests_have_the_bytes_that_the_kernel_reads() {
        let attributes = vec![text(MGMTDEV_DEV_NAME, "vduse"), text(DEV_NAME, "x")];
        let message = GenlMessage::from_payload(Request { command: DEV_NEW, attributes });
        let mut bytes = vec![0; Emitable::buffer_len(&message)];
        message.emit(&mut bytes);
        let expected = [&[3, 1, 0, 0][..], &[10, 0, 2, 0], b"vduse\0\0\0", &[6, 0, 4, 0], b"x\0\0\0"];
        assert_eq!(bytes, expected.concat());
    }

    #[test]
    fn a_family_that_does_not_exist_is_enoent() {
        let socket = connect().unwrap();
        let nlas = vec![GenlCtrlAttrs::FamilyName("no-such-family".into())];
        let message = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas });
        assert_eq!(exchange(&socket, message, |_: GenlCtrl| None::<()>), Err(Errno::NOENT));
    }
}
