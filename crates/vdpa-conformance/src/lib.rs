//! conformance suite for vhost-vdpa devices
