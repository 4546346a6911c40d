//! vdpa-tenant: the client that `vdpactl demo` and `vdpactl bench update` start and update.
//!
//! A program of its own, because what an exec costs is mostly the size of what is started: no options are parsed, and
//! nothing is linked that a tenant does not need. `build.rs` says how it is linked.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use vdpa_bench::tenant;

fn main() -> ExitCode {
    if let Err(error) = vdpa_sys::uapi::live::configure_from_env() {
        eprintln!("vdpa-tenant: {}: {error}", vdpa_sys::uapi::live::ENV);
        return ExitCode::from(2);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [config] => tenant::main(config, None),
        [config, standby] => tenant::main(config, Some(Path::new(standby))),
        _ => {
            eprintln!("vdpa-tenant is started by \"vdpactl demo\" and \"vdpactl bench update\"");
            ExitCode::from(2)
        }
    }
}
