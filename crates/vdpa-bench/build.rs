//! Links `vdpa-tenant`, the client of the benchmarks, at a fixed address. A position-independent program has tens of thousands of
//! pointers to relocate, and its execve(2) takes three times as long. The daemon and `vdpactl` stay position-independent, because
//! they are exposed or long-lived.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |part: &str| std::env::var(format!("CARGO_CFG_TARGET_{part}")).unwrap_or_default();
    if target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo::rustc-link-arg-bin=vdpa-tenant=-no-pie");
    }
}
