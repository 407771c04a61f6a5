//! Rotary frequencies under every published scaling.
//!
//! Formulas as in `transformers`' `modeling_rope_utils`: linear (kaiokendev), dynamic NTK (bloc97, emozilla), `llama3`
//! (Llama 3.1's reference), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753). They are computed in f64 and rounded
//! once.

use std::borrow::Cow;
use std::f64::consts::PI;

use super::spec::{RampBounds, Rope, RopeScaling};

/// The angles by which a rotary embedding turns: position `p` turns pair `i` by `p` times frequency `i`.
#[derive(Debug, Clone)]
pub struct Frequencies {
    head_dim: usize,
    base: f64,
    beyond: Beyond,
    /// `[head_dim / 2]` for sequences up to the threshold.
    usual: Vec<f32>,
    amplitude: f32,
}

/// What a sequence's length does to its frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Nothing.
    Alike,
    /// A second set beyond `original` tokens.
    Two {
        /// Longest sequence of the first set.
        original: u32,
    },
    /// Beyond `original` tokens a set for each length: the base is multiplied by
    /// `(factor · len / original − (factor − 1))^(d / (d − 2))`.
    Each {
        /// Longest sequence of the usual set.
        original: u32,
        /// Of the usual set.
        base: f64,
        /// Growth.
        factor: f64,
    },
}

/// What happens to the frequencies of longer sequences.
#[derive(Debug, Clone)]
enum Beyond {
    /// Nothing.
    Same,
    /// Others, `[head_dim / 2]`, past `original` tokens.
    Long { original: u32, long: Vec<f32> },
    /// Others for each length past `original` tokens.
    Dynamic { original: u32, factor: f64 },
}

impl Frequencies {
    /// Those of a rotary embedding over heads of an even width.
    pub fn new(rope: &Rope, head_dim: usize) -> Frequencies {
        let plain = powers(rope.base, head_dim);
        let divided = |divisors: &[f64]| plain.iter().zip(divisors).map(|(f, divisor)| f / divisor).collect();
        let (usual, amplitude): (Vec<f64>, f64) = match &rope.scaling {
            RopeScaling::Unscaled | RopeScaling::Dynamic { .. } => (plain.clone(), 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let original = f64::from(*original);
                let stretch = |&f: &f64| llama3(f, *factor, *low_freq_factor, *high_freq_factor, original);
                (plain.iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, ramp_bounds, amplitude } => {
                let turns = |rotations| yarn_bound(rope.base, head_dim, f64::from(*original), rotations);
                let ramp = Ramp::new(turns(*beta_fast), turns(*beta_slow), *ramp_bounds, head_dim);
                let stretch = |(i, f): (usize, &f64)| f * (1.0 - ramp.at(i)) + f / factor * ramp.at(i);
                (plain.iter().enumerate().map(stretch).collect(), *amplitude)
            }
            RopeScaling::LongRope { short, amplitude, .. } => (divided(short), *amplitude),
        };
        let beyond = match &rope.scaling {
            RopeScaling::LongRope { long, original, .. } => {
                Beyond::Long { original: *original, long: rounded(&divided(long)) }
            }
            RopeScaling::Dynamic { factor, original } => {
                Beyond::Dynamic { original: *original, factor: *factor }
            }
            _ => Beyond::Same,
        };
        let usual = rounded(&usual);
        Frequencies { head_dim, base: rope.base, beyond, usual, amplitude: amplitude as f32 }
    }

    /// The frequencies of ordinary sequences, those beyond a length where they are a second set, what cosine and sine are
    /// multiplied by, and how the length decides: for who computes them elsewhere, as [`Frequencies::for_length`] does.
    pub fn parts(&self) -> (&[f32], Option<&[f32]>, f32, Lengths) {
        let (longer, lengths) = match &self.beyond {
            Beyond::Same => (None, Lengths::Alike),
            Beyond::Long { original, long } => (Some(long.as_slice()), Lengths::Two { original: *original }),
            Beyond::Dynamic { original, factor } => {
                (None, Lengths::Each { original: *original, base: self.base, factor: *factor })
            }
        };
        (&self.usual, longer, self.amplitude, lengths)
    }

    /// The frequencies `[head_dim / 2]` of a sequence of `len` tokens, and what cosine and sine are multiplied by.
    /// Which length counts for a position is said at [`super::executor::PositionRegime`].
    pub fn for_length(&self, len: u32) -> (Cow<'_, [f32]>, f32) {
        let frequencies = match &self.beyond {
            Beyond::Long { original, long } if len > *original => Cow::Borrowed(long.as_slice()),
            Beyond::Dynamic { original, factor } if len > *original => {
                let growth = factor * f64::from(len) / f64::from(*original) - (factor - 1.0);
                let width = self.head_dim as f64;
                let base = self.base * growth.powf(width / (width - 2.0));
                Cow::Owned(rounded(&powers(base, self.head_dim)))
            }
            _ => Cow::Borrowed(self.usual.as_slice()),
        };
        (frequencies, self.amplitude)
    }
}

/// `base^(−2i/d)` for each pair.
fn powers(base: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|i| base.powf(-2.0 * i as f64 / head_dim as f64)).collect()
}

fn rounded(frequencies: &[f64]) -> Vec<f32> {
    frequencies.iter().map(|&f| f as f32).collect()
}

/// Llama 3.1's stretch of one frequency.
fn llama3(f: f64, factor: f64, low_freq_factor: f64, high_freq_factor: f64, original: f64) -> f64 {
    let wave = 2.0 * PI / f;
    if wave < original / high_freq_factor {
        f
    } else if wave > original / low_freq_factor {
        f / factor
    } else {
        let kept = (original / wave - low_freq_factor) / (high_freq_factor - low_freq_factor);
        (1.0 - kept) * f / factor + kept * f
    }
}

/// The pair, as a real number, whose wave turns `rotations` times in the original context.
fn yarn_bound(base: f64, head_dim: usize, original: f64, rotations: f64) -> f64 {
    head_dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * base.ln())
}

/// YaRN's ramp over the pairs: 0 where a wave is kept, 1 where it is divided.
struct Ramp {
    low: f64,
    high: f64,
}

impl Ramp {
    fn new(low: f64, high: f64, bounds: RampBounds, head_dim: usize) -> Ramp {
        let (low, high) = match bounds {
            RampBounds::Whole => (low.floor(), high.ceil()),
            RampBounds::Exact => (low, high),
        };
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        // As the reference keeps the slope finite.
        Ramp { low, high: if low == high { high + 0.001 } else { high } }
    }

    fn at(&self, i: usize) -> f64 {
        ((i as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests;
