//! Log-probabilities of given ids under raw logits.

use std::ops::Range;

use super::Tensor;
use super::step::Step;

/// The largest of a row, the lowest id that has it, and the logarithm of the sum of exponentials, in one pass.
pub struct Summary {
    /// Largest logit.
    pub max: f32,
    /// Lowest id with it.
    pub argmax: u32,
    /// `ln Σ exp(logit − max)`.
    pub log_sum: f64,
}

/// `None` where the row holds NaN, +∞, or nothing but −∞.
pub fn summarise(logits: &[f32]) -> Option<Summary> {
    const BLOCK: usize = 64;
    let (mut max, mut argmax, mut sum) = (f32::NEG_INFINITY, 0, 0f64);
    for (block, values) in logits.chunks(BLOCK).enumerate() {
        let block_max = values.iter().fold(f32::NEG_INFINITY, |max, &value| max.max(value));
        if block_max > max {
            sum *= f64::from(max - block_max).exp();
            max = block_max;
            let at = values.iter().position(|&value| value == max).unwrap_or(0);
            argmax = (block * BLOCK + at) as u32;
        }
        if max > f32::NEG_INFINITY {
            sum += f64::from(values.iter().map(|&value| (value - max).exp()).sum::<f32>());
        } else if values.iter().any(|value| value.is_nan()) {
            return None;
        }
    }
    // A NaN anywhere makes the sum NaN; +∞ does, by ∞ − ∞.
    (max > f32::NEG_INFINITY && !sum.is_nan()).then(|| Summary { max, argmax, log_sum: sum.ln() })
}

/// Fills the step's log-probabilities of `targets`, whose logits are the first rows of `logits`. NaN where a row
/// has no distribution.
pub fn target_logprobs(targets: Range<usize>, logits: &Tensor, step: &mut Step) {
    for (row, target) in targets.enumerate() {
        let logits = logits.row(row);
        let id = step.targets[target] as usize;
        step.target_logprobs[target] = summarise(logits)
            .map_or(f32::NAN, |summary| (f64::from(logits[id] - summary.max) - summary.log_sum) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_lowest_id_of_the_largest() {
        let mut logits = vec![-1.0; 200];
        (logits[70], logits[150], logits[71]) = (3.0, 3.0, 3.0);
        let summary = summarise(&logits).unwrap();
        let expected = (3.0 + 197.0 * f64::exp(-4.0)).ln();
        assert_eq!((summary.max, summary.argmax), (3.0, 70));
        assert!((summary.log_sum - expected).abs() < 1e-6);
    }

    #[test]
    fn refuses_what_is_no_distribution() {
        for at in [0, 63, 64, 130] {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut logits = vec![0.0; 131];
                logits[at] = bad;
                assert!(summarise(&logits).is_none(), "{bad} at {at}");
                let mut logits = vec![f32::NEG_INFINITY; 131];
                logits[at] = bad;
                assert!(summarise(&logits).is_none(), "{bad} at {at} among −∞");
            }
        }
        assert!(summarise(&[f32::NEG_INFINITY; 70]).is_none());
    }

    #[test]
    fn a_late_maximum_rescales_the_sum() {
        let mut logits = vec![f32::NEG_INFINITY; 64];
        logits.extend([0.0; 64]);
        logits.extend([1.0; 64]);
        let summary = summarise(&logits).unwrap();
        let expected = (64.0 + 64.0 * f64::exp(-1.0)).ln();
        assert!((summary.log_sum - expected).abs() < 1e-6);
        assert_eq!(summary.argmax, 128);
    }
}
