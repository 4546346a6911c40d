//! The table of VDUSE: each case, and what each kernel does in it.

use std::fmt::Write as _;

use crate::cases;
use crate::expect::{Expectations, ParseError};

const KERNELS: &[(&str, &str)] = &[
    ("Linux 6.12", include_str!("../../expect/vduse-6.12.txt")),
    ("Linux 7.3", include_str!("../../expect/vduse-7.3.txt")),
];

const HEAD: &str = "
## VDUSE

What a kernel does for a program that implements a device (section 6.4). The program is the suite itself, and so is the driver, through
the kernel's vhost-vdpa: `vdpa-conform --vduse vdpa`, in the emulated machine `testbed/conform vduse`.

";

/// Appends the table.
pub(super) fn render(text: &mut String) -> Result<(), ParseError> {
    let cases = cases::vduse();
    let known: Vec<_> = cases.iter().map(|case| case.id).collect();
    let columns: Result<Vec<_>, _> =
        KERNELS.iter().map(|(_, text)| Expectations::parse(text, &known)).collect();
    let columns = columns?;
    text.push_str(HEAD);
    let titles: Vec<_> = KERNELS.iter().map(|(title, _)| *title).collect();
    let _ = writeln!(
        text,
        "| Case | Section | {} |\n|---|---|{}",
        titles.join(" | "),
        "---|".repeat(titles.len())
    );
    for case in &cases {
        let cells: Vec<_> = columns.iter().map(|kernel| cell(case.id, kernel)).collect();
        let _ = writeln!(text, "| `{}` | {} | {} |", case.id, case.spec, cells.join(" | "));
    }
    Ok(())
}

fn cell(id: &str, kernel: &Expectations) -> String {
    match (kernel.deviation(id), kernel.inapplicable(id)) {
        (Some(reason), _) => format!("differs: {reason}"),
        (None, Some(reason)) => format!("– ({reason})"),
        (None, None) => "as specified".to_owned(),
    }
}
