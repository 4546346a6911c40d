//! drive a vhost-vdpa device and be replaced without closing it
