//! From `config.json` to a [`DecoderSpec`] and the names of the checkpoint's tensors: one file a family.
//!
//! To add a family, write a file with a [`Family`], add it to [`FAMILIES`], and put a tiny checkpoint of it among the
//! fixtures of the golden test.

mod baichuan;
mod bloom;
mod chatglm;
mod cohere;
mod config;
mod deepseek;
mod falcon;
mod gemma;
mod gpt_bigcode;
mod gpt_oss;
mod granite;
mod internlm;
mod llama;
mod minicpm;
mod mistral;
mod mixtral;
mod phi3;
mod positions;
mod qwen;
mod qwen2;
mod qwen3;
mod shape;
mod stablelm;
mod starcoder2;

use std::path::Path;

use serde_json::Value;

use self::config::Config;
use super::checkpoint::{DType, read_limited};
use super::names::Names;
use super::spec::DecoderSpec;
use crate::error::{Error, Result};

/// A model's configuration, in every model folder.
pub const CONFIG_FILE: &str = "config.json";

/// Longest configuration read; the longest published ones, with their lists of labels, have a few hundred KiB.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Every family that is served.
const FAMILIES: &[Family] = &[
    llama::LLAMA,
    llama::YI,
    mistral::MISTRAL,
    mixtral::MIXTRAL,
    qwen::QWEN,
    qwen2::QWEN2,
    qwen3::QWEN3,
    qwen3::QWEN3_MOE,
    deepseek::DEEPSEEK_V2,
    deepseek::DEEPSEEK_V3,
    gemma::GEMMA2,
    gemma::GEMMA3,
    gemma::GEMMA3_WITH_VISION,
    gpt_oss::GPT_OSS,
    phi3::PHI3,
    cohere::COHERE,
    stablelm::STABLELM,
    minicpm::MINICPM,
    granite::GRANITE,
    internlm::INTERNLM,
    baichuan::BAICHUAN_7B,
    baichuan::BAICHUAN,
    chatglm::CHATGLM,
    bloom::BLOOM,
    gpt_bigcode::GPT_BIGCODE,
    starcoder2::STARCODER2,
    falcon::FALCON,
];

/// Architectures close to served ones, and why they are not.
const UNSERVED: &[(&str, &str)] = &[("Phi3SmallForCausalLM", "its attention is block-sparse")];

/// How a family is recognised and read.
struct Family {
    /// Values of `architectures[0]`.
    architectures: &'static [&'static str],
    /// Values of `model_type`, which decides where a file names no architecture.
    model_types: &'static [&'static str],
    /// Reads the rest of the file.
    read: fn(&Config<'_>) -> Result<Reading>,
}

/// What a family reads.
struct Reading {
    spec: DecoderSpec,
    names: Names,
    notes: Vec<String>,
}

/// A model as its configuration describes it.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The decoder.
    pub spec: DecoderSpec,
    /// What its checkpoint calls the tensors.
    pub names: Names,
    /// The dtype that the file claims for the weights, where it is one that can be read.
    pub dtype: Option<DType>,
    /// What an operator should know: choices made where references differ, limits that were derived.
    pub notes: Vec<String>,
}

/// Reads `config.json` of a model's folder.
///
/// # Errors
/// [`Error::Checkpoint`] when the file is missing, too long or no JSON.
pub fn read_config(folder: &Path) -> Result<Value> {
    let text = read_limited(&folder.join(CONFIG_FILE), CONFIG_FILE, MAX_CONFIG_BYTES)?;
    serde_json::from_slice(&text)
        .map_err(|error| Error::Checkpoint(format!("{CONFIG_FILE} is no JSON: {error}")))
}

/// Maps a parsed `config.json`, in the dialect of `transformers` 4 or 5, to a decoder.
///
/// # Errors
/// [`Error::Unsupported`] for an architecture or a variant that is not served, [`Error::Checkpoint`] for values that
/// make no model.
pub fn resolve(config: &Value) -> Result<Resolved> {
    let config = Config::new(config)?;
    let family = recognise(&config)?;
    if let Some(quantization) = config.section("quantization_config")? {
        let method = quantization.text("quant_method")?.unwrap_or("unnamed");
        return Err(Error::Unsupported(format!(
            "the weights are quantized ({method}), which is not served yet"
        )));
    }
    let Reading { spec, names, mut notes } = (family.read)(&config)?;
    spec.check()?;
    notes.extend(positions::sharing_note(&spec.positions));
    let dtype = match config.text("dtype")? {
        Some(name) => Some(name),
        None => config.text("torch_dtype")?,
    };
    Ok(Resolved { spec, names, dtype: dtype.and_then(DType::from_name), notes })
}

/// The family of a file: by `architectures[0]`, or by `model_type` where there is none.
fn recognise(config: &Config<'_>) -> Result<&'static Family> {
    if let Some(architecture) = config.first_text("architectures")? {
        let family = FAMILIES.iter().find(|family| family.architectures.contains(&architecture));
        return family.ok_or_else(|| {
            if let Some((_, why)) = UNSERVED.iter().find(|(name, _)| *name == architecture) {
                return Error::Unsupported(format!("the architecture {architecture} is not served: {why}"));
            }
            let known: Vec<&str> =
                FAMILIES.iter().filter_map(|family| family.model_types.first()).copied().collect();
            let known = known.join(", ");
            Error::Unsupported(format!(
                "the architecture {architecture:.60} is not served; the model types that are: {known}"
            ))
        });
    }
    let Some(model_type) = config.text("model_type")? else {
        return Err(Error::Checkpoint("the config has neither architectures nor model_type".to_owned()));
    };
    let family = FAMILIES.iter().find(|family| family.model_types.contains(&model_type));
    family.ok_or_else(|| Error::Unsupported(format!("the model type {model_type:.60} is not served")))
}

#[cfg(test)]
pub(crate) mod tests;
