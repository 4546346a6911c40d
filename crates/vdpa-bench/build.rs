//! Links the tenant at a fixed address: with tens of thousands of pointers to relocate, which a position-independent program
//! has, an exec takes three times as long. The daemon and `vdpactl`, which are exposed or long-lived, stay as they are.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |part: &str| std::env::var(format!("CARGO_CFG_TARGET_{part}")).unwrap_or_default();
    if target("OS") == "linux" && target("ENV") == "gnu" {
        println!("cargo::rustc-link-arg-bin=vdpa-tenant=-no-pie");
    }
}
