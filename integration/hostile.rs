//! What a caller may send and a shard must survive (protocol: inputs that a shard must itself guard against), each
//! through a real socket. After each of them a generation that runs beside it has its tokens, a request whose answer
//! is known gets that answer, and nothing has leaked.

mod calls;
mod company;
mod lengths;
mod races;
mod requests;
mod sizes;
mod slots;
mod sockets;

use kvshard::engine::EngineStats;
use kvshard::pb::v3;
use kvshard::text::Tokenizer;

use crate::support::fixture;
use crate::support::shard::{Collected, TestShard, decode, on_slots, prefill, request, run_to_end};

/// The prompt of the known request.
const PROMPT: &str = "the quick brown fox jumps over the lazy dog and then some more words follow";
/// Its output.
const N_NEW: u32 = 4;
/// The batch that runs all the while, and its only request.
const RUNNING: u64 = 500;
/// The running batch is on these slots of a router.
const RUNNING_SLOTS: std::ops::Range<u32> = 1..260;
/// A number that no batch has.
const NOBODY: u64 = 404;

/// The known request.
fn known(id: u64) -> v3::Request {
    request(id, PROMPT, N_NEW)
}

/// A shard, a generation that runs on it, and a request whose answer is known.
struct Witness {
    shard: TestShard,
    known: Collected,
    /// What the running request is to get, and what it has.
    expected: Collected,
    running: Collected,
    baseline: EngineStats,
}

impl Witness {
    async fn start(flags: &[&str]) -> Witness {
        Self::before(TestShard::start("llama", flags).await).await
    }

    async fn before(mut shard: TestShard) -> Witness {
        let running = || on_slots(request(RUNNING, "hello there", 240), RUNNING_SLOTS);
        let known = run_to_end(&mut shard.client, 0, vec![known(0)]).await.remove(0);
        let expected = run_to_end(&mut shard.client, RUNNING, vec![running()]).await.remove(0);
        let answer = shard.client.prefill(prefill(RUNNING, vec![running()], None)).await.unwrap();
        let mut witness =
            Witness { known, expected, running: Collected::default(), baseline: shard.stats().await, shard };
        witness.running.add(RUNNING, &answer.into_inner().generations);
        witness
    }

    /// Checks that `what`, which just happened, harmed nobody.
    async fn check(&mut self, what: &str) {
        let answer = self.shard.client.decode(decode(&[RUNNING])).await;
        let answer = answer.unwrap_or_else(|status| panic!("{what} cost the running batch: {status}"));
        self.running.add(RUNNING, &answer.into_inner().generations);
        assert!(
            self.expected.ids.starts_with(&self.running.ids),
            "{what} changed the running batch's tokens"
        );
        let again = run_to_end(&mut self.shard.client, 600, vec![known(600)]).await.remove(0);
        assert_eq!(again, self.known, "{what} changed a later answer");
        assert_eq!(self.shard.stats().await, self.baseline, "{what} left something behind");
    }

    /// Lets the running request end, and the shard.
    async fn finish(mut self) {
        while self.running.end.is_none() {
            let answer = self.shard.client.decode(decode(&[RUNNING])).await.unwrap();
            self.running.add(RUNNING, &answer.into_inner().generations);
        }
        assert_eq!(self.running, self.expected);
        assert_eq!(self.shard.stats().await.n_batches, 0);
        self.shard.finish().await;
    }
}

/// The number of tokens in the known request's prompt.
fn prompt_len() -> u32 {
    let tokenizer = Tokenizer::load(&fixture("llama")).unwrap();
    tokenizer.encode(PROMPT, true, usize::MAX).unwrap().len() as u32
}
