//! What each tensor is to the decoder, what it is called, and how ranks cut it.

use super::layout::Place;
use super::partition::Cut;
use super::spec::{Attention, Bias, Block, DecoderSpec, Head, HeadNorm, Mlp, Norm, Positions, Router, Sinks};

/// A tensor's place in the decoder. A linear weight is `[out, in]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// `[vocab, hidden]`.
    Embedding,
    /// `[hidden]`, of the norm of the embedded tokens.
    EmbeddingNorm,
    /// `[hidden]`.
    EmbeddingNormBias,
    /// `[max_positions, hidden]`, added to the embedding.
    Positions,
    /// `[hidden]`.
    FinalNorm,
    /// `[hidden]`.
    FinalNormBias,
    /// `[vocab, hidden]`; the embedding, where the spec ties them.
    Head,
    /// A layer's tensor.
    Layer(usize, LayerRole),
}

/// A tensor's place in its layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerRole {
    /// `[hidden]`, before attention; before the MLP too, where a parallel block has one norm.
    AttentionNorm,
    /// `[hidden]`.
    AttentionNormBias,
    /// `[heads · head_dim, hidden]`. Of latent attention `[heads · (nope_dim + rope_dim), hidden]`, or
    /// `[…, query_rank]` where there is a [`LayerRole::QueryDown`].
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
    /// `[head_dim]`, or `[heads, head_dim]` where each head has its own.
    QueryNorm,
    /// `[head_dim]`, or `[kv_heads, head_dim]`.
    KeyNorm,
    /// `[heads]` logits that take part in the softmax.
    Sinks,
    /// `[query_rank, hidden]`, to the latent of the queries.
    QueryDown,
    /// `[query_rank]`.
    QueryDownNorm,
    /// `[kv_rank + rope_dim, hidden]`, to the cached latent and the key that turns.
    KvDown,
    /// `[kv_rank]`.
    KvDownNorm,
    /// `[heads · nope_dim, kv_rank]`, from the latent to the keys.
    KeyUp,
    /// `[heads · value_dim, kv_rank]`, from the latent to the values.
    ValueUp,
    /// `[hidden, heads · head_dim]`; of latent attention `[hidden, heads · value_dim]`.
    Output,
    /// `[hidden]`; added once, by rank 0.
    OutputBias,
    /// `[hidden]`, of what attention returns.
    AttentionPostNorm,
    /// `[hidden]`, before the MLP.
    MlpNorm,
    /// `[hidden]`.
    MlpNormBias,
    /// Of the layer's only MLP.
    Mlp(MlpRole),
    /// `[n_experts, hidden]`.
    Router,
    /// `[n_experts]`.
    RouterBias,
    /// `[n_experts]`, added for the choice alone.
    ChoiceBias,
    /// Of an expert.
    Expert(usize, MlpRole),
    /// Of the MLP that every token passes.
    SharedExpert(MlpRole),
    /// `[hidden]`, of what the MLP returns.
    MlpPostNorm,
}

/// A tensor's place in an MLP of `width` neurons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MlpRole {
    /// `[width, hidden]`; plain MLPs have none.
    Gate,
    /// `[width]`.
    GateBias,
    /// `[width, hidden]`; the first projection of a plain MLP.
    Up,
    /// `[width]`.
    UpBias,
    /// `[hidden, width]`.
    Down,
    /// `[hidden]`; added once, by rank 0.
    DownBias,
}

impl MlpRole {
    fn shape(self, width: usize, hidden: usize) -> Vec<usize> {
        match self {
            MlpRole::Gate | MlpRole::Up => vec![width, hidden],
            MlpRole::GateBias | MlpRole::UpBias => vec![width],
            MlpRole::Down => vec![hidden, width],
            MlpRole::DownBias => vec![hidden],
        }
    }

    fn cut(self) -> Cut {
        match self {
            MlpRole::Gate | MlpRole::GateBias | MlpRole::Up | MlpRole::UpBias => Cut::NeuronRows,
            MlpRole::Down => Cut::NeuronColumns,
            MlpRole::DownBias => Cut::Whole,
        }
    }

    /// Of a gated MLP.
    fn gated(bias: Bias) -> &'static [MlpRole] {
        use MlpRole::*;
        match bias {
            Bias::Absent => &[Gate, Up, Down],
            Bias::Present => &[Gate, Up, Down, GateBias, UpBias, DownBias],
        }
    }

    /// Of a plain MLP.
    fn plain(bias: Bias) -> &'static [MlpRole] {
        use MlpRole::*;
        match bias {
            Bias::Absent => &[Up, Down],
            Bias::Present => &[Up, Down, UpBias, DownBias],
        }
    }
}

impl Role {
    /// The shape, outermost first.
    pub fn shape(self, spec: &DecoderSpec) -> Vec<usize> {
        let hidden = spec.hidden;
        match self {
            Role::Embedding | Role::Head => vec![spec.vocab, hidden],
            Role::Positions => vec![spec.max_positions, hidden],
            Role::EmbeddingNorm | Role::EmbeddingNormBias | Role::FinalNorm | Role::FinalNormBias => {
                vec![hidden]
            }
            Role::Layer(layer, role) => role.shape(spec, layer),
        }
    }

    /// How ranks cut it.
    pub fn cut(self, spec: &DecoderSpec) -> Cut {
        match self {
            Role::Embedding | Role::Head => Cut::VocabRows,
            Role::Layer(_, role) => role.cut(spec),
            _ => Cut::Whole,
        }
    }

    /// Whether it is a norm's weight.
    pub fn is_norm(self) -> bool {
        use LayerRole::*;
        matches!(
            self,
            Role::EmbeddingNorm
                | Role::FinalNorm
                | Role::Layer(
                    _,
                    AttentionNorm
                        | QueryNorm
                        | KeyNorm
                        | QueryDownNorm
                        | KvDownNorm
                        | AttentionPostNorm
                        | MlpNorm
                        | MlpPostNorm
                )
        )
    }

    /// Whether it holds a norm's weights for each head, a row for each.
    pub fn is_norm_per_head(self, spec: &DecoderSpec) -> bool {
        let per_head = matches!(
            spec.attention,
            Attention::Heads(heads) if matches!(heads.qk_norm, Some(HeadNorm::PerHead(_)))
        );
        per_head && matches!(self, Role::Layer(_, LayerRole::QueryNorm | LayerRole::KeyNorm))
    }

    /// Its number among the experts of the layer; 0 where it is of none.
    pub fn expert(self) -> usize {
        match self {
            Role::Layer(_, LayerRole::Expert(expert, _)) => expert,
            _ => 0,
        }
    }
}

impl LayerRole {
    fn shape(self, spec: &DecoderSpec, layer: usize) -> Vec<usize> {
        use LayerRole::*;
        let hidden = spec.hidden;
        let mlp = spec.layers.get(layer).map(|layer| layer.mlp);
        let experts = match mlp {
            Some(self::Mlp::Experts(experts)) => Some(experts),
            _ => None,
        };
        match self {
            AttentionNorm | AttentionNormBias | AttentionPostNorm | MlpNorm | MlpNormBias | MlpPostNorm
            | OutputBias => vec![hidden],
            Mlp(role) => role.shape(mlp.map_or(0, |mlp| mlp.width()), hidden),
            Expert(_, role) => role.shape(experts.map_or(0, |experts| experts.width), hidden),
            SharedExpert(role) => role.shape(experts.map_or(0, |experts| experts.shared_width), hidden),
            Router => vec![experts.map_or(0, |experts| experts.n_experts), hidden],
            RouterBias | ChoiceBias => vec![experts.map_or(0, |experts| experts.n_experts)],
            _ => self.shape_in_attention(&spec.attention, hidden),
        }
    }

    fn shape_in_attention(self, attention: &Attention, hidden: usize) -> Vec<usize> {
        use LayerRole::*;
        match *attention {
            Attention::Heads(heads) => {
                let (n, m, d) = (heads.heads, heads.kv_heads, heads.head_dim);
                let per_head = matches!(heads.qk_norm, Some(HeadNorm::PerHead(_)));
                match self {
                    Query => vec![n * d, hidden],
                    QueryBias => vec![n * d],
                    Key | Value => vec![m * d, hidden],
                    KeyBias | ValueBias => vec![m * d],
                    QueryNorm if per_head => vec![n, d],
                    KeyNorm if per_head => vec![m, d],
                    QueryNorm | KeyNorm => vec![d],
                    Sinks => vec![n],
                    Output => vec![hidden, n * d],
                    _ => vec![0],
                }
            }
            Attention::Latent(latent) => {
                let n = latent.heads;
                match self {
                    Query => vec![n * latent.query_dim(), latent.query_rank.unwrap_or(hidden)],
                    QueryDown => vec![latent.query_rank.unwrap_or(0), hidden],
                    QueryDownNorm => vec![latent.query_rank.unwrap_or(0)],
                    KvDown => vec![latent.row_width(), hidden],
                    KvDownNorm => vec![latent.kv_rank],
                    KeyUp => vec![n * latent.nope_dim, latent.kv_rank],
                    ValueUp => vec![n * latent.value_dim, latent.kv_rank],
                    Output => vec![hidden, n * latent.value_dim],
                    _ => vec![0],
                }
            }
        }
    }

    fn cut(self, spec: &DecoderSpec) -> Cut {
        use LayerRole::*;
        let per_head = Role::Layer(0, self).is_norm_per_head(spec);
        match self {
            Query | QueryBias | KeyUp | ValueUp | Sinks => Cut::HeadRows,
            Key | KeyBias | Value | ValueBias => Cut::KvHeadRows,
            QueryNorm if per_head => Cut::HeadRows,
            KeyNorm if per_head => Cut::KvHeadRows,
            Output => Cut::HeadColumns,
            Mlp(role) | Expert(_, role) | SharedExpert(role) => role.cut(),
            _ => Cut::Whole,
        }
    }
}

/// The tensors that a decoder of this spec has, in the order of the forward pass. A tied head is none of them.
pub fn roles(spec: &DecoderSpec) -> Vec<Role> {
    let mut roles = vec![Role::Embedding];
    if spec.positions == Positions::Learned {
        roles.push(Role::Positions);
    }
    if let Some(norm) = spec.embedding.norm {
        push_norm(&mut roles, norm, Role::EmbeddingNorm, Role::EmbeddingNormBias);
    }
    for layer in 0..spec.layers() {
        roles.extend(layer_roles(spec, layer).into_iter().map(|role| Role::Layer(layer, role)));
    }
    push_norm(&mut roles, spec.norm, Role::FinalNorm, Role::FinalNormBias);
    match spec.head {
        Head::Tied => {}
        Head::Untied | Head::Normalised => roles.push(Role::Head),
    }
    roles
}

fn push_norm<R>(roles: &mut Vec<R>, norm: Norm, weight: R, bias: R) {
    roles.push(weight);
    roles.extend((norm.bias() == Bias::Present).then_some(bias));
}

/// The tensors of a layer.
fn layer_roles(spec: &DecoderSpec, layer: usize) -> Vec<LayerRole> {
    use LayerRole::*;
    let mut roles = Vec::new();
    push_norm(&mut roles, spec.norm, AttentionNorm, AttentionNormBias);
    roles.extend(attention_roles(&spec.attention));
    match spec.block {
        Block::Serial | Block::ParallelTwoNorms => push_norm(&mut roles, spec.norm, MlpNorm, MlpNormBias),
        Block::SerialPostNorms => {
            roles.push(AttentionPostNorm);
            push_norm(&mut roles, spec.norm, MlpNorm, MlpNormBias);
        }
        Block::ParallelOneNorm => {}
    }
    match spec.layers[layer].mlp {
        self::Mlp::Gated { bias, .. } => roles.extend(MlpRole::gated(bias).iter().copied().map(Mlp)),
        self::Mlp::Plain { bias, .. } => roles.extend(MlpRole::plain(bias).iter().copied().map(Mlp)),
        self::Mlp::Experts(experts) => {
            roles.push(Router);
            match experts.router {
                self::Router::SoftmaxOfChosen => roles.push(RouterBias),
                self::Router::Sigmoid { .. } => roles.push(ChoiceBias),
                self::Router::SoftmaxRenormalised | self::Router::Softmax { .. } => {}
            }
            let of_expert = MlpRole::gated(experts.bias);
            for expert in 0..experts.n_experts {
                roles.extend(of_expert.iter().map(|&role| Expert(expert, role)));
            }
            if experts.shared_width > 0 {
                roles.extend(MlpRole::gated(Bias::Absent).iter().copied().map(SharedExpert));
            }
        }
    }
    if spec.block == Block::SerialPostNorms {
        roles.push(MlpPostNorm);
    }
    roles
}

fn attention_roles(attention: &Attention) -> Vec<LayerRole> {
    use LayerRole::*;
    match attention {
        Attention::Heads(heads) => {
            let mut roles = vec![Query, Key, Value];
            if heads.qkv_bias == Bias::Present {
                roles.extend([QueryBias, KeyBias, ValueBias]);
            }
            if heads.qk_norm.is_some() {
                roles.extend([QueryNorm, KeyNorm]);
            }
            roles.extend((heads.sinks == self::Sinks::Present).then_some(Sinks));
            roles.push(Output);
            roles.extend((heads.out_bias == Bias::Present).then_some(OutputBias));
            roles
        }
        Attention::Latent(latent) => {
            let query_latent: &[LayerRole] = match latent.query_rank {
                Some(_) => &[QueryDown, QueryDownNorm],
                None => &[],
            };
            [query_latent, &[Query, KvDown, KvDownNorm, KeyUp, ValueUp, Output]].concat()
        }
    }
}

/// Where a family's checkpoints keep the tensors.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// What may stand before every name, the usual one first; often nothing.
    pub prefixes: &'static [&'static str],
    /// Where a role is. Roles that the family's specs never have are [`Place::nowhere`].
    pub place: fn(&DecoderSpec, Role) -> Place,
    /// Whether a tensor of this name may be there and means nothing: buffers that old versions saved, for example.
    pub ignores: fn(&DecoderSpec, &str) -> bool,
}

impl Names {
    /// The names under which a role's tensor may be stored, the usual one first. `head` is for tensors of which each
    /// holds one head's row.
    pub fn of(&self, spec: &DecoderSpec, role: Role, head: usize) -> Vec<String> {
        let place = (self.place)(spec, role);
        let layer = match role {
            Role::Layer(layer, _) => layer,
            _ => 0,
        };
        let named = |pattern: &&str| {
            pattern
                .replace("{layer}", &layer.to_string())
                .replace("{expert}", &role.expert().to_string())
                .replace("{head}", &head.to_string())
        };
        let names: Vec<String> = place.names.iter().map(named).collect();
        self.prefixes
            .iter()
            .flat_map(|prefix| names.iter().map(move |name| format!("{prefix}{name}")))
            .collect()
    }
}
