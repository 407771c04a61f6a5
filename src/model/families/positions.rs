//! Rotary embeddings as configs write them, in both dialects: `rope_theta` and `rope_scaling`, or `rope_parameters`.

use super::config::Config;
use crate::error::{Error, Result};
use crate::model::spec::{RampBounds, Rope, RopeScaling, limits};

/// Largest factor by which a scaling stretches; published ones stay below 100.
const MAX_FACTOR: f64 = 1e6;

/// What a config says of positions.
pub(super) struct Rotary {
    /// The embedding.
    pub(super) rope: Rope,
    /// Positions that the scaling makes usable.
    pub(super) max_positions: usize,
    /// Worth telling.
    pub(super) notes: Vec<String>,
}

/// Reads the rotary embedding over heads of `head_dim`.
///
/// The number of usable positions is derived as vLLM derives it: `max_position_embeddings` times the factor for linear
/// and dynamic scaling, the original length times the factor for yarn, and `max_position_embeddings` as it is for
/// `llama3` and longrope, whose files state the stretched length there.
pub(super) fn rotary(
    config: &Config<'_>,
    head_dim: usize,
    max_position_embeddings: usize,
    default_base: f64,
) -> Result<Rotary> {
    let parameters = config.section("rope_parameters")?;
    let scaling = match &parameters {
        Some(_) => parameters,
        None => config.section("rope_scaling")?,
    };
    let Some(scaling) = scaling else {
        let rope = Rope { base: base(config, None, default_base)?, width: head_dim, scaling: RopeScaling::Unscaled };
        check_whole(config)?;
        return Ok(Rotary { rope, max_positions: max_position_embeddings, notes: Vec::new() });
    };
    if scaling.mentions("full_attention") || scaling.mentions("sliding_attention") {
        return Err(Error::Unsupported(
            "rotary embeddings that differ by layer are not served yet".to_owned(),
        ));
    }
    check_whole(config)?;
    check_whole(&scaling)?;
    let reader = Reader { config, scaling: &scaling, head_dim, max_position_embeddings };
    let (kind, max_positions) = reader.read()?;
    let notes = reader.notes(&kind, max_positions);
    let rope = Rope { base: base(config, Some(&scaling), default_base)?, width: head_dim, scaling: kind };
    Ok(Rotary { rope, max_positions, notes })
}

/// The base of the frequencies; YaRN needs its logarithm to be positive.
fn base(config: &Config<'_>, scaling: Option<&Config<'_>>, default: f64) -> Result<f64> {
    const RANGE: (f64, f64) = (1.0 + 1e-6, 1e18);
    if let Some(scaling) = scaling
        && let Some(base) = scaling.number("rope_theta", RANGE.0, RANGE.1)?
    {
        return Ok(base);
    }
    Ok(config.number("rope_theta", RANGE.0, RANGE.1)?.unwrap_or(default))
}

/// Refuses embeddings over a part of the head.
fn check_whole(section: &Config<'_>) -> Result<()> {
    match section.number("partial_rotary_factor", 0.0, 1.0)? {
        Some(part) if part < 1.0 => Err(Error::Unsupported(format!(
            "rotary embeddings over {part} of the head are not served in this family"
        ))),
        _ => Ok(()),
    }
}

/// What is read together.
struct Reader<'a, 'b> {
    config: &'a Config<'b>,
    scaling: &'a Config<'b>,
    head_dim: usize,
    max_position_embeddings: usize,
}

impl Reader<'_, '_> {
    /// The scaling and the positions that it makes usable.
    fn read(&self) -> Result<(RopeScaling, usize)> {
        let declared = self.max_position_embeddings;
        let kind = match self.scaling.text("rope_type")? {
            Some(kind) => kind,
            None => self.scaling.text("type")?.unwrap_or("default"),
        };
        match kind {
            "default" if self.scaling.mentions("factor") && !self.says_type() => {
                Err(Error::Checkpoint("the config's rope scaling has a factor but no type".to_owned()))
            }
            "default" => Ok((RopeScaling::Unscaled, declared)),
            "linear" => {
                let factor = self.scaling.required_number("factor", 1.0 / MAX_FACTOR, MAX_FACTOR)?;
                Ok((RopeScaling::Linear { factor }, stretched(declared, factor)?))
            }
            "dynamic" => {
                let factor = self.factor()?;
                let original = declared as u32;
                Ok((RopeScaling::Dynamic { factor, original }, stretched(declared, factor)?))
            }
            "llama3" => Ok((self.llama3()?, declared)),
            "yarn" => self.yarn(),
            "longrope" | "su" => Ok((self.longrope()?, declared)),
            other => Err(Error::Unsupported(format!("the rope type {other:.40} is not served"))),
        }
    }

    fn says_type(&self) -> bool {
        self.scaling.mentions("rope_type") || self.scaling.mentions("type")
    }

    fn factor(&self) -> Result<f64> {
        self.scaling.required_number("factor", 1.0, MAX_FACTOR)
    }

    /// Positions of the original training: beside the scaling, else in it, else all that the file declares.
    fn original(&self) -> Result<u32> {
        const KEY: &str = "original_max_position_embeddings";
        let original = match self.config.count(KEY, limits::POSITIONS)? {
            Some(original) => Some(original),
            None => self.scaling.count(KEY, limits::POSITIONS)?,
        };
        // limits::POSITIONS fits in 32 bits.
        Ok(original.unwrap_or(self.max_position_embeddings) as u32)
    }

    fn llama3(&self) -> Result<RopeScaling> {
        let factor = self.factor()?;
        let low_freq_factor = self.scaling.required_number("low_freq_factor", 1e-6, MAX_FACTOR)?;
        let high_freq_factor = self.scaling.required_number("high_freq_factor", 1e-6, MAX_FACTOR)?;
        if low_freq_factor >= high_freq_factor {
            return Err(Error::Checkpoint(format!(
                "the config's low_freq_factor {low_freq_factor} is not below its high_freq_factor {high_freq_factor}"
            )));
        }
        Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original: self.original()? })
    }

    fn yarn(&self) -> Result<(RopeScaling, usize)> {
        let original = self.original()?;
        let ratio = self.max_position_embeddings as f64 / f64::from(original);
        let factor = self.scaling.number("factor", 1.0, MAX_FACTOR)?.unwrap_or(ratio.max(1.0));
        let optional = |key| self.scaling.number(key, 0.0, MAX_FACTOR);
        // A zero counts as absent, as in the reference.
        let nonzero = |key| optional(key).map(|value| value.filter(|&x| x > 0.0));
        let amplitude = match (self.attention_factor()?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(given), _, _) => given,
            (None, Some(scale), Some(all)) => yarn_amplitude(factor, scale) / yarn_amplitude(factor, all),
            (None, _, _) => yarn_amplitude(factor, 1.0),
        };
        let exact = self.scaling.flag("truncate")? == Some(false);
        let scaling = RopeScaling::Yarn {
            factor,
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            original,
            ramp_bounds: if exact { RampBounds::Exact } else { RampBounds::Whole },
            amplitude,
        };
        Ok((scaling, stretched(original as usize, factor)?))
    }

    fn longrope(&self) -> Result<RopeScaling> {
        let original = self.original()?;
        let divisors =
            |key| self.scaling.required_numbers(key, self.head_dim / 2, 1.0 / MAX_FACTOR, MAX_FACTOR);
        let ratio = self.max_position_embeddings as f64 / f64::from(original);
        let factor = self.scaling.number("factor", 1.0 / MAX_FACTOR, MAX_FACTOR)?.unwrap_or(ratio);
        let amplitude = match self.attention_factor()? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None if original < 2 => {
                return Err(Error::Checkpoint(
                    "longrope over 1 original position has no amplitude".to_owned(),
                ));
            }
            None => (1.0 + factor.ln() / f64::from(original).ln()).sqrt(),
        };
        let (short, long) = (divisors("short_factor")?, divisors("long_factor")?);
        Ok(RopeScaling::LongRope { short, long, original, amplitude })
    }

    fn attention_factor(&self) -> Result<Option<f64>> {
        self.scaling.number("attention_factor", 1.0 / MAX_FACTOR, MAX_FACTOR)
    }

    fn notes(&self, scaling: &RopeScaling, max_positions: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if max_positions != self.max_position_embeddings {
            notes.push(format!(
                "rope scaling makes {max_positions} positions of {} in the config",
                self.max_position_embeddings
            ));
        }
        match scaling {
            RopeScaling::Dynamic { original, .. } => notes.push(format!(
                "dynamic rope scaling: beyond {original} tokens, cached prefixes are shared between equal lengths only"
            )),
            RopeScaling::LongRope { original, .. } => notes.push(format!(
                "longrope: cached prefixes are not shared between sequences up to {original} tokens and longer ones"
            )),
            _ => {}
        }
        notes
    }
}

/// YaRN's amplitude (equation 22 of the paper, with DeepSeek's multiplier).
fn yarn_amplitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

/// Positions after a stretch.
fn stretched(positions: usize, factor: f64) -> Result<usize> {
    let stretched = (positions as f64 * factor).floor();
    if !(1.0..=limits::POSITIONS as f64).contains(&stretched) {
        let most = limits::POSITIONS;
        return Err(Error::Checkpoint(format!(
            "{positions} positions stretched by {factor} are not between 1 and {most}"
        )));
    }
    Ok(stretched as usize)
}
