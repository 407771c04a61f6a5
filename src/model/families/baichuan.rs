//! Baichuan and Baichuan 2 (`modeling_baichuan.py` of the four checkpoints): LLaMA's shape with one projection for
//! queries, keys and values. The 13B models have ALiBi in place of rotary embeddings, the second generation divides the
//! head's rows by their lengths.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::{Error, Result};
use crate::model::layout::Place;
use crate::model::names::{LayerRole, Names, Role};
use crate::model::spec::{DecoderSpec, Head, Positions, limits};

/// Baichuan-7B, which alone writes its name with a capital C.
pub(super) const BAICHUAN_7B: Family = Family {
    architectures: &["BaiChuanForCausalLM"],
    model_types: &[],
    read: |config| read_as(config, false, false),
};

/// Baichuan-13B, Baichuan2-7B and Baichuan2-13B.
pub(super) const BAICHUAN: Family = Family {
    architectures: &["BaichuanForCausalLM"],
    model_types: &["baichuan"],
    read: |config| read_as(config, has_alibi(config)?, has_norm_head(config)?),
};

fn read_as(config: &Config<'_>, alibi: bool, norm_head: bool) -> Result<Reading> {
    // The 13B files state no max_position_embeddings.
    let max_positions = config.count("model_max_length", limits::POSITIONS)?.unwrap_or(4096);
    let mut reading = llama::read("baichuan", config, &Class { max_positions, ..CLASS }, |_| ())?;
    if alibi {
        reading.spec.positions = Positions::Alibi;
    }
    if norm_head {
        reading.spec.head = Head::Normalised;
    }
    Ok(Reading { names: NAMES, ..reading })
}

/// No key of the published files says so: the hidden size tells them apart, or a key of ours in files of other sizes.
fn has_alibi(config: &Config<'_>) -> Result<bool> {
    if let Some(alibi) = config.flag("kvshard_alibi")? {
        return Ok(alibi);
    }
    match config.required_count("hidden_size", limits::HIDDEN)? {
        4096 => Ok(false),
        5120 => Ok(true),
        other => Err(Error::Checkpoint(format!(
            "a Baichuan of hidden_size {other} is neither the 7B (4096, rotary) nor the 13B (5120, ALiBi): its config \
             needs a key kvshard_alibi, true or false"
        ))),
    }
}

/// Likewise by the vocabulary, which grew with the second generation.
fn has_norm_head(config: &Config<'_>) -> Result<bool> {
    match config.flag("kvshard_norm_head")? {
        Some(normalised) => Ok(normalised),
        None => Ok(config.required_count("vocab_size", limits::VOCAB)? == 125_696),
    }
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let packed = |which| {
        Place::of(&["model.layers.{layer}.self_attn.W_pack.weight"]).block(1, &shape::qkv_rows(spec), which)
    };
    match role {
        Role::Layer(_, LayerRole::Query) => packed(0),
        Role::Layer(_, LayerRole::Key) => packed(1),
        Role::Layer(_, LayerRole::Value) => packed(2),
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{refusal_of, spec_of};
    use crate::model::spec::{Head, Positions};

    /// Positions and head of a file without keys of ours.
    fn published(hidden: usize, vocab: usize) -> (bool, Head) {
        let sizes = json!({
            "hidden_size": hidden, "vocab_size": vocab, "kvshard_alibi": null, "kvshard_norm_head": null,
            "num_attention_heads": hidden / 128
        });
        let spec = spec_of("BaichuanForCausalLM", sizes);
        (spec.positions == Positions::Alibi, spec.head)
    }

    #[test]
    fn sizes_tell_the_published_ones_apart() {
        assert_eq!(published(4096, 125_696), (false, Head::Normalised));
        assert_eq!(published(5120, 64_000), (true, Head::Untied));
        assert_eq!(published(5120, 125_696), (true, Head::Normalised));
        let refusal = refusal_of("BaichuanForCausalLM", json!({"kvshard_alibi": null}));
        assert!(refusal.contains("hidden_size 32 is neither"), "{refusal}");
    }

    #[test]
    fn the_first_turns_and_ignores_what_tells_others_apart() {
        let spec =
            spec_of("BaiChuanForCausalLM", json!({"kvshard_alibi": true, "max_position_embeddings": 512}));
        assert_eq!((spec.ropes().len(), spec.head, spec.max_positions), (1, Head::Untied, 512));
    }
}
