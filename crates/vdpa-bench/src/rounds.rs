//! Figures of several rounds: medians, and what one program's are in relation to another's.

use serde::Serialize;

/// How a figure relates to another one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median of the ratios of the rounds, because a disturbance of a round affects both figures.
    pub ratio: f64,
    /// The least one.
    pub least: f64,
    /// The greatest one.
    pub most: f64,
}

/// Summarises the ratios of the rounds; `None` without any.
#[must_use]
pub fn spread(ratios: Vec<f64>) -> Option<Spread> {
    let least = ratios.iter().copied().reduce(f64::min)?;
    let most = ratios.iter().copied().reduce(f64::max)?;
    Some(Spread { ratio: median(ratios), least, most })
}

/// The median; 0 of nothing.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => at(middle),
        _ => f64::midpoint(at(middle - 1), at(middle)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_even_number_is_between_two() {
        assert_eq!(
            [vec![], vec![3.0], vec![9.0, 1.0, 2.0], vec![4.0, 1.0, 2.0, 9.0]].map(median),
            [0.0, 3.0, 2.0, 3.0]
        );
        assert_eq!(spread(vec![2.0, 1.0, 4.0]), Some(Spread { ratio: 2.0, least: 1.0, most: 4.0 }));
        assert_eq!(spread(Vec::new()), None);
    }
}
