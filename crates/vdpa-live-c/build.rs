//! The name under which programs find the shared library that cargo itself links. `./install` links another one, with versions.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // cargo-c sets the name itself.
    if std::env::var_os("CARGO_FEATURE_CAPI").is_none() {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libvdpa-live.so.0.1");
    }
}
