//! Feed-forward parts: MLPs, and mixtures of them.

use super::Bias;

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mlp {
    /// `down(act(gate(x)) ∘ up(x))`.
    Gated {
        /// Of the gate.
        activation: Activation,
        /// Neurons.
        width: usize,
        /// Of all three projections.
        bias: Bias,
    },
    /// `down(act(up(x)))`.
    Plain {
        /// Of the neurons.
        activation: Activation,
        /// Neurons.
        width: usize,
        /// Of both projections.
        bias: Bias,
    },
    /// A few of many gated MLPs, chosen by each token.
    Experts(Experts),
}

impl Mlp {
    /// Neurons; of experts those of one.
    pub fn width(&self) -> usize {
        match self {
            Mlp::Gated { width, .. } | Mlp::Plain { width, .. } => *width,
            Mlp::Experts(experts) => experts.width,
        }
    }
}

/// A mixture of experts: `Σ w_e · expert_e(x)` over the chosen, plus the shared expert's output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// Experts to choose from.
    pub n_experts: usize,
    /// Chosen for each token.
    pub n_chosen: usize,
    /// Neurons of an expert.
    pub width: usize,
    /// Of the gates.
    pub activation: Activation,
    /// Of the experts' projections.
    pub bias: Bias,
    /// How they are chosen and weighed.
    pub router: Router,
    /// Neurons of a gated MLP that every token passes, of the same activation; 0 for none.
    pub shared_width: usize,
}

/// How experts are chosen and weighed, from the f32 logits of the router. Ties go to the lower number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Router {
    /// Softmax over all; the chosen weights are divided by their sum (Mixtral, Qwen3).
    SoftmaxRenormalised,
    /// Softmax over all; the chosen weights are multiplied by `factor` (DeepSeek-V2).
    Softmax {
        /// Multiplier.
        factor: f32,
        /// Only experts of the best groups, by their best expert.
        groups: Groups,
    },
    /// Sigmoids, plus a bias of each expert for the choice alone; the chosen sigmoids are divided by their sum and
    /// multiplied by `factor` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    Sigmoid {
        /// Multiplier.
        factor: f32,
        /// Only experts of the best groups, by the sum of their two best.
        groups: Groups,
    },
    /// Logits have a bias; softmax over the chosen (GPT-OSS).
    SoftmaxOfChosen,
}

/// Experts come in equal groups, of which a token uses the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Groups; 1 for no limit.
    pub n: usize,
    /// Of these, used.
    pub n_used: usize,
}

/// A pointwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
    /// `x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 · x³)))` (Hendrycks and Gimpel, arXiv 1606.08415).
    GeluTanh,
    /// `x/2 · (1 + erf(x / sqrt 2))`.
    Gelu,
    /// Of gated MLPs only: `g / (1 + e^(−1.702 g)) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, ±limit)`
    /// (GPT-OSS).
    ClampedSwiglu {
        /// Bound.
        limit: f32,
    },
}
