//! Tags: of which token prefix a slot's KV is.

use std::hash::{BuildHasher, RandomState};

/// A position's token prefix, hashed: its own token and salt, and everything before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag(u64);

impl Tag {
    /// The tag of no prefix: a slot without valid contents.
    pub const NONE: Tag = Tag(0);
}

/// Makes tags, by a hash keyed anew in every process: a caller cannot construct a collision.
#[derive(Clone, Default)]
pub struct Chain {
    hash: RandomState,
}

impl Chain {
    /// The tag of a position, from the tag of the one before ([`Tag::NONE`] for the first), its token, and a salt
    /// for whatever else its KV depends on.
    pub fn next(&self, before: Tag, token: u32, salt: u64) -> Tag {
        // 0 is taken, and nobody can aim at 1.
        Tag(self.hash.hash_one((before.0, token, salt)).max(1))
    }
}
