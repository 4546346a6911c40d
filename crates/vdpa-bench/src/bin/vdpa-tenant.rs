//! vdpa-tenant: the client that `vdpactl demo` and `vdpactl bench update` start and update.
//!
//! It is a program of its own because the duration of an execve(2) depends mostly on the size of the program: it parses no
//! options and links nothing that it does not need. How it is linked is in `build.rs`.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use vdpa_bench::client;

fn main() -> ExitCode {
    if let Err(error) = vdpa_sys::uapi::live::configure_from_env() {
        eprintln!("vdpa-tenant: {}: {error}", vdpa_sys::uapi::live::ENV);
        return ExitCode::from(2);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [config] => client::main(config, None),
        [config, standby] => client::main(config, Some(Path::new(standby))),
        _ => {
            eprintln!("vdpa-tenant is started by \"vdpactl demo\" and \"vdpactl bench update\"");
            ExitCode::from(2)
        }
    }
}
