//! Charts: completions over time with the updates marked, and medians over memory size.

use std::path::Path;

use plotters::prelude::*;
use vdpa_client::update::{Strategy, Way};

use super::blackout_result::Cell;
use super::timeline::BUCKET_NS;

/// Columns of the chart; each shows the mean of the milliseconds that it covers.
const COLUMNS: usize = 1400;

/// An update in the chart. Times are in ns after the origin of the timeline.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Its strategy.
    pub strategy: Strategy,
    /// Time of the last completion before it.
    pub from_ns: u64,
    /// Time of the first completion after it.
    pub to_ns: u64,
}

/// Draws completions per millisecond (`counts`) and `marks` into an SVG file.
///
/// # Errors
/// The error of the drawing library as text, for example that the file cannot be written.
pub fn draw(file: &Path, counts: &[u64], marks: &[Mark]) -> Result<(), String> {
    // The chart begins with the load, without the set-up.
    let first = counts.iter().position(|&count| count > 0).unwrap_or(0);
    let origin_ns = first as u64 * BUCKET_NS;
    let counts = counts.get(first..).unwrap_or_default();
    let per_column = counts.len().div_ceil(COLUMNS).max(1);
    let series: Vec<(f64, f64)> = counts
        .chunks(per_column)
        .enumerate()
        .map(|(at, chunk)| {
            let mean = float(chunk.iter().sum()) / float(chunk.len() as u64);
            (float((at * per_column) as u64) * seconds(BUCKET_NS), mean)
        })
        .collect();
    let end = seconds(counts.len() as u64 * BUCKET_NS).max(0.001);
    let top = series.iter().map(|p| p.1).fold(1.0, f64::max) * 1.25;

    let root = SVGBackend::new(file, (1500, 500)).into_drawing_area();
    let text = |e: &dyn std::fmt::Display| e.to_string();
    root.fill(&WHITE).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .caption(
            "Completions seen by the client. Coloured: downtime of an update. White gaps: the disk is verified.",
            ("sans-serif", 18),
        )
        .x_label_area_size(35)
        .y_label_area_size(55)
        .build_cartesian_2d(0.0..end, 0.0..top)
        .map_err(|e| text(&e))?;
    chart
        .configure_mesh()
        .disable_mesh()
        .x_desc("seconds")
        .y_desc("completions per ms")
        .draw()
        .map_err(|e| text(&e))?;
    for strategy in Strategy::ALL {
        let color = color(strategy);
        let at = |ns: u64| seconds(ns.saturating_sub(origin_ns));
        // At least two pixels, so that a short downtime is visible.
        let least = end / 700.0;
        let bands = marks.iter().filter(|m| m.strategy == strategy).flat_map(|m| {
            let from = at(m.from_ns).min(at(m.to_ns) - least).max(0.0);
            let corners = [(from, 0.0), (at(m.to_ns), top)];
            [Rectangle::new(corners, color.mix(0.4).filled()), Rectangle::new(corners, color.stroke_width(1))]
        });
        chart
            .draw_series(bands)
            .map_err(|e| text(&e))?
            .label(strategy.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 15, y + 5)], color.filled()));
    }
    chart.draw_series(LineSeries::new(series, &BLACK)).map_err(|e| text(&e))?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(|e| text(&e))?;
    root.present().map_err(|e| text(&e))
}

/// Draws the median of each cell over the memory size, on logarithmic scales, with a line for each page size, way and strategy.
///
/// # Errors
/// As [`draw`].
pub fn draw_medians(file: &Path, cells: &[Cell]) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let gib = |cell: &Cell| float(cell.point.memory_bytes) / f64::from(1 << 30);
    let ms = |cell: &Cell| float(cell.total_ns.median.max(1)) / 1e6;
    let ends = |value: &dyn Fn(&Cell) -> f64| {
        let (least, most) = cells
            .iter()
            .map(value)
            .fold((f64::INFINITY, 0_f64), |(least, most), v| (least.min(v), most.max(v)));
        if least <= most { least * 0.7..most * 1.4 } else { 0.1..1.0 }
    };
    let root = SVGBackend::new(file, (1000, 600)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| text(&e))?;
    let mut chart = ChartBuilder::on(&root)
        .margin(10)
        .caption("Downtime of updates: medians", ("sans-serif", 18))
        .x_label_area_size(35)
        .y_label_area_size(60)
        .build_cartesian_2d(ends(&gib).log_scale(), ends(&ms).log_scale())
        .map_err(|e| text(&e))?;
    chart.configure_mesh().x_desc("GiB of guest memory").y_desc("ms").draw().map_err(|e| text(&e))?;
    let mut lines: Vec<&Cell> = Vec::new();
    for cell in cells {
        if !lines.iter().any(|line| same_line(line, cell)) {
            lines.push(cell);
        }
    }
    for line in lines {
        let color = color(line.point.strategy);
        let points = || cells.iter().filter(|cell| same_line(line, cell)).map(|cell| (gib(cell), ms(cell)));
        let radius = match line.point.way {
            Way::Exec => 6,
            Way::Fork => 4,
            Way::HandOver => 2,
        };
        chart
            .draw_series(LineSeries::new(points(), color))
            .map_err(|e| text(&e))?
            .label(format!("{} {} {}", line.point.strategy, line.point.way, line.point.pages))
            .legend(move |at| Circle::new(at, radius, color));
        chart.draw_series(points().map(|at| Circle::new(at, radius, color))).map_err(|e| text(&e))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(|e| text(&e))?;
    root.present().map_err(|e| text(&e))
}

fn same_line(one: &Cell, other: &Cell) -> bool {
    let key = |cell: &Cell| (cell.point.pages, cell.point.way, cell.point.strategy);
    key(one) == key(other)
}

const fn color(strategy: Strategy) -> RGBColor {
    match strategy {
        Strategy::Live => RGBColor(0, 150, 60),
        Strategy::Resume => RGBColor(0, 90, 200),
        Strategy::Reset => RGBColor(230, 140, 0),
        Strategy::Reopen => RGBColor(210, 0, 30),
    }
}

fn seconds(ns: u64) -> f64 {
    float(ns) / 1e9
}

#[expect(clippy::cast_precision_loss, reason = "the precision of a chart")]
const fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_has_every_update() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("chart.svg");
        let marks = [Mark { strategy: Strategy::Live, from_ns: 1_000_000, to_ns: 2_000_000 }];
        draw(&file, &[5, 0, 7], &marks).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        assert!(svg.contains("<svg") && svg.contains("reopen") && svg.contains("#00963C"), "{svg}");
        assert!(draw(&directory.path().join("no/such/chart.svg"), &[], &[]).is_err());
    }
}
