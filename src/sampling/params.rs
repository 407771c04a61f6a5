//! From a caller's parameters to the device's.

use crate::backend::step::{Choice, SamplingParams, Watermark};
use crate::error::{Error, Result};

/// Most alternatives reported for a token, so that an answer stays small.
const MAX_TOP_N: u32 = 100;
/// Largest penalty; its inverse is the smallest that divides. Beyond, a finite logit could become infinite.
const MAX_PENALTY: f32 = 1e4;

/// Parameters as they came over the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct RawSampling {
    /// Finite, above 0; neutral 1.
    pub temperature: f32,
    /// Neutral 0.
    pub top_k: u32,
    /// In (0, 1]; neutral 1.
    pub top_p: f32,
    /// In (0, 1]; neutral 1.
    pub typical_p: f32,
    /// Asks for a draw also where every other parameter is neutral.
    pub do_sample: bool,
    /// Of the draw.
    pub seed: u64,
    /// Above 0, from 1e-4 to 1e4; neutral 1.
    pub repetition_penalty: f32,
    /// From −1e4 to 1e4; neutral 0.
    pub frequency_penalty: f32,
    /// Asks for the watermark.
    pub watermark: bool,
    /// Alternatives to report.
    pub top_n: u32,
}

/// What the operator configured for sampling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Width of a row of logits; `top_k` and `top_n` are clamped to it.
    pub vocab: u32,
    /// Strength of the watermark where a request asks for one.
    pub watermark: Watermark,
}

impl RawSampling {
    /// Checks and completes the parameters. A request draws if it asks to, or if any warper is on (TGI's
    /// `HeterogeneousNextTokenChooser`).
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the parameter, its value and what it may be.
    pub fn validate(&self, limits: Limits) -> Result<SamplingParams> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return refuse("temperature", self.temperature, "a finite number above 0 (neutral 1)");
        }
        if !(1.0 / MAX_PENALTY..=MAX_PENALTY).contains(&self.repetition_penalty) {
            return refuse("repetition_penalty", self.repetition_penalty, "from 0.0001 to 10000 (neutral 1)");
        }
        if !(-MAX_PENALTY..=MAX_PENALTY).contains(&self.frequency_penalty) {
            return refuse("frequency_penalty", self.frequency_penalty, "from -10000 to 10000 (neutral 0)");
        }
        share("top_p", self.top_p)?;
        share("typical_p", self.typical_p)?;
        let draws = self.do_sample
            || self.temperature != 1.0
            || self.top_k != 0
            || self.top_p < 1.0
            || self.typical_p < 1.0;
        Ok(SamplingParams {
            choice: if draws { Choice::Draw { seed: self.seed } } else { Choice::Greedy },
            temperature: self.temperature,
            top_k: self.top_k.min(limits.vocab),
            top_p: self.top_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            watermark: self.watermark.then_some(limits.watermark),
            top_n: self.top_n.min(limits.vocab).min(MAX_TOP_N),
        })
    }
}

fn share(name: &str, value: f32) -> Result<()> {
    if value > 0.0 && value <= 1.0 {
        return Ok(());
    }
    refuse(name, value, "above 0 and at most 1 (neutral 1)")
}

fn refuse<T>(name: &str, value: f32, must: &str) -> Result<T> {
    Err(Error::Invalid(format!("{name} is {value}; it must be {must}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocab: 50, watermark: Watermark { gamma: 0.5, delta: 2.0 } };
    const NEUTRAL: RawSampling = RawSampling {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        do_sample: false,
        seed: 7,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        watermark: false,
        top_n: 0,
    };

    #[test]
    fn any_warper_makes_a_draw_and_penalties_do_not() {
        let choice = |raw: RawSampling| raw.validate(LIMITS).unwrap().choice;
        assert_eq!(NEUTRAL.validate(LIMITS), Ok(SamplingParams::GREEDY));
        assert_eq!(
            choice(RawSampling {
                repetition_penalty: 1.3,
                frequency_penalty: 0.5,
                watermark: true,
                ..NEUTRAL
            }),
            Choice::Greedy
        );
        for raw in [
            RawSampling { do_sample: true, ..NEUTRAL },
            RawSampling { temperature: 0.9, ..NEUTRAL },
            RawSampling { top_k: 3, ..NEUTRAL },
            RawSampling { top_p: 0.9, ..NEUTRAL },
            RawSampling { typical_p: 0.9, ..NEUTRAL },
        ] {
            assert_eq!(choice(raw), Choice::Draw { seed: 7 });
        }
    }

    #[test]
    fn what_no_distribution_has_is_refused_by_name_and_number() {
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 0.0];
        for value in odd {
            for (raw, name) in [
                (RawSampling { temperature: value, ..NEUTRAL }, "temperature"),
                (RawSampling { repetition_penalty: value, ..NEUTRAL }, "repetition_penalty"),
                (RawSampling { top_p: value, ..NEUTRAL }, "top_p"),
                (RawSampling { typical_p: value, ..NEUTRAL }, "typical_p"),
            ] {
                let Err(Error::Invalid(text)) = raw.validate(LIMITS) else { panic!("{name} {value}") };
                assert!(text.starts_with(&format!("{name} is {value}")), "{text}");
            }
        }
        assert!(RawSampling { top_p: 1.01, ..NEUTRAL }.validate(LIMITS).is_err());
        for value in [f32::NAN, f32::INFINITY, -3e38] {
            assert!(RawSampling { frequency_penalty: value, ..NEUTRAL }.validate(LIMITS).is_err());
        }
        for value in [1e-30, 1e30] {
            assert!(RawSampling { repetition_penalty: value, ..NEUTRAL }.validate(LIMITS).is_err());
            assert!(RawSampling { temperature: value, ..NEUTRAL }.validate(LIMITS).is_ok());
        }
        assert!(RawSampling { frequency_penalty: -2.0, ..NEUTRAL }.validate(LIMITS).is_ok());
    }

    #[test]
    fn counts_are_clamped_to_the_vocabulary_and_to_what_an_answer_holds() {
        let raw = RawSampling { top_k: u32::MAX, top_n: u32::MAX, ..NEUTRAL };
        let params = raw.validate(LIMITS).unwrap();
        assert_eq!((params.top_k, params.top_n), (50, 50));
        assert_eq!(raw.validate(Limits { vocab: 1000, ..LIMITS }).unwrap().top_n, 100);
    }
}
