//! What a model needs: parameters, bytes of weights, of keys and values, and of everything else, before any of it is
//! loaded.

use super::checkpoint::DType;
use super::families::Resolved;
use super::partition::{Partition, Shard};
use super::spec::{Attention, DecoderSpec, LatentAttention, Mlp};
use super::weights::Weights;
use super::workspace::{AttentionWidth, MlpWidth, Widths};
use crate::backend::Heads;
use crate::error::{Error, Result};

/// What the operator chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Ranks among which the model is cut.
    pub world: usize,
    /// Slots of the KV pool, slot 0 included.
    pub n_slots: u64,
    /// Lanes on the device.
    pub n_lanes: u64,
    /// Most tokens of one step.
    pub max_step_tokens: u64,
    /// Dtype of weights that no file holds.
    pub weight_dtype: DType,
    /// Dtype of the residual stream and what is computed from it.
    pub activation_dtype: DType,
    /// Dtype of keys and values.
    pub kv_dtype: DType,
    /// Numbers that a lane keeps on the device, beside its slots: a count of each id's occurrences, on a GPU.
    pub lane_counts: bool,
    /// Bytes that stay free for libraries, recorded graphs and the driver.
    pub headroom_bytes: u64,
}

impl Default for PlanOptions {
    fn default() -> PlanOptions {
        PlanOptions {
            world: 1,
            n_slots: 4096,
            n_lanes: 64,
            max_step_tokens: 4096,
            weight_dtype: DType::BF16,
            activation_dtype: DType::F32,
            kv_dtype: DType::F32,
            lane_counts: false,
            headroom_bytes: 0,
        }
    }
}

/// A model's memory. Bytes are those of one rank, the one that needs most, unless said otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryPlan {
    /// Weights as numbers, a tied head counted once; of the whole model.
    pub n_parameters: u64,
    /// Weights as stored; of the whole model.
    pub weight_bytes: u64,
    /// Weights.
    pub rank_weight_bytes: u64,
    /// Keys and values of a slot, over all layers and ranks, copied KV heads included.
    pub kv_bytes_per_slot: u64,
    /// Keys and values of the pool.
    pub rank_kv_bytes: u64,
    /// Intermediates of the largest step.
    pub activation_bytes: u64,
    /// Final hidden states and logits of as many rows as there are lanes, in f32.
    pub logit_bytes: u64,
    /// Slot tables, last tokens and positions of the lanes, and counts of ids where the device keeps them.
    pub lane_bytes: u64,
    /// Left free for libraries, recorded graphs and the driver.
    pub headroom_bytes: u64,
    /// All of the above that lie on one rank.
    pub rank_total_bytes: u64,
}

impl MemoryPlan {
    /// Computes the plan of a model; `weights` are its files, where there are any.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the spec does not divide among the ranks or the sum exceeds 64 bits.
    pub fn new(model: &Resolved, weights: Option<&Weights>, options: &PlanOptions) -> Result<MemoryPlan> {
        let spec = &model.spec;
        // Rank 0 never holds less than another.
        let part = Partition::new(spec, Shard { rank: 0, world: options.world })?;
        let n_parameters = spec.n_parameters();
        let stored = n_parameters * options.weight_dtype.size_bytes() as u64;
        let weight_bytes = weights.map_or(stored, Weights::bytes);
        let rank_parameters = n_parameters_of(spec, &part)?;
        // Shares of files in several dtypes are taken as equal, which norms and biases hardly disturb.
        let rank_weight_bytes =
            (u128::from(weight_bytes) * u128::from(rank_parameters) / u128::from(n_parameters.max(1))) as u64;
        let kv_numbers =
            spec.kv_elements_per_token() / spec.attention.kv_heads() as u64 * part.kv_heads.len() as u64;
        let rank_slot = kv_numbers * options.kv_dtype.size_bytes() as u64;
        let activations = width_of_a_token(spec, &part)? * options.activation_dtype.size_bytes() as u64;
        let counts = if options.lane_counts { spec.vocab as u64 } else { 0 };
        let mut sum = Sum::default();
        sum.add(1, rank_weight_bytes);
        sum.add(1, options.headroom_bytes);
        let plan = MemoryPlan {
            n_parameters,
            weight_bytes,
            rank_weight_bytes,
            kv_bytes_per_slot: rank_slot * options.world as u64,
            rank_kv_bytes: sum.add(options.n_slots, rank_slot),
            activation_bytes: sum.add(options.max_step_tokens, activations),
            logit_bytes: sum
                .add(options.n_lanes, width_of_a_logit_row(spec, &part) * size_of::<f32>() as u64),
            lane_bytes: sum
                .add(options.n_lanes, (spec.max_positions as u64 + counts + 2) * size_of::<u32>() as u64),
            headroom_bytes: options.headroom_bytes,
            rank_total_bytes: 0,
        };
        let rank_total_bytes =
            sum.total.ok_or_else(|| Error::Invalid("the memory plan exceeds 64 bits of bytes".to_owned()))?;
        Ok(MemoryPlan { rank_total_bytes, ..plan })
    }
}

/// Products and their sum, or `None` once one of them overflowed.
struct Sum {
    total: Option<u64>,
}

impl Default for Sum {
    fn default() -> Sum {
        Sum { total: Some(0) }
    }
}

impl Sum {
    fn add(&mut self, n: u64, each: u64) -> u64 {
        let product = n.checked_mul(each);
        self.total = self.total.zip(product).and_then(|(total, product)| total.checked_add(product));
        product.unwrap_or(u64::MAX)
    }
}

/// Weights of a rank: those of a decoder with its heads, neurons and vocabulary.
fn n_parameters_of(spec: &DecoderSpec, part: &Partition) -> Result<u64> {
    let mut own = spec.clone();
    match &mut own.attention {
        Attention::Heads(heads) => {
            (heads.heads, heads.kv_heads) = (part.heads.len(), part.kv_heads.len());
        }
        Attention::Latent(latent) => latent.heads = part.heads.len(),
    }
    own.vocab = part.vocab.len();
    for layer in &mut own.layers {
        match &mut layer.mlp {
            Mlp::Gated { width, .. } | Mlp::Plain { width, .. } => *width = part.neurons(*width)?.len(),
            Mlp::Experts(experts) => {
                experts.width = part.neurons(experts.width)?.len();
                experts.shared_width = part.neurons(experts.shared_width)?.len();
            }
        }
    }
    Ok(own.n_parameters())
}

/// Numbers of a sampled row: final hidden state, logits, and the rank's part of them where there are several.
fn width_of_a_logit_row(spec: &DecoderSpec, part: &Partition) -> u64 {
    let own = if part.vocab.len() < spec.vocab { part.vocab.len() } else { 0 };
    (spec.hidden + spec.vocab + own) as u64
}

/// Numbers that a step keeps for each token, as `workspace` lays them out; of experts, what each that is chosen reads,
/// its gate, up and their product, and what it returns.
fn width_of_a_token(spec: &DecoderSpec, part: &Partition) -> Result<u64> {
    let attention = match spec.attention {
        Attention::Heads(heads) => {
            let (n, kv_heads) = (part.heads.len(), part.kv_heads.len());
            AttentionWidth::Heads(Heads { heads: n, kv_heads, head_dim: heads.head_dim })
        }
        Attention::Latent(latent) => {
            AttentionWidth::Latent(LatentAttention { heads: part.heads.len(), ..latent })
        }
    };
    let (mut mlps, mut of_experts) = (Vec::new(), 0);
    for layer in &spec.layers {
        let width = match layer.mlp {
            Mlp::Gated { width, .. } => MlpWidth { neurons: part.neurons(width)?.len(), gated: true },
            Mlp::Plain { width, .. } => MlpWidth { neurons: part.neurons(width)?.len(), gated: false },
            Mlp::Experts(experts) => {
                let neurons = part.neurons(experts.width)?.len();
                of_experts = experts.n_chosen * (2 * spec.hidden + 3 * neurons);
                MlpWidth { neurons: part.neurons(experts.shared_width)?.len(), gated: true }
            }
        };
        if !mlps.contains(&width) {
            mlps.push(width);
        }
    }
    let two_norms = Widths::has_two_norms(spec);
    let (vocab_part, vocab) = (part.vocab.len(), spec.vocab);
    let widths = Widths { hidden: spec.hidden, attention, mlps, experts: None, two_norms, vocab_part, vocab };
    Ok((widths.numbers() + of_experts) as u64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::families::resolve;

    fn llama31_8b() -> Resolved {
        resolve(&json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
            "max_position_embeddings": 131072
        }))
        .unwrap()
    }

    fn options(world: usize) -> PlanOptions {
        PlanOptions { world, n_slots: 1000, kv_dtype: DType::BF16, ..PlanOptions::default() }
    }

    #[test]
    fn one_rank_holds_all() {
        let plan = MemoryPlan::new(&llama31_8b(), None, &options(1)).unwrap();
        assert_eq!((plan.n_parameters, plan.weight_bytes), (8_030_261_248, 16_060_522_496));
        assert_eq!(plan.rank_weight_bytes, plan.weight_bytes);
        assert_eq!((plan.kv_bytes_per_slot, plan.rank_kv_bytes), (131_072, 131_072_000));
        assert_eq!(plan.logit_bytes, 64 * (4096 + 128_256) * 4);
        let parts = plan.rank_weight_bytes + plan.rank_kv_bytes + plan.activation_bytes + plan.logit_bytes;
        assert_eq!(plan.rank_total_bytes, parts + plan.lane_bytes);
    }

    #[test]
    fn ranks_share_weights_and_copy_kv_heads() {
        let whole = MemoryPlan::new(&llama31_8b(), None, &options(1)).unwrap();
        let quarter = MemoryPlan::new(&llama31_8b(), None, &options(4)).unwrap();
        assert_eq!(quarter.rank_kv_bytes * 4, whole.rank_kv_bytes);
        assert!(quarter.rank_weight_bytes * 4 >= whole.weight_bytes);
        assert!(quarter.rank_weight_bytes * 4 < whole.weight_bytes + whole.weight_bytes / 100);
        // Sixteen ranks for eight KV heads: each head twice.
        let copied = MemoryPlan::new(&llama31_8b(), None, &options(16)).unwrap();
        assert_eq!(copied.kv_bytes_per_slot, 2 * whole.kv_bytes_per_slot);
        assert!(MemoryPlan::new(&llama31_8b(), None, &options(3)).is_err());
    }

    #[test]
    fn bytes_are_those_of_the_files_where_there_are_any() {
        let model = resolve(&json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 10
        }))
        .unwrap();
        let checkpoint = Checkpoint::dummy(&model.spec, &model.names, DType::F32, 1).unwrap();
        let weights = Weights::open(&checkpoint, &model.spec, &model.names).unwrap();
        let plan = MemoryPlan::new(&model, Some(&weights), &options(1)).unwrap();
        assert_eq!(plan.weight_bytes, 4 * plan.n_parameters);
    }

    #[test]
    fn too_much_is_an_error() {
        let options = PlanOptions { n_slots: u64::MAX, ..options(1) };
        assert!(MemoryPlan::new(&llama31_8b(), None, &options).unwrap_err().to_string().contains("64 bits"));
    }
}
