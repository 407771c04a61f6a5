//! Which part of a tensor a rank holds.

/// One rank of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
}

impl Shard {
    /// The only rank of a world of one.
    pub const WHOLE: Shard = Shard { rank: 0, world: 1 };
}
