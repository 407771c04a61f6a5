//! What an unmodified router sent, replayed: `fixtures/router-transcript.txt`, recorded in two modes of the shard's
//! Info answer. Its shard was a stand-in, so tokens differ here; what is checked is all that the router relies on.
//!
//! The fixture's tokenizer counts otherwise than the recorded one: `truncate` is lowered to the router's count where
//! ours is larger, and end-of-text tokens are ignored, so that requests last as long as they did.

use std::collections::{BTreeMap, BTreeSet};

use kvshard::pb::v3;
use kvshard::text::Tokenizer;
use tonic::Code;

use crate::support::fixture;
use crate::support::log::Log;
use crate::support::shard::{Collected, TestShard, decode};
use crate::support::textproto::Node;

const TRANSCRIPT: &str = include_str!("fixtures/router-transcript.txt");

/// A request of the router's that it has not seen end.
struct Live {
    prompt: Vec<u32>,
    slots: Vec<u32>,
    collected: Collected,
}

impl Live {
    /// Slots that hold, or will hold, its KV: the last token is never fed back.
    fn held(&self, n_new: u32) -> &[u32] {
        &self.slots[..self.prompt.len() + n_new as usize - 1]
    }
}

/// The router's side.
struct Router {
    shard: TestShard,
    tokenizer: Tokenizer,
    log: Log,
    max_prefill_tokens: u32,
    /// Requests by number, of each batch.
    batches: BTreeMap<u64, BTreeMap<u64, Live>>,
    n_new: BTreeMap<u64, u32>,
    /// The tokens of which each slot holds the last one's KV.
    contents: BTreeMap<u32, Vec<u32>>,
    /// Claims of a cached prefix that are not quite true here, as the shard is to report them.
    false_claims: Vec<String>,
    n_true_claims: usize,
    /// What greedy requests got.
    greedy: BTreeMap<u64, Vec<u32>>,
}

#[tokio::test]
async fn what_the_router_sent_is_served_in_both_modes() {
    let paged = replay("paged", &["--prefill-chunking", "false"]).await;
    assert_eq!((paged.n_true_claims, paged.false_claims.len()), (0, 0), "nothing is claimed");
    let cached = replay("flashinfer", &[]).await;
    assert!(cached.n_true_claims >= 5, "{} claims were true", cached.n_true_claims);
    assert!(paged.greedy.len() >= 10);
    assert_eq!(paged.greedy, cached.greedy, "neither cached prefixes nor chunks nor merges change a token");
    paged.shard.finish().await;
    cached.shard.finish().await;
}

/// Replays a mode's sections on a pool that holds the recorded slots.
async fn replay(mode: &str, flags: &[&str]) -> Router {
    let flags = [&["--pool-tokens", "17024", "--own-slots", "1024"], flags].concat();
    let mut router = Router {
        shard: TestShard::start("llama", &flags).await,
        tokenizer: Tokenizer::load(&fixture("llama")).unwrap(),
        log: Log::start(),
        max_prefill_tokens: 0,
        batches: BTreeMap::new(),
        n_new: BTreeMap::new(),
        contents: BTreeMap::new(),
        false_claims: Vec::new(),
        n_true_claims: 0,
        greedy: BTreeMap::new(),
    };
    let sections = TRANSCRIPT.split("\n===== ").skip(1);
    let mut n_sections = 0;
    for section in sections.filter(|section| section.starts_with(&format!("[{mode}] "))) {
        let (title, lines) = section.split_once('\n').unwrap();
        for line in lines.lines() {
            if let Some((_, sent)) = line.split_once("] << ") {
                router.send(sent, mode).await;
            }
        }
        router.end_section(title).await;
        n_sections += 1;
    }
    assert_eq!(n_sections, 15);
    let told = router.log.lines_with("said to be cached");
    assert_eq!(told.len(), router.false_claims.len(), "{told:?}");
    for (told, expected) in told.iter().zip(&router.false_claims) {
        assert!(told.contains(expected.as_str()), "{told}, not {expected}");
    }
    router
}

impl Router {
    /// Sends one line of the transcript.
    async fn send(&mut self, line: &str, mode: &str) {
        let (call, message) = line.split_once(' ').unwrap_or((line, ""));
        // A remark says of how many numbers only some are shown.
        let (n_slots, message) = match message.trim_start().strip_prefix("# ") {
            Some(remark) => {
                let (remark, message) = remark.rsplit_once(" shown ").unwrap();
                let n_slots = remark.rsplit_once("slots: ").unwrap().1.split_once(' ').unwrap().0;
                (Some(n_slots.parse().unwrap()), message)
            }
            None => (None, message),
        };
        let message = Node::parse(message);
        let client = &mut self.shard.client;
        match call {
            "ServiceDiscoveryRequest" => {
                let found =
                    client.service_discovery(v3::ServiceDiscoveryRequest {}).await.unwrap().into_inner();
                assert_eq!(found.urls, [self.shard.shard.url()]);
            }
            "InfoRequest" => {
                let info = client.info(v3::InfoRequest {}).await.unwrap().into_inner();
                let caches = mode == "flashinfer";
                assert_eq!(
                    (info.support_chunking, info.use_prefix_caching, info.block_size),
                    (caches, caches, 1)
                );
            }
            "HealthRequest" => drop(client.health(v3::HealthRequest {}).await.unwrap()),
            "WarmupRequest" => {
                let call = message.warmup();
                self.max_prefill_tokens = call.max_prefill_tokens;
                let capacity = client.warmup(call).await.unwrap().into_inner();
                assert_eq!(capacity.max_supported_total_tokens, Some(16000));
                assert_eq!((capacity.max_input_tokens, capacity.max_total_tokens), (256, 512));
            }
            "ClearCacheRequest" => self.clear(message.optional("id")).await,
            "PrefillRequest" => self.prefill(message.prefill(n_slots)).await,
            "DecodeRequest" => {
                let ids: Vec<u64> = message.batches().iter().map(|batch| batch.id).collect();
                self.decode(&ids).await;
            }
            "FilterBatchRequest" => {
                self.filter(message.number("batch_id"), message.numbers("request_ids")).await;
            }
            other => panic!("{other} is not expected"),
        }
    }

    async fn prefill(&mut self, mut call: v3::PrefillRequest) {
        let batch = call.batch.as_mut().unwrap();
        let (new, merge) = (batch.id, call.cached_batch.as_ref().map(|batch| batch.id));
        let has_grammar = |request: &v3::Request| !request.parameters.as_ref().unwrap().grammar.is_empty();
        let is_refused = batch.requests.iter().any(has_grammar);
        let mut arrivals = BTreeMap::new();
        for request in &mut batch.requests {
            arrivals.insert(request.id, self.adapt(request));
        }
        let requests = batch.requests.clone();
        let answer = self.shard.client.prefill(call).await;
        if is_refused {
            assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
            return self.clear(Some(new)).await;
        }
        for request in &requests {
            self.judge_claim(request, &arrivals[&request.id].prompt);
        }
        for live in arrivals.values() {
            for (position, &slot) in live.slots.iter().take(live.prompt.len()).enumerate() {
                self.contents.insert(slot, live.prompt[..=position].to_vec());
            }
        }
        let id = merge.unwrap_or(new);
        self.batches.entry(id).or_default().append(&mut arrivals);
        let answer = answer.unwrap().into_inner();
        assert_eq!(answer.concat_ns.is_some(), merge.is_some());
        self.take(id, answer.generations, answer.batch);
    }

    /// Makes a request last as long here as it did there.
    fn adapt(&mut self, request: &mut v3::Request) -> Live {
        let stopping = request.stopping_parameters.as_mut().unwrap();
        stopping.ignore_eos_token = true;
        let counted = request.slots.len() as u32 - stopping.max_new_tokens + 1;
        request.truncate = request.truncate.min(counted);
        self.n_new.insert(request.id, stopping.max_new_tokens);
        let Some(v3::input_chunk::Chunk::Text(text)) =
            &request.input_chunks.as_ref().unwrap().chunks[0].chunk
        else {
            panic!("request {} has no text", request.id)
        };
        let truncate = request.truncate as usize;
        let prompt = self.tokenizer.encode(text, request.add_special_tokens, truncate).unwrap();
        Live { prompt, slots: request.slots.clone(), collected: Collected::default() }
    }

    /// How much of a claimed prefix is there, by what was computed here before.
    fn judge_claim(&mut self, request: &v3::Request, prompt: &[u32]) {
        let claimed = (request.cache_len as usize).min(prompt.len() - 1);
        let holds = |(position, slot): &(usize, &u32)| {
            self.contents.get(slot).is_some_and(|tokens| *tokens == prompt[..=*position])
        };
        let valid = request.slots.iter().take(claimed).enumerate().take_while(holds).count();
        if valid < claimed {
            let id = request.id;
            self.false_claims
                .push(format!("request {id}: of {claimed} tokens said to be cached {valid} are;"));
        } else if claimed > 0 {
            self.n_true_claims += 1;
        }
    }

    /// Decodes batches, less those that have ended here already.
    async fn decode(&mut self, ids: &[u64]) {
        let ids: Vec<u64> = ids.iter().copied().filter(|id| self.batches.contains_key(id)).collect();
        let Some(&first) = ids.first() else { return };
        for id in &ids[1..] {
            let mut newer = self.batches.remove(id).unwrap();
            self.batches.get_mut(&first).unwrap().append(&mut newer);
        }
        let answer = self.shard.client.decode(decode(&ids)).await.unwrap().into_inner();
        self.take(first, answer.generations, answer.batch);
    }

    /// What the router does with an answer, and what it would panic at.
    fn take(&mut self, id: u64, generations: Vec<v3::Generation>, cached: Option<v3::CachedBatch>) {
        let live = self.batches.get_mut(&id).unwrap();
        for generation in &generations {
            let number = generation.request_id;
            let request = live.get_mut(&number).unwrap_or_else(|| panic!("request {number} is not live"));
            request.collected.add(number, std::slice::from_ref(generation));
            // All tokens but the last were fed back.
            let written = request.collected.ids.len() - 1;
            if let Some(before) = written.checked_sub(1) {
                let tokens = [&request.prompt[..], &request.collected.ids[..=before]].concat();
                self.contents.insert(request.slots[tokens.len() - 1], tokens);
            }
            if let Some(end) = &request.collected.end {
                assert!(end.generated_tokens >= 1 && (0..3).contains(&end.finish_reason));
                let request = live.remove(&number).unwrap();
                if end_is_greedy(&request.collected) {
                    self.greedy.insert(number, request.collected.ids);
                }
            }
        }
        let Some(cached) = cached else {
            assert!(live.is_empty(), "the batch is gone and its requests are not");
            self.batches.remove(&id);
            return;
        };
        assert_eq!((cached.id, cached.size as usize), (id, cached.request_ids.len()));
        assert!(!live.is_empty() && live.keys().all(|number| cached.request_ids.contains(number)));
        let slots = live.iter().flat_map(|(number, request)| request.held(self.n_new[number]));
        assert_eq!(cached.max_tokens as usize, slots.collect::<BTreeSet<_>>().len(), "slots held");
        let n_live = live.len() as u32;
        let n_decoding = live.values().filter(|request| !request.collected.ids.is_empty()).count() as u32;
        if n_decoding == n_live {
            assert_eq!(cached.current_tokens, n_live);
        } else {
            assert!(cached.current_tokens > n_decoding && cached.current_tokens <= self.max_prefill_tokens);
        }
    }

    /// Keeps what the router kept, if that is not all that is left.
    async fn filter(&mut self, id: u64, keep: Vec<u64>) {
        let live: Vec<u64> = self.batches[&id].keys().copied().collect();
        assert_eq!(live, keep, "requests end here when they ended there");
        let call = v3::FilterBatchRequest { batch_id: id, request_ids: keep.clone() };
        let kept = self.shard.client.filter_batch(call).await.unwrap().into_inner().batch.unwrap();
        assert_eq!((kept.id, kept.size as usize, kept.request_ids), (id, keep.len(), keep));
    }

    async fn clear(&mut self, id: Option<u64>) {
        self.shard.client.clear_cache(v3::ClearCacheRequest { id }).await.unwrap();
        match id {
            Some(id) => drop(self.batches.remove(&id)),
            None => self.batches.clear(),
        }
    }

    /// Lets end what outlives its section here, and checks that nothing is held then.
    async fn end_section(&mut self, title: &str) {
        while let Some(&id) = self.batches.keys().next() {
            self.decode(&[id]).await;
        }
        let stats = self.shard.stats().await;
        assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0), "{title}");
    }
}

/// A drawn output has a seed.
fn end_is_greedy(collected: &Collected) -> bool {
    collected.end.as_ref().is_some_and(|end| end.seed.is_none())
}
