//! Which part of a tensor a rank holds.

use std::ops::Range;

use super::spec::{DecoderSpec, Mlp};
use crate::error::{Error, Result};

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

/// How ranks cut a tensor `[out, in]` (Shoeybi et al., *Megatron-LM*, arXiv 1909.08053): outputs by rows, so that each
/// rank computes whole heads and neurons without talking; inputs by columns, so that partial sums are added once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Not at all: every rank holds it.
    Whole,
    /// Rows, by vocabulary entry; the last ranks may hold fewer.
    VocabRows,
    /// Rows, by query head.
    HeadRows,
    /// Rows, by KV head; copied where ranks outnumber KV heads.
    KvHeadRows,
    /// Columns, by query head.
    HeadColumns,
    /// Rows, by neuron.
    NeuronRows,
    /// Columns, by neuron.
    NeuronColumns,
}

/// What of a decoder a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// Query heads.
    pub heads: Range<usize>,
    /// KV heads: those of its query heads. Latent attention has one, which every rank holds.
    pub kv_heads: Range<usize>,
    /// Vocabulary entries: as many for each rank, but fewer or none for the last.
    pub vocab: Range<usize>,
    shard: Shard,
}

impl Partition {
    /// The part of one rank.
    ///
    /// # Errors
    /// [`Error::Invalid`] when heads or neurons do not divide among the ranks.
    pub fn new(spec: &DecoderSpec, shard: Shard) -> Result<Partition> {
        let Shard { rank, world } = shard;
        if rank >= world {
            return Err(Error::Bug(format!("rank {rank} is outside a world of {world}")));
        }
        let heads = equal_part("query heads", spec.attention.heads(), shard)?;
        let kv_heads = kv_part(spec.attention.kv_heads(), shard)?;
        let share = spec.vocab.div_ceil(world);
        let vocab = (rank * share).min(spec.vocab)..((rank + 1) * share).min(spec.vocab);
        let part = Partition { heads, kv_heads, vocab, shard };
        for layer in &spec.layers {
            part.neurons(layer.mlp.width())?;
            if let Mlp::Experts(experts) = layer.mlp {
                part.neurons(experts.shared_width)?;
            }
        }
        Ok(part)
    }

    /// The rank's neurons of an MLP of `width`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they do not divide among the ranks.
    pub fn neurons(&self, width: usize) -> Result<Range<usize>> {
        equal_part("neurons of the MLP", width, self.shard)
    }
}

/// A rank's share of what divides evenly.
fn equal_part(what: &str, n: usize, Shard { rank, world }: Shard) -> Result<Range<usize>> {
    if !n.is_multiple_of(world) {
        return Err(Error::Invalid(format!("{n} {what} do not divide among {world} ranks")));
    }
    let share = n / world;
    Ok(rank * share..(rank + 1) * share)
}

/// A rank's KV heads. With more ranks than KV heads each head is copied to `world / n` ranks in a row, which are those
/// that hold its query heads.
fn kv_part(n: usize, shard: Shard) -> Result<Range<usize>> {
    if n >= shard.world {
        return equal_part("KV heads", n, shard);
    }
    if !shard.world.is_multiple_of(n) {
        return Err(Error::Invalid(format!(
            "{n} KV heads can be neither cut nor copied for {} ranks",
            shard.world
        )));
    }
    let head = shard.rank * n / shard.world;
    Ok(head..head + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::Attention;
    use crate::model::spec::tests::{latent, tiny};

    fn parts(spec: &DecoderSpec, world: usize) -> Result<Vec<Partition>> {
        (0..world).map(|rank| Partition::new(spec, Shard { rank, world })).collect()
    }

    fn spec(heads: usize, kv_heads: usize, width: usize, vocab: usize) -> DecoderSpec {
        let mut spec = tiny();
        let Attention::Heads(attention) = &mut spec.attention else { panic!("{spec:?}") };
        (attention.heads, attention.kv_heads) = (heads, kv_heads);
        for layer in &mut spec.layers {
            let Mlp::Gated { width: neurons, .. } = &mut layer.mlp else { panic!("{layer:?}") };
            *neurons = width;
        }
        spec.vocab = vocab;
        spec
    }

    #[test]
    fn one_rank_holds_everything() {
        let whole = Partition::new(&spec(6, 3, 10, 17), Shard::WHOLE).unwrap();
        assert_eq!((&whole.heads, &whole.kv_heads, &whole.vocab), (&(0..6), &(0..3), &(0..17)));
        assert_eq!(whole.neurons(10).unwrap(), 0..10);
    }

    #[test]
    fn parts_cover_everything_once() {
        for world in [1, 2, 4] {
            let parts = parts(&spec(8, 4, 12, 17), world).unwrap();
            let joined = |range: fn(&Partition) -> Range<usize>| -> Vec<usize> {
                parts.iter().flat_map(range).collect()
            };
            assert_eq!(joined(|part| part.heads.clone()), (0..8).collect::<Vec<_>>());
            assert_eq!(joined(|part| part.kv_heads.clone()), (0..4).collect::<Vec<_>>());
            assert_eq!(joined(|part| part.neurons(12).unwrap()), (0..12).collect::<Vec<_>>());
            assert_eq!(joined(|part| part.vocab.clone()), (0..17).collect::<Vec<_>>());
        }
    }

    #[test]
    fn every_query_head_finds_its_kv_head_on_its_rank() {
        for (heads, kv_heads, world) in [(8, 2, 4), (8, 2, 8), (8, 1, 8), (8, 8, 8), (56, 8, 8), (12, 4, 2)] {
            let group = heads / kv_heads;
            for part in parts(&spec(heads, kv_heads, 8 * world, 3), world).unwrap() {
                let needed: Vec<usize> = part.heads.clone().map(|head| head / group).collect();
                assert!(needed.iter().all(|head| part.kv_heads.contains(head)), "{part:?}");
                assert!(part.kv_heads.clone().all(|head| needed.contains(&head)), "{part:?}");
            }
        }
    }

    #[test]
    fn a_latent_is_on_every_rank() {
        let parts = parts(&latent(), 4).unwrap();
        assert!(parts.iter().all(|part| part.kv_heads == (0..1) && part.heads.len() == 1), "{parts:?}");
    }

    #[test]
    fn the_last_ranks_may_have_no_vocabulary() {
        let vocab: Vec<_> = parts(&spec(8, 8, 8, 5), 4).unwrap().into_iter().map(|part| part.vocab).collect();
        assert_eq!(vocab, [0..2, 2..4, 4..5, 5..5]);
    }

    #[test]
    fn what_does_not_divide_is_refused_with_its_numbers() {
        let refusal = |spec: DecoderSpec, world| parts(&spec, world).unwrap_err().to_string();
        assert_eq!(refusal(spec(14, 2, 8, 8), 4), "14 query heads do not divide among 4 ranks");
        assert_eq!(refusal(spec(12, 3, 8, 8), 2), "3 KV heads do not divide among 2 ranks");
        assert_eq!(refusal(spec(12, 2, 9, 8), 3), "2 KV heads can be neither cut nor copied for 3 ranks");
        assert_eq!(refusal(spec(8, 8, 9, 8), 2), "9 neurons of the MLP do not divide among 2 ranks");
    }
}
