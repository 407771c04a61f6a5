//! Rotary embeddings as configs write them, in both dialects: `rope_theta` and `rope_scaling`, or `rope_parameters`.

use super::config::Config;
use crate::error::{Error, Result};
use crate::model::spec::{Positions, RampBounds, Rope, RopeScaling, limits};

/// Largest factor by which a scaling stretches; published ones stay below 100.
const MAX_FACTOR: f64 = 1e6;

/// Smallest base of frequencies.
pub(super) const MIN_BASE: f64 = 1.0 + 1e-6;

/// Largest base of frequencies.
pub(super) const MAX_BASE: f64 = 1e18;

/// Keys that say how much of a head turns.
const PART_KEYS: [&str; 3] = ["partial_rotary_factor", "rope_pct", "rotary_pct"];

/// What a family says of rotary embeddings where its files are silent.
pub(super) struct Wanted {
    /// Width of a head.
    pub(super) head_dim: usize,
    /// `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// Base of the frequencies.
    pub(super) base: f64,
    /// The part of a head that turns; `None` where the family turns all of it, whatever a file says.
    pub(super) part: Option<f64>,
    /// Types that the family's files call otherwise: theirs, then the usual one.
    pub(super) aliases: &'static [(&'static str, &'static str)],
}

/// What a config says of positions.
pub(super) struct Rotary {
    /// The embeddings.
    pub(super) ropes: Vec<Rope>,
    /// Positions that the scaling makes usable.
    pub(super) max_positions: usize,
    /// Worth telling.
    pub(super) notes: Vec<String>,
}

/// Reads the rotary embedding of all layers.
///
/// The number of usable positions is derived as vLLM derives it: `max_position_embeddings` times the factor for linear
/// and dynamic scaling, the original length times the factor for yarn, and `max_position_embeddings` as it is for
/// `llama3` and longrope, whose files state the stretched length there.
pub(super) fn rotary(config: &Config<'_>, wanted: &Wanted) -> Result<Rotary> {
    let scaling = match config.section("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.section("rope_scaling")?,
    };
    if scaling.as_ref().is_some_and(|section| section.mentions("full_attention")) {
        return Err(Error::Unsupported(
            "rotary embeddings that differ by layer are not served in this family".to_owned(),
        ));
    }
    let (rope, max_positions) = rope(config, scaling.as_ref(), "rope_theta", wanted)?;
    let mut notes = Vec::new();
    if max_positions != wanted.max_positions {
        notes.push(format!(
            "rope scaling makes {max_positions} positions of {} in the config",
            wanted.max_positions
        ));
    }
    Ok(Rotary { ropes: vec![rope], max_positions, notes })
}

/// Reads one rotary embedding, whose scaling is in a section of its own and whose base is there or under `base_key`, and
/// the positions that it makes usable.
pub(super) fn rope(
    config: &Config<'_>,
    scaling: Option<&Config<'_>>,
    base_key: &str,
    wanted: &Wanted,
) -> Result<(Rope, usize)> {
    let width = width(config, scaling, wanted)?;
    let base = base(config, scaling, base_key, wanted.base)?;
    let (kind, max_positions) = match scaling {
        None => (RopeScaling::Unscaled, wanted.max_positions),
        Some(scaling) => Reader { config, scaling, width, wanted }.read()?,
    };
    Ok((Rope { base, width, scaling: kind }, max_positions))
}

/// What an operator should know of positions that depend on more than their number.
pub(super) fn sharing_note(positions: &Positions) -> Option<String> {
    let Positions::Rope(ropes) = positions else { return None };
    ropes.iter().find_map(|rope| match &rope.scaling {
        RopeScaling::Dynamic { original, .. } => Some(format!(
            "dynamic rope scaling: beyond {original} tokens, cached prefixes are shared between equal lengths only"
        )),
        RopeScaling::LongRope { original, .. } => Some(format!(
            "longrope: cached prefixes are not shared between sequences up to {original} tokens and longer ones"
        )),
        RopeScaling::PromptNtk { trained } => Some(format!(
            "prompt NTK: frequencies follow from the prompt's length beyond {trained} tokens, and cached prefixes are \
             shared only among prompts within the same power of two"
        )),
        RopeScaling::Unscaled
        | RopeScaling::Linear { .. }
        | RopeScaling::Llama3 { .. }
        | RopeScaling::Yarn { .. } => None,
    })
}

/// The base of the frequencies; YaRN needs its logarithm to be positive.
fn base(config: &Config<'_>, scaling: Option<&Config<'_>>, key: &str, default: f64) -> Result<f64> {
    let given = match scaling {
        Some(scaling) => scaling.number("rope_theta", MIN_BASE, MAX_BASE)?,
        None => None,
    };
    match given {
        Some(base) => Ok(base),
        None => Ok(config.number(key, MIN_BASE, MAX_BASE)?.unwrap_or(default)),
    }
}

/// Numbers of a head that turn.
fn width(config: &Config<'_>, scaling: Option<&Config<'_>>, wanted: &Wanted) -> Result<usize> {
    let mut given = None;
    for section in scaling.into_iter().chain([config]) {
        for key in PART_KEYS {
            given = given.or(section.number(key, 0.0, 1.0)?);
        }
    }
    match (wanted.part, given) {
        (None, Some(part)) if part < 1.0 => Err(Error::Unsupported(format!(
            "rotary embeddings over {part} of the head are not served in this family"
        ))),
        (None, _) => Ok(wanted.head_dim),
        (Some(default), given) => part_of(wanted.head_dim, given.unwrap_or(default)),
    }
}

/// The width of a part of a head.
pub(super) fn part_of(head_dim: usize, part: f64) -> Result<usize> {
    // A head is at most limits::HEAD_DIM wide.
    let width = (head_dim as f64 * part) as usize;
    if width == 0 || !width.is_multiple_of(2) {
        return Err(Error::Checkpoint(format!(
            "{part} of a head of {head_dim} is a rotary width of {width}, which is not even and above 0"
        )));
    }
    Ok(width)
}

/// What is read together.
struct Reader<'a, 'b> {
    config: &'a Config<'b>,
    scaling: &'a Config<'b>,
    /// Numbers of a head that turn.
    width: usize,
    wanted: &'a Wanted,
}

impl Reader<'_, '_> {
    /// The scaling and the positions that it makes usable.
    fn read(&self) -> Result<(RopeScaling, usize)> {
        let declared = self.wanted.max_positions;
        let kind = match self.scaling.text("rope_type")? {
            Some(kind) => kind,
            None => self.scaling.text("type")?.unwrap_or("default"),
        };
        let alias = self.wanted.aliases.iter().find(|(theirs, _)| *theirs == kind);
        match alias.map_or(kind, |&(_, usual)| usual) {
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
        Ok(original.unwrap_or(self.wanted.max_positions) as u32)
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
        let ratio = self.wanted.max_positions as f64 / f64::from(original);
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
        let divisors = |key| self.scaling.required_numbers(key, self.width / 2, 1.0 / MAX_FACTOR, MAX_FACTOR);
        let ratio = self.wanted.max_positions as f64 / f64::from(original);
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
}

/// YaRN's amplitude (equation 22 of the paper, with DeepSeek's multiplier).
pub(super) fn yarn_amplitude(factor: f64, scale: f64) -> f64 {
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
