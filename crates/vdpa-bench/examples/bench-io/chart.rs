//! Draws the medians: IOPS above, CPU time of the server per request below. Both scales are logarithmic, since workloads differ by
//! factors of a thousand.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::client::Result;
use crate::plan::Target;
use crate::report::Row;

pub(crate) fn draw(file: &Path, medians: &[Row]) -> Result<()> {
    let root = SVGBackend::new(file, (1400, 900)).into_drawing_area();
    root.fill(&WHITE).map_err(text)?;
    let (above, below) = root.split_vertically(450);
    bars(&above, "requests per second, thousands (logarithmic)", medians, |row| row.iops / 1e3)?;
    bars(&below, "CPU time of the server per request, us (logarithmic)", medians, |row| row.server_ns / 1e3)?;
    root.present().map_err(text)
}

fn text(error: impl std::fmt::Display) -> Box<dyn std::error::Error + Send + Sync> {
    error.to_string().into()
}

fn bars(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    caption: &str,
    medians: &[Row],
    value: impl Fn(&Row) -> f64,
) -> Result<()> {
    let mut workloads: Vec<&str> = medians.iter().map(|row| row.workload).collect();
    workloads.dedup();
    let count = f64::from(u32::try_from(workloads.len())?.max(1));
    let measured = || medians.iter().map(&value).filter(|value| *value > 0.0);
    // Leaves room for the legend, and keeps the smallest bar visible.
    let (bottom, top) = (measured().fold(1.0, f64::min) / 2.0, measured().fold(1.0, f64::max) * 4.0);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(caption, ("sans-serif", 18))
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..count, (bottom..top).log_scale())
        .map_err(text)?;
    let name = |at: &f64| workloads.iter().zip(0u32..).find(|(_, i)| (f64::from(*i) + 0.5 - at).abs() < 0.01);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(workloads.len() * 2 + 1)
        .x_label_formatter(&|at| name(at).map_or_else(String::new, |(name, _)| (*name).to_owned()))
        .x_label_style(("sans-serif", 9))
        .draw()
        .map_err(text)?;
    for (target, at) in Target::ALL.into_iter().zip(0u32..) {
        let color = color(target);
        let left = 0.1 + 0.2 * f64::from(at);
        let bar = |row: &Row| {
            let place = workloads.iter().position(|name| *name == row.workload)?;
            let x = f64::from(u32::try_from(place).ok()?) + left;
            let value = Some(value(row)).filter(|value| *value > 0.0)?;
            Some(Rectangle::new([(x, bottom), (x + 0.18, value)], color.filled()))
        };
        chart
            .draw_series(medians.iter().filter(|row| row.server == target.name()).filter_map(bar))
            .map_err(text)?
            .label(target.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 15, y + 5)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(text)
}

const fn color(target: Target) -> RGBColor {
    match target {
        Target::Vdpad => RGBColor(0, 150, 60),
        Target::Qemu => RGBColor(210, 0, 30),
        Target::Floor => RGBColor(90, 90, 90),
        Target::Fio => RGBColor(0, 90, 200),
    }
}
