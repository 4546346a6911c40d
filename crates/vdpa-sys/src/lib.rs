//! the Linux interfaces of vdpa-live: vhost-vdpa, FUSE, io_uring, guest memory; the only crate with unsafe code
