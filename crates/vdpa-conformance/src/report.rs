//! Reports of the results as text, JSON and JUnit XML.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::runner::{Finding, Verdict};

/// Number of cases by verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Cases in which the device behaved as the specification says.
    pub passed: usize,
    /// Cases that failed unexpectedly, or passed although a deviation was expected.
    pub failed: usize,
    /// Cases with a known deviation.
    pub deviated: usize,
    /// Cases that were not run, as the expectation file says.
    pub not_applicable: usize,
    /// Cases that were not run although no expectation file says so.
    pub skipped: usize,
}

impl Summary {
    /// Counts the verdicts.
    #[must_use]
    pub fn of(findings: &[Finding]) -> Self {
        let mut summary = Self::default();
        for finding in findings {
            let count = match finding.verdict {
                Verdict::Passed => &mut summary.passed,
                Verdict::Failed { .. } | Verdict::UnexpectedPass { .. } => &mut summary.failed,
                Verdict::Deviated { .. } => &mut summary.deviated,
                Verdict::NotApplicable { .. } => &mut summary.not_applicable,
                Verdict::Skipped { .. } => &mut summary.skipped,
            };
            *count += 1;
        }
        summary
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { passed, failed, deviated, not_applicable, skipped } = self;
        let cases = passed + failed + deviated + not_applicable + skipped;
        write!(
            f,
            "{cases} cases: {passed} passed, {deviated} known deviations, {not_applicable} not applicable, \
             {failed} failed, {skipped} skipped"
        )
    }
}

/// The name of a verdict and its explanation.
fn describe(verdict: &Verdict) -> (&'static str, Option<String>) {
    match verdict {
        Verdict::Passed => ("passed", None),
        Verdict::Failed { what } => ("failed", Some(what.clone())),
        Verdict::Deviated { what, reason } => ("deviated", Some(format!("{what} (expected: {reason})"))),
        Verdict::UnexpectedPass { reason } => {
            ("failed", Some(format!("passed, which the expectation file does not expect: {reason}")))
        }
        Verdict::NotApplicable { why, reason } => ("n/a", Some(format!("{why} (expected: {reason})"))),
        Verdict::Skipped { why } => ("skipped", Some(why.clone())),
    }
}

/// The text that is printed when a case has ended.
#[must_use]
pub fn line(finding: &Finding) -> String {
    let (word, text) = describe(&finding.verdict);
    let mut line = format!("{word:<8} {:<36} {}", finding.case.id, finding.case.spec);
    if let Some(text) = text {
        let _ = write!(line, "\n         {text}");
    }
    line
}

/// All results, to be written as one JSON object; the cases are in the order of the run.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct Report<'a> {
    /// The device file.
    pub device: String,
    /// Numbers of cases.
    pub summary: Summary,
    /// The cases that were run.
    pub cases: Vec<CaseReport<'a>>,
}

impl std::fmt::Display for Report<'_> {
    /// JSON on one line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| std::fmt::Error)?)
    }
}

/// The result of one case in a [`Report`].
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct CaseReport<'a> {
    /// Name of the case.
    pub id: &'a str,
    /// Section of the specification.
    pub spec: &'a str,
    /// `passed`, `failed`, `deviated`, `n/a` or `skipped`.
    pub verdict: &'static str,
    /// What was seen, if the case has not just passed.
    pub text: Option<String>,
    /// How long it took.
    pub microseconds: u64,
}

/// All results for programs.
#[must_use]
pub fn json<'a>(device: &Path, findings: &'a [Finding]) -> Report<'a> {
    let case = |finding: &'a Finding| {
        let (verdict, text) = describe(&finding.verdict);
        let microseconds = u64::try_from(finding.duration.as_micros()).unwrap_or(u64::MAX);
        CaseReport { id: finding.case.id, spec: finding.case.spec, verdict, text, microseconds }
    };
    Report {
        device: device.display().to_string(),
        summary: Summary::of(findings),
        cases: findings.iter().map(case).collect(),
    }
}

/// All results as a JUnit XML document. Known deviations count as passed there, with their text in `system-out`.
#[must_use]
pub fn junit(device: &Path, findings: &[Finding]) -> String {
    let summary = Summary::of(findings);
    let seconds: f64 = findings.iter().map(|finding| finding.duration.as_secs_f64()).sum();
    let name = escape(&device.display().to_string());
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n  <testsuite name=\"{name}\" tests=\"{}\" \
         failures=\"{}\" skipped=\"{}\" time=\"{seconds:.6}\">\n",
        findings.len(),
        summary.failed,
        summary.skipped + summary.not_applicable,
    );
    for finding in findings {
        let _ = write!(
            xml,
            "    <testcase classname=\"vdpa-conform\" name=\"{}\" time=\"{:.6}\">",
            escape(finding.case.id),
            finding.duration.as_secs_f64()
        );
        let (_, text) = describe(&finding.verdict);
        let text = escape(&text.unwrap_or_default());
        let _ = match finding.verdict {
            Verdict::Passed => Ok(()),
            Verdict::Failed { .. } | Verdict::UnexpectedPass { .. } => {
                write!(xml, "<failure message=\"{text}\"/>")
            }
            Verdict::Deviated { .. } => write!(xml, "<system-out>{text}</system-out>"),
            Verdict::NotApplicable { .. } | Verdict::Skipped { .. } => {
                write!(xml, "<skipped message=\"{text}\"/>")
            }
        };
        xml.push_str("</testcase>\n");
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            // XML 1.0 has no way to write other control characters.
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use std::time::Duration;

    use super::*;
    use crate::case::Case;

    fn findings() -> Vec<Finding> {
        let finding = |id, verdict| Finding {
            case: Case { id, spec: "1.5", covers: &[], needs: &[], run: |_| Ok(()) },
            verdict,
            duration: Duration::from_millis(2),
        };
        vec![
            finding("a", Verdict::Passed),
            finding("b", Verdict::Failed { what: "got <1> & \"2\"\u{1}".to_owned() }),
            finding("c", Verdict::Deviated { what: "x".to_owned(), reason: "y".to_owned() }),
            finding("d", Verdict::UnexpectedPass { reason: "y".to_owned() }),
            finding("e", Verdict::Skipped { why: "z".to_owned() }),
            finding("f", Verdict::NotApplicable { why: "z".to_owned(), reason: "y".to_owned() }),
        ]
    }

    #[test]
    fn counts_and_lines() {
        let findings = findings();
        let text = Summary::of(&findings).to_string();
        assert_eq!(text, "6 cases: 1 passed, 1 known deviations, 1 not applicable, 2 failed, 1 skipped");
        assert_eq!(line(&findings[2]).lines().last().unwrap().trim(), "x (expected: y)");
    }

    #[test]
    fn json_has_every_case() {
        let findings = findings();
        let text = json(Path::new("/dev/x"), &findings).to_string();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["summary"]["failed"], 2);
        assert_eq!(value["cases"][1]["verdict"], "failed");
        assert_eq!(value["cases"][0]["text"], Value::Null);
        assert_eq!(value["cases"][0]["microseconds"], 2000);
    }

    #[test]
    fn junit_is_escaped_and_counts_like_the_summary() {
        let xml = junit(Path::new("/dev/x"), &findings());
        assert!(xml.contains("tests=\"6\" failures=\"2\" skipped=\"2\""), "{xml}");
        assert!(xml.contains("message=\"got &lt;1&gt; &amp; &quot;2&quot;\u{fffd}\""), "{xml}");
        assert_eq!(xml.matches("<testcase").count(), xml.matches("</testcase>").count());
    }
}
