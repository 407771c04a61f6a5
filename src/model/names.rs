//! What each tensor is to the decoder, what it is called, and how ranks cut it.

use super::partition::Cut;
use super::spec::{Bias, DecoderSpec, Head, Mlp};

/// A tensor's place in the decoder. Shapes as stored: a linear weight is `[out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[hidden]`.
    FinalNorm,
    /// `[vocab, hidden]`; the embedding, where the spec ties them.
    Head,
    /// A layer's tensor.
    Layer(usize, LayerRole),
}

/// A tensor's place in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerRole {
    /// `[hidden]`, before attention.
    AttentionNorm,
    /// `[heads · head_dim, hidden]`.
    Query,
    /// `[heads · head_dim]`.
    QueryBias,
    /// `[kv_heads · head_dim, hidden]`.
    Key,
    /// `[kv_heads · head_dim]`.
    KeyBias,
    /// `[kv_heads · head_dim, hidden]`.
    Value,
    /// `[kv_heads · head_dim]`.
    ValueBias,
    /// `[hidden, heads · head_dim]`.
    Output,
    /// `[hidden]`; added once, by rank 0.
    OutputBias,
    /// `[hidden]`, before the MLP.
    MlpNorm,
    /// `[width, hidden]`.
    Gate,
    /// `[width]`.
    GateBias,
    /// `[width, hidden]`.
    Up,
    /// `[width]`.
    UpBias,
    /// `[hidden, width]`.
    Down,
    /// `[hidden]`; added once, by rank 0.
    DownBias,
}

impl Role {
    /// The stored shape, outermost first.
    pub fn shape(self, spec: &DecoderSpec) -> Vec<usize> {
        let hidden = spec.hidden;
        let heads = spec.attention.heads * spec.attention.head_dim;
        let kv_heads = spec.attention.kv_heads * spec.attention.head_dim;
        let Mlp::Gated { width, .. } = spec.mlp;
        match self {
            Role::Embedding | Role::Head => vec![spec.vocab, hidden],
            Role::FinalNorm => vec![hidden],
            Role::Layer(_, role) => match role {
                LayerRole::AttentionNorm | LayerRole::MlpNorm => vec![hidden],
                LayerRole::OutputBias | LayerRole::DownBias => vec![hidden],
                LayerRole::Query => vec![heads, hidden],
                LayerRole::QueryBias => vec![heads],
                LayerRole::Key | LayerRole::Value => vec![kv_heads, hidden],
                LayerRole::KeyBias | LayerRole::ValueBias => vec![kv_heads],
                LayerRole::Output => vec![hidden, heads],
                LayerRole::Gate | LayerRole::Up => vec![width, hidden],
                LayerRole::GateBias | LayerRole::UpBias => vec![width],
                LayerRole::Down => vec![hidden, width],
            },
        }
    }

    /// How ranks cut it.
    pub fn cut(self) -> Cut {
        match self {
            Role::Embedding | Role::Head => Cut::VocabRows,
            Role::FinalNorm => Cut::Whole,
            Role::Layer(_, role) => match role {
                LayerRole::Query | LayerRole::QueryBias => Cut::HeadRows,
                LayerRole::Key | LayerRole::KeyBias | LayerRole::Value | LayerRole::ValueBias => {
                    Cut::KvHeadRows
                }
                LayerRole::Output => Cut::HeadColumns,
                LayerRole::Gate | LayerRole::GateBias | LayerRole::Up | LayerRole::UpBias => Cut::NeuronRows,
                LayerRole::Down => Cut::NeuronColumns,
                LayerRole::AttentionNorm | LayerRole::MlpNorm => Cut::Whole,
                LayerRole::OutputBias | LayerRole::DownBias => Cut::Whole,
            },
        }
    }

    /// Whether it is a norm's weight, neutral at 1.
    pub fn is_norm(self) -> bool {
        matches!(self, Role::FinalNorm | Role::Layer(_, LayerRole::AttentionNorm | LayerRole::MlpNorm))
    }
}

/// The tensors that a decoder of this spec has, in the order of the forward pass. A tied head is none of them.
pub fn roles(spec: &DecoderSpec) -> Vec<Role> {
    let in_layer = layer_roles(spec);
    let mut roles = vec![Role::Embedding];
    for layer in 0..spec.layers() {
        roles.extend(in_layer.iter().map(|&role| Role::Layer(layer, role)));
    }
    roles.push(Role::FinalNorm);
    if spec.head == Head::Untied {
        roles.push(Role::Head);
    }
    roles
}

/// The tensors of each layer.
fn layer_roles(spec: &DecoderSpec) -> Vec<LayerRole> {
    let mut roles = vec![LayerRole::AttentionNorm, LayerRole::Query, LayerRole::Key, LayerRole::Value];
    if spec.attention.qkv_bias == Bias::Present {
        roles.extend([LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias]);
    }
    roles.push(LayerRole::Output);
    if spec.attention.out_bias == Bias::Present {
        roles.push(LayerRole::OutputBias);
    }
    let Mlp::Gated { bias, .. } = spec.mlp;
    roles.extend([LayerRole::MlpNorm, LayerRole::Gate, LayerRole::Up, LayerRole::Down]);
    if bias == Bias::Present {
        roles.extend([LayerRole::GateBias, LayerRole::UpBias, LayerRole::DownBias]);
    }
    roles
}

/// What a family's checkpoints call the tensors.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// Of [`Role::Embedding`].
    pub embedding: &'static str,
    /// Of [`Role::FinalNorm`].
    pub final_norm: &'static str,
    /// Of [`Role::Head`].
    pub head: &'static str,
    /// What stands before a layer's number, with the dot.
    pub layers: &'static str,
    /// What stands after it and its dot; aliases follow the name that is usual.
    pub in_layer: fn(LayerRole) -> &'static [&'static str],
    /// Ends of the names of tensors that may be there and mean nothing: buffers that old versions saved.
    pub ignored: &'static [&'static str],
}

impl Names {
    /// The names under which a role's tensor may be stored, the usual one first.
    pub fn of(&self, role: Role) -> Vec<String> {
        match role {
            Role::Embedding => vec![self.embedding.to_owned()],
            Role::FinalNorm => vec![self.final_norm.to_owned()],
            Role::Head => vec![self.head.to_owned()],
            Role::Layer(layer, role) => {
                (self.in_layer)(role).iter().map(|name| format!("{}{layer}.{name}", self.layers)).collect()
            }
        }
    }

    /// The usual name of a role's tensor.
    pub fn first(&self, role: Role) -> String {
        self.of(role).swap_remove(0)
    }

    /// Whether a tensor of this name means nothing.
    pub fn ignores(&self, name: &str) -> bool {
        self.ignored.iter().any(|end| name.ends_with(end))
    }
}
