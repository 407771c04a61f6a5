//! What each tensor is to the decoder, and how ranks cut it.

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
