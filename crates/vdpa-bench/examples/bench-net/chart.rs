//! Draws the medians.

use std::path::Path;

use plotters::style::RGBColor;
use vdpa_bench::bars::{self, Panel};

use crate::client::Result;
use crate::plan::Target;
use crate::report::Row;

pub(crate) fn draw(file: &Path, medians: &[Row]) -> Result<()> {
    let programs = Target::ALL.map(|target| (target.name(), color(target)));
    let bars = |value: fn(&Row) -> f64| {
        let bar = |row: &Row| {
            let program = Target::ALL.iter().position(|target| target.name() == row.server)?;
            Some((row.workload, program, value(row)))
        };
        medians.iter().filter_map(bar).collect()
    };
    let panels = [
        Panel {
            caption: "thousands of packets, KiB or round trips per second (logarithmic)",
            bars: bars(|row| row.rate / 1e3),
        },
        Panel {
            caption: "CPU time of the server for each, us (logarithmic)",
            bars: bars(|row| row.server_ns / 1e3),
        },
    ];
    Ok(bars::draw(file, &panels, &programs)?)
}

const fn color(target: Target) -> RGBColor {
    match target {
        Target::Vdpad => RGBColor(0, 150, 60),
        Target::Testpmd => RGBColor(210, 0, 30),
        Target::Passt => RGBColor(0, 90, 200),
        Target::Floor => RGBColor(90, 90, 90),
    }
}
