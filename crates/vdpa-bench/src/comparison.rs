//! What benchmarks that compare programs have in common: goals, progress, and what is printed and written at the end.

use std::fmt::Write as _;
use std::fs;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::rounds::{Spread, spread};

/// A goal: a figure of ours divided by another program's.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// Name of the workload.
    pub workload: &'static str,
    /// Name of the figure.
    pub figure: &'static str,
    /// Name of the other program.
    pub against: &'static str,
    /// The least ratio, or the greatest.
    pub limit: f64,
    /// More is better: the ratio is to be the limit at least.
    pub at_least: bool,
}

impl Goal {
    fn met(&self, ratio: f64) -> bool {
        if self.at_least { ratio >= self.limit } else { ratio <= self.limit }
    }

    fn is_about(&self, workload: &str, figure: &str, against: &str) -> bool {
        (self.workload, self.figure, self.against) == (workload, figure, against)
    }
}

/// A figure of ours divided by that of another program.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    workload: &'static str,
    figure: &'static str,
    against: &'static str,
    #[serde(flatten)]
    spread: Spread,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

impl Ratio {
    /// Summarises the ratios of the rounds, and compares them with the goal, if there is one; `None` without any round.
    #[must_use]
    pub fn new(
        goals: &[Goal],
        workload: &'static str,
        figure: &'static str,
        against: &'static str,
        ratios: Vec<f64>,
    ) -> Option<Self> {
        let goal = goals.iter().find(|goal| goal.is_about(workload, figure, against));
        let spread = spread(ratios)?;
        let met = goal.map(|goal| goal.met(spread.ratio));
        Some(Self { workload, figure, against, spread, goal: goal.map(|goal| goal.limit), met })
    }

    /// Whether it has a goal and misses it.
    #[must_use]
    pub fn is_missed(&self) -> bool {
        self.met == Some(false)
    }
}

/// A line for each goal, with its name `width` characters wide, under a heading.
#[must_use]
pub fn goal_lines(goals: &[Goal], ratios: &[Ratio], width: usize) -> String {
    let mut text = "\ngoals: vdpad over the other, median of the rounds [least to most]\n".to_owned();
    for goal in goals {
        let what = format!("{}: {} / {}", goal.workload, goal.figure, goal.against);
        let limit = format!("{} {}", if goal.at_least { ">=" } else { "<=" }, goal.limit);
        let found = ratios.iter().find(|ratio| goal.is_about(ratio.workload, ratio.figure, ratio.against));
        let _ = match found {
            Some(Ratio { spread: Spread { ratio, least, most }, met, .. }) => {
                let outcome = if *met == Some(true) { "met" } else { "MISSED" };
                writeln!(
                    text,
                    "  {what:<width$} {limit:>8}  {ratio:>6.2} [{least:.2} to {most:.2}]  {outcome}"
                )
            }
            None => writeln!(text, "  {what:<width$} {limit:>8}  not measured"),
        };
    }
    text
}

/// A progress bar of so many steps if standard error is a terminal.
#[must_use]
pub fn progress(steps: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{msg:24} [{wide_bar}] {pos}/{len} {elapsed} left {eta}")
    {
        bar.set_style(style);
    }
    bar
}

/// Prints `text`, or with `json` the result, and writes the result to `file`, as far as there is one. `false`, with a line for the
/// user of `program`, if something could not be written.
pub fn present(program: &str, result: &impl Serialize, text: &str, json: bool, file: Option<&Path>) -> bool {
    let result = serde_json::to_string_pretty(result).unwrap_or_default() + "\n";
    let printed = if json { &result } else { text };
    let mut good = std::io::stdout().write_all(printed.as_bytes()).is_ok();
    if let Some(file) = file {
        let written = fs::write(file, &result);
        good &= written.inspect_err(|error| eprintln!("{program}: {}: {error}", file.display())).is_ok();
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_met_or_missed_or_not_measured() {
        let goal =
            |workload, at_least| Goal { workload, figure: "CPU", against: "floor", limit: 1.5, at_least };
        let goals = [goal("one", true), goal("two", false), goal("three", true)];
        let ratio = |workload| Ratio::new(&goals, workload, "CPU", "floor", vec![2.0]).unwrap();
        let ratios = [ratio("one"), ratio("two"), ratio("without a goal")];
        assert_eq!([0, 1, 2].map(|at| ratios[at].is_missed()), [false, true, false]);
        let text = goal_lines(&goals, &ratios, 20);
        let ends: Vec<_> = text.lines().skip(2).map(|line| line.rsplit("  ").next().unwrap()).collect();
        assert_eq!(ends, ["met", "MISSED", "not measured"], "{text}");
        assert!(Ratio::new(&goals, "one", "CPU", "floor", Vec::new()).is_none());
    }
}
