//! Charts of medians: a group of bars for each workload, a bar for each program, in panels one above the other. The scales are
//! logarithmic, since workloads differ by factors of a thousand.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

/// Bars of one panel.
#[derive(Clone, Debug)]
pub struct Panel<'a> {
    /// Text above it.
    pub caption: &'a str,
    /// The group, the index of the program, and the value. Those of one group come together. What is not positive has no bar.
    pub bars: Vec<(&'a str, usize, f64)>,
}

/// Draws the panels into an SVG file. `programs` are names and colours.
///
/// # Errors
/// The error of the drawing library as text, for example that the file cannot be written.
pub fn draw(file: &Path, panels: &[Panel<'_>], programs: &[(&str, RGBColor)]) -> Result<(), String> {
    let root = SVGBackend::new(file, (1400, 900)).into_drawing_area();
    root.fill(&WHITE).map_err(text)?;
    for (area, panel) in root.split_evenly((panels.len().max(1), 1)).iter().zip(panels) {
        draw_panel(area, panel, programs)?;
    }
    root.present().map_err(text)
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn draw_panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    panel: &Panel<'_>,
    programs: &[(&str, RGBColor)],
) -> Result<(), String> {
    let mut groups: Vec<&str> = panel.bars.iter().map(|(group, ..)| *group).collect();
    groups.dedup();
    let count = f64::from(u32::try_from(groups.len()).map_err(text)?.max(1));
    let measured = || panel.bars.iter().map(|(.., value)| *value).filter(|value| *value > 0.0);
    // Leaves room for the legend, and keeps the smallest bar visible.
    let (bottom, top) = (measured().fold(1.0, f64::min) / 2.0, measured().fold(1.0, f64::max) * 4.0);
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(panel.caption, ("sans-serif", 18))
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..count, (bottom..top).log_scale())
        .map_err(text)?;
    let name = |at: &f64| groups.iter().zip(0u32..).find(|(_, i)| (f64::from(*i) + 0.5 - at).abs() < 0.01);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(groups.len() * 2 + 1)
        .x_label_formatter(&|at| name(at).map_or_else(String::new, |(name, _)| (*name).to_owned()))
        .x_label_style(("sans-serif", 9))
        .draw()
        .map_err(text)?;
    for (at, (program, color)) in programs.iter().enumerate() {
        let color = *color;
        let left = 0.1 + 0.2 * f64::from(u32::try_from(at).map_err(text)?);
        let bar = |&(group, program, value): &(&str, usize, f64)| {
            let place = groups.iter().position(|name| *name == group)?;
            let x = f64::from(u32::try_from(place).ok()?) + left;
            (program == at && value > 0.0)
                .then(|| Rectangle::new([(x, bottom), (x + 0.18, value)], color.filled()))
        };
        chart
            .draw_series(panel.bars.iter().filter_map(bar))
            .map_err(text)?
            .label(*program)
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
