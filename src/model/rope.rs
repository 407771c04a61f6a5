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
    width: usize,
    base: f64,
    beyond: Beyond,
    /// `[width / 2]` for sequences up to the threshold.
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
    /// `(factor · len / original − (factor − 1))^(width / (width − 2))`.
    Each {
        /// Longest sequence of the usual set.
        original: u32,
        /// Of the usual set.
        base: f64,
        /// Growth.
        factor: f64,
    },
    /// Requests with a prompt of more than `trained` tokens have the base multiplied by
    /// [`prompt_alpha`]`^(width / (width − 2))`.
    Prompt {
        /// Longest prompt of the usual set.
        trained: u32,
        /// Of the usual set.
        base: f64,
    },
}

/// What happens to the frequencies of longer sequences.
#[derive(Debug, Clone)]
enum Beyond {
    /// Nothing.
    Same,
    /// Others, `[width / 2]`, past `original` tokens.
    Long { original: u32, long: Vec<f32> },
    /// Others for each length past `original` tokens.
    Dynamic { original: u32, factor: f64 },
    /// Others for prompts of more than `trained` tokens.
    Prompt { trained: u32 },
}

impl Frequencies {
    /// Those of a rotary embedding.
    pub fn new(rope: &Rope) -> Frequencies {
        let width = rope.width;
        let plain = powers(rope.base, width);
        let divided = |divisors: &[f64]| plain.iter().zip(divisors).map(|(f, divisor)| f / divisor).collect();
        let (usual, amplitude): (Vec<f64>, f64) = match &rope.scaling {
            RopeScaling::Unscaled | RopeScaling::Dynamic { .. } | RopeScaling::PromptNtk { .. } => {
                (plain.clone(), 1.0)
            }
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let original = f64::from(*original);
                let stretch = |&f: &f64| llama3(f, *factor, *low_freq_factor, *high_freq_factor, original);
                (plain.iter().map(stretch).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original, ramp_bounds, amplitude } => {
                let turns = |rotations| yarn_bound(rope.base, width, f64::from(*original), rotations);
                let ramp = Ramp::new(turns(*beta_fast), turns(*beta_slow), *ramp_bounds, width);
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
            RopeScaling::PromptNtk { trained } => Beyond::Prompt { trained: *trained },
            _ => Beyond::Same,
        };
        let usual = rounded(&usual);
        Frequencies { width, base: rope.base, beyond, usual, amplitude: amplitude as f32 }
    }

    /// The frequencies of ordinary sequences, those beyond a length where they are a second set, what cosine and sine are
    /// multiplied by, and how the length decides: for who computes them elsewhere, as [`Frequencies::for_position`] does.
    pub fn parts(&self) -> (&[f32], Option<&[f32]>, f32, Lengths) {
        let (longer, lengths) = match &self.beyond {
            Beyond::Same => (None, Lengths::Alike),
            Beyond::Long { original, long } => (Some(long.as_slice()), Lengths::Two { original: *original }),
            Beyond::Dynamic { original, factor } => {
                (None, Lengths::Each { original: *original, base: self.base, factor: *factor })
            }
            Beyond::Prompt { trained } => (None, Lengths::Prompt { trained: *trained, base: self.base }),
        };
        (&self.usual, longer, self.amplitude, lengths)
    }

    /// The frequencies `[width / 2]` of a position in a request with a prompt of `prompt_len` tokens, and what cosine
    /// and sine are multiplied by. Which length counts is said at [`super::executor::PositionRegime`].
    pub fn for_position(&self, prompt_len: u32, position: u32) -> (Cow<'_, [f32]>, f32) {
        let len = prompt_len.max(position.saturating_add(1));
        let frequencies = match &self.beyond {
            Beyond::Long { original, long } if len > *original => Cow::Borrowed(long.as_slice()),
            Beyond::Dynamic { original, factor } if len > *original => {
                let growth = factor * f64::from(len) / f64::from(*original) - (factor - 1.0);
                Cow::Owned(self.with_grown_base(growth))
            }
            Beyond::Prompt { trained } if prompt_len > *trained => {
                Cow::Owned(self.with_grown_base(prompt_alpha(prompt_len, *trained) as f64))
            }
            _ => Cow::Borrowed(self.usual.as_slice()),
        };
        (frequencies, self.amplitude)
    }

    /// Those of the base times `growth^(width / (width − 2))`.
    fn with_grown_base(&self, growth: f64) -> Vec<f32> {
        let width = self.width as f64;
        rounded(&powers(self.base * growth.powf(width / (width - 2.0)), self.width))
    }
}

/// `max(2^⌈log2(prompt_len / trained) + 1⌉ − 1, 1)`, see [`RopeScaling::PromptNtk`].
pub fn prompt_alpha(prompt_len: u32, trained: u32) -> u64 {
    2 * u64::from(prompt_len).div_ceil(u64::from(trained.max(1))).next_power_of_two() - 1
}

/// `base^(−2i/width)` for each pair.
fn powers(base: f64, width: usize) -> Vec<f64> {
    (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64)).collect()
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
fn yarn_bound(base: f64, width: usize, original: f64, rotations: f64) -> f64 {
    width as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * base.ln())
}

/// YaRN's ramp over the pairs: 0 where a wave is kept, 1 where it is divided.
struct Ramp {
    low: f64,
    high: f64,
}

impl Ramp {
    fn new(low: f64, high: f64, bounds: RampBounds, width: usize) -> Ramp {
        let (low, high) = match bounds {
            RampBounds::Whole => (low.floor(), high.ceil()),
            RampBounds::Exact => (low, high),
        };
        let (low, high) = (low.max(0.0), high.min(width as f64 - 1.0));
        // As the reference keeps the slope finite.
        Ramp { low, high: if low == high { high + 0.001 } else { high } }
    }

    fn at(&self, i: usize) -> f64 {
        ((i as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests;
