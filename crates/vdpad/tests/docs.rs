//! The documents and the programs agree: every option and every route is documented, and nothing else.
#![expect(clippy::unwrap_used, reason = "a test: every failure is a panic")]

#[path = "support/programs.rs"]
mod programs;

use std::collections::BTreeSet;
use std::process::Command;

const VDPAD: &str = include_str!("../../../docs/vdpad.md");
const VDPACTL: &str = include_str!("../../../docs/vdpactl.md");
const CONTROL_API: &str = include_str!("../../../docs/control-api.md");
const ROUTES: &str = include_str!("../src/control/server/routes.rs");

/// The long options at the beginning of the lines of a program's help.
fn help(program: &str, command: &[&str]) -> BTreeSet<String> {
    let output = Command::new(programs::program(program)).args(command).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let names = text.lines().filter_map(|line| {
        let option = line.trim_start().split_once("--").filter(|(short, _)| short.len() <= 4)?.1;
        Some(option.split([' ', ',', '.']).next()?.to_owned())
    });
    names.collect()
}

/// The rows of the table whose first column has the header `header`, each as its cells.
fn table<'a>(document: &'a str, header: &str) -> Vec<Vec<&'a str>> {
    let rows = document.lines().skip_while(|line| !line.starts_with(header)).skip(2);
    rows.take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split(" |").map(str::trim).collect())
        .collect()
}

/// The name of the long option that a cell documents.
fn option(cell: &str) -> String {
    cell.split_once("--").unwrap().1.split([' ', '`']).next().unwrap().to_owned()
}

fn options(document: &str, header: &str) -> BTreeSet<String> {
    table(document, header).iter().map(|row| option(row.first().unwrap())).collect()
}

#[test]
fn every_option_of_vdpad_is_documented() {
    assert_eq!(options(VDPAD, "| Option | Meaning |"), help("vdpad", &[]));
}

#[test]
fn every_option_of_vdpactl_is_documented() {
    let global = options(VDPACTL, "| Option | Meaning |");
    assert_eq!(global, help("vdpactl", &[]));
    let table = table(VDPACTL, "| Option | demo |");
    for (column, command) in [(1, &["demo"][..]), (2, &["bench", "io"]), (3, &["bench", "update"])] {
        let rows = table.iter().filter(|row| row.get(column) == Some(&"x"));
        let documented: BTreeSet<_> = rows.map(|row| option(row.first().unwrap())).collect();
        let own: BTreeSet<_> = help("vdpactl", command).difference(&global).cloned().collect();
        assert_eq!(documented, own, "{command:?}");
    }
}

#[test]
fn every_route_of_the_control_api_is_documented() {
    let rows = table(CONTROL_API, "| Request | Success |");
    let requests = rows.iter().map(|row| row.first().unwrap().trim_matches('`'));
    let documented: BTreeSet<_> =
        requests.map(|request| request.split('?').next().unwrap().to_owned()).collect();
    let mut served = BTreeSet::new();
    for route in ROUTES.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
        let (path, handlers) = route.split_once("\", ").unwrap();
        let methods = handlers.split('.').map(|handler| handler.split('(').next().unwrap());
        served.extend(methods.map(|m| format!("{} {}", m.to_uppercase(), path.replace("{name}", "NAME"))));
    }
    assert!(served.len() >= 11, "{served:?}");
    assert_eq!(documented, served);
}
