//! Runs cases and compares their outcomes with the expectations.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::case::{Case, Ctx, Resources, Stop};
use crate::device::Target;
use crate::expect::Expectations;
use crate::probe::Probe;

/// Parameters of a run.
#[derive(Debug)]
pub struct Config<'a> {
    /// The device to check.
    pub device: Target<'a>,
    /// What the run has besides the device.
    pub resources: Resources<'a>,
    /// Longest time for one case.
    pub limit: Duration,
    /// Called on another thread if a case exceeds the limit. It should end the process, since a request that hangs in the
    /// kernel cannot be cancelled.
    pub on_hang: fn(case: &str, limit: Duration),
}

/// How a case ended, compared with the expectation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The device behaved as the specification says.
    Passed,
    /// The device did not behave as the specification says, unexpectedly.
    Failed {
        /// What the device did.
        what: String,
    },
    /// The device did not behave as the specification says, as expected.
    Deviated {
        /// What the device did.
        what: String,
        /// Reason from the expectation file.
        reason: String,
    },
    /// The case passed although the expectation file lists it: the file is out of date.
    UnexpectedPass {
        /// Reason from the expectation file.
        reason: String,
    },
    /// The case could not be run, as expected.
    NotApplicable {
        /// What is missing.
        why: String,
        /// Reason from the expectation file.
        reason: String,
    },
    /// The case could not be run, unexpectedly.
    Skipped {
        /// What is missing.
        why: String,
    },
}

impl Verdict {
    /// Whether this verdict makes the run fail.
    #[must_use]
    pub fn is_error(&self) -> bool {
        matches!(self, Self::Failed { .. } | Self::UnexpectedPass { .. })
    }

    fn of(outcome: Result<(), Stop>, id: &str, expected: &Expectations) -> Self {
        let deviation = expected.deviation(id).map(str::to_owned);
        match (outcome, deviation) {
            (Err(Stop::CannotRun(why)), _) => match expected.inapplicable(id) {
                None => Self::Skipped { why },
                Some(reason) => Self::NotApplicable { why, reason: reason.to_owned() },
            },
            (Ok(()), Some(reason)) => Self::UnexpectedPass { reason },
            (Ok(()), None) if expected.names_inapplicable(id) => {
                let reason = expected.inapplicable(id).unwrap_or_default().to_owned();
                Self::UnexpectedPass { reason }
            }
            (Ok(()), None) => Self::Passed,
            (Err(Stop::Failed(what)), None) => Self::Failed { what },
            (Err(Stop::Failed(what)), Some(reason)) => Self::Deviated { what, reason },
        }
    }
}

/// One case and how it ended.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The case.
    pub case: Case,
    /// How the case ended.
    pub verdict: Verdict,
    /// How long the case took.
    pub duration: Duration,
}

/// Runs `cases` one after the other. Calls `each` when a case has ended.
pub fn run(
    config: &Config<'_>,
    probe: &Probe,
    cases: &[Case],
    expected: &Expectations,
    mut each: impl FnMut(&Finding),
) -> Vec<Finding> {
    let mut findings = Vec::with_capacity(cases.len());
    for &case in cases {
        let started = Instant::now();
        if let Some(reason) = expected.not_run(case.id) {
            let verdict = Verdict::NotApplicable { why: "not tried".to_owned(), reason: reason.to_owned() };
            let finding = Finding { case, verdict, duration: Duration::ZERO };
            each(&finding);
            findings.push(finding);
            continue;
        }
        let missing = case.needs.iter().find_map(|need| need.missing(probe, config.resources));
        let outcome = match missing {
            Some(why) => Err(Stop::CannotRun(why)),
            None => with_watchdog(case.id, config.limit, config.on_hang, || {
                (case.run)(&mut Ctx::new(config.device, probe, config.resources, expected))
            }),
        };
        let verdict = Verdict::of(outcome, case.id, expected);
        let finding = Finding { case, verdict, duration: started.elapsed() };
        each(&finding);
        findings.push(finding);
    }
    findings
}

/// Runs `body` with a watchdog thread, which calls `on_hang` if `body` does not return within `limit`.
fn with_watchdog<T>(
    id: &'static str,
    limit: Duration,
    on_hang: fn(&str, Duration),
    body: impl FnOnce() -> T,
) -> T {
    let (done, ended) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            on_hang(id, limit);
        }
    });
    let result = body();
    drop(done);
    // The watchdog ends at once, since its channel is closed. A panic in it was printed already.
    let _ = watchdog.join();
    result
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};

    use vdpa_core::features::BackendFeatures;

    use super::*;
    use crate::case::Need;

    fn case(id: &'static str, run: fn(&mut Ctx<'_>) -> Result<(), Stop>) -> Case {
        Case { id, spec: "0", covers: &[], needs: &[], run }
    }

    fn verdicts(cases: &[Case], expected: &Expectations) -> Vec<Verdict> {
        let config = Config {
            device: Target::File(Path::new("/nonexistent")),
            resources: Resources::default(),
            limit: Duration::from_secs(30),
            on_hang: |id, _| panic!("{id} hangs"),
        };
        let mut seen = 0;
        let findings = run(&config, &Probe::default(), cases, expected, |_| seen += 1);
        assert_eq!(seen, cases.len());
        findings.into_iter().map(|finding| finding.verdict).collect()
    }

    #[test]
    fn every_combination_of_outcome_and_expectation_has_its_verdict() {
        let fail: fn(&mut Ctx<'_>) -> _ = |_| Err(Stop::Failed("wrong".to_owned()));
        let cases = [
            case("a", |_| Ok(())),
            case("b", |_| Ok(())),
            case("c", fail),
            case("d", fail),
            case("e", |_| Err(Stop::CannotRun("no memory".to_owned()))),
            Case { needs: &[Need::Backend(BackendFeatures::SUSPEND)], ..case("f", |_| Ok(())) },
            case("g", |_| Ok(())),
            case("h", |_| panic!("the case must not be run")),
        ];
        let text = "b: why b\nd: why d\nn/a e: why e\nn/a g: why g\nnot-run h: why h";
        let expected = Expectations::parse(text, &["b", "d", "e", "g", "h"]).unwrap();
        let what = "wrong".to_owned();
        assert_eq!(
            verdicts(&cases, &expected),
            [
                Verdict::Passed,
                Verdict::UnexpectedPass { reason: "why b".to_owned() },
                Verdict::Failed { what: what.clone() },
                Verdict::Deviated { what, reason: "why d".to_owned() },
                Verdict::NotApplicable { why: "no memory".to_owned(), reason: "why e".to_owned() },
                Verdict::Skipped { why: "backend feature SUSPEND is not offered".to_owned() },
                Verdict::UnexpectedPass { reason: "why g".to_owned() },
                Verdict::NotApplicable { why: "not tried".to_owned(), reason: "why h".to_owned() },
            ]
        );
    }

    #[test]
    fn a_device_that_cannot_be_opened_fails_the_case() {
        let verdicts = verdicts(&[case("a", |ctx| ctx.open().map(drop))], &Expectations::default());
        assert!(matches!(&verdicts[..], [Verdict::Failed { what }] if what.contains("open")), "{verdicts:?}");
    }

    #[test]
    fn the_watchdog_reports_a_case_that_does_not_return() {
        static HUNG: AtomicU32 = AtomicU32::new(0);
        let on_hang: fn(&str, Duration) = |id, _| {
            assert_eq!(id, "slow");
            HUNG.fetch_add(1, Ordering::SeqCst);
        };
        with_watchdog("slow", Duration::ZERO, on_hang, || {
            while HUNG.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
        });
        with_watchdog("fast", Duration::from_secs(60), on_hang, || ());
        assert_eq!(HUNG.load(Ordering::SeqCst), 1);
    }
}
