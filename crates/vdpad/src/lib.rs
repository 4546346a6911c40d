//! The daemon vdpad and its tool vdpactl.
