//! Where a client that is alone with a shard places its requests: KV blocks, handed out as TGI's router does without a
//! prefix cache, and a prefix that they share.

use anyhow::{Result, bail};

use super::load::Random;
use super::prefix::Prefix;
use super::shard::{CallError, Shard};
use crate::config::BenchConfig;
use crate::pb::v3;

/// Where requests are placed.
pub(super) struct Placing {
    pub(super) blocks: Blocks,
    /// What longer prompts begin with.
    pub(super) prefix: Option<Prefix>,
}

impl Placing {
    /// Warms up, learns the size of the pool, and computes what all prompts share. `None` where the shard has no blocks.
    ///
    /// # Errors
    /// The shard's, and a sentence where it has no use for a shared prefix.
    pub(super) async fn begin(
        shard: &mut Shard,
        info: &v3::InfoResponse,
        config: &BenchConfig,
        random: &mut Random,
    ) -> Result<Option<Placing>> {
        let n_slots = warm_up(shard, config.limits.max_prefill_tokens).await?;
        let block_tokens = info.block_size.max(1);
        let n_slots = n_slots.filter(|_| !info.requires_padding);
        let mut placing = n_slots.map(|n| Placing { blocks: Blocks::new(n, block_tokens), prefix: None });
        if config.shared_prefix > 0 {
            let Some(placing) = placing.as_mut().filter(|_| info.use_prefix_caching && block_tokens == 1)
            else {
                bail!("--shared-prefix: the shard has no prefix caching with blocks of one token");
            };
            let (parameters, n_tokens) = (&config.parameters, config.shared_prefix);
            let prefix = Prefix::compute(shard, parameters, n_tokens, &mut placing.blocks, random).await?;
            placing.prefix = Some(prefix);
        }
        Ok(placing)
    }
}

/// A router's first call; the slots of the pool.
async fn warm_up(shard: &mut Shard, max_prefill_tokens: u32) -> Result<Option<u32>, CallError> {
    let text = "_test ".repeat(max_prefill_tokens as usize);
    let chunk = v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Text(text.clone())) };
    // Every kind of sampling is touched once, as routers do it.
    let parameters = v3::NextTokenChooserParameters {
        temperature: 0.9,
        top_k: 10,
        top_p: 0.9,
        typical_p: 0.9,
        repetition_penalty: 1.2,
        frequency_penalty: 0.1,
        watermark: true,
        ..Default::default()
    };
    let request = v3::Request {
        inputs: text,
        input_chunks: Some(v3::Input { chunks: vec![chunk] }),
        truncate: max_prefill_tokens,
        add_special_tokens: true,
        prefill_logprobs: true,
        top_n_tokens: 20,
        parameters: Some(parameters),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens: 1,
            stop_sequences: Vec::new(),
            ignore_eos_token: true,
        }),
        ..Default::default()
    };
    let batch = v3::Batch { requests: vec![request], size: 1, ..Default::default() };
    let warmup = v3::WarmupRequest { batch: Some(batch), max_prefill_tokens, ..Default::default() };
    Ok(shard.warmup(warmup).await?.max_supported_total_tokens)
}

/// The blocks of a shard's pool that no request holds; the last one returned goes first.
#[derive(Debug)]
pub(super) struct Blocks {
    free: Vec<u32>,
    /// Slots of a block.
    tokens: u32,
}

impl Blocks {
    /// Of a pool of `n_slots`; block 0 is nobody's.
    pub(super) fn new(n_slots: u32, tokens: u32) -> Blocks {
        Blocks { free: (1..n_slots / tokens).collect(), tokens }
    }

    /// Slots of all free blocks.
    pub(super) fn n_free_slots(&self) -> u64 {
        self.free.len() as u64 * u64::from(self.tokens)
    }

    /// Blocks for so many positions; `None` where fewer are free.
    pub(super) fn take(&mut self, n_positions: u64) -> Option<Vec<u32>> {
        let n = usize::try_from(n_positions.div_ceil(u64::from(self.tokens))).ok()?;
        Some(self.free.split_off(self.free.len().checked_sub(n)?))
    }

    /// Blocks are free again.
    pub(super) fn give_back(&mut self, blocks: Vec<u32>) {
        self.free.extend(blocks);
    }

    /// `[n_positions]` the slot of each.
    pub(super) fn slots(&self, blocks: &[u32], n_positions: u64) -> Vec<u32> {
        let slots = blocks.iter().flat_map(|block| block * self.tokens..(block + 1) * self.tokens);
        slots.take(usize::try_from(n_positions).unwrap_or(usize::MAX)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_but_the_first_is_handed_out_once() {
        let mut blocks = Blocks::new(43, 4);
        assert_eq!(blocks.n_free_slots(), 36);
        let first = blocks.take(9).expect("three blocks");
        assert_eq!(first, [7, 8, 9]);
        assert_eq!(blocks.slots(&first, 9), [28, 29, 30, 31, 32, 33, 34, 35, 36]);
        assert_eq!(blocks.take(25), None);
        assert_eq!(blocks.take(24), Some(vec![1, 2, 3, 4, 5, 6]));
        assert_eq!(blocks.n_free_slots(), 0);
        blocks.give_back(first);
        assert_eq!(blocks.take(4), Some(vec![9]));
    }
}
