//! A client of random habits, as a router is at its worst: it merges, filters, clears, asks for nonsense, and leaves in
//! the middle of a call. What its greedy requests got is kept.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvshard::backend::random::philox;
use kvshard::pb::v3;
use kvshard::text::Tokenizer;
use tonic::{Code, Status};

use crate::support::shard::{Client, Collected, decode, filter, greedy, on_slots, prefill, request};

/// Beginnings of prompts; a shared prefix is one of them.
const TEXTS: [&str; 4] = [
    "Once upon a time there was a little fox who lived in a small village near the old wood.",
    "Tell me a long story about a brave mouse named Nibbles, who went to the market with a basket and a red hat.",
    "Lily was",
    "The quick brown fox jumps over the lazy dog, and the dog, who has seen it all before, does not even look up; \
     it waits until evening, when the cook comes out with a bone, and then it runs across the yard as fast as the fox.",
];
const WORDS: [&str; 8] =
    ["the fox", "a river", "was happy", "and then", "Nibbles", "ran home", "in spring", "?"];
/// Longest prompt.
const TRUNCATE: u32 = 400;

/// Random numbers of one client, the same in every run.
struct Dice {
    client: u32,
    n_rolled: u32,
}

impl Dice {
    /// Below `n`.
    fn roll(&mut self, n: u32) -> u32 {
        self.n_rolled += 1;
        philox([self.n_rolled, 0, 0, 0], [self.client, 0x50AC])[0] % n
    }

    /// Once in `n`.
    fn once_in(&mut self, n: u32) -> bool {
        self.roll(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.roll(from.len() as u32) as usize]
    }
}

/// A greedy answer, or its beginning.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Answer {
    pub prompt: Vec<u32>,
    pub output: Vec<u32>,
}

/// What a visit came to.
#[derive(Debug, Default)]
pub struct Visit {
    /// Arg-max of unchanged logits each.
    pub answers: Vec<Answer>,
    pub n_requests: usize,
    pub n_tokens: usize,
    pub n_calls: usize,
    pub n_cut_off: usize,
    pub n_refused: usize,
    /// Of prompt tokens that were claimed to be cached.
    pub n_claimed: usize,
}

/// A request that has not ended.
struct Live {
    prompt: Vec<u32>,
    is_greedy: bool,
    /// Slots that nobody else has.
    private: Vec<u32>,
    collected: Collected,
}

/// Slots that this client places requests on.
struct Placed {
    /// For each text, its tokens and the slots that hold their keys and values.
    texts: Vec<(Vec<u32>, Vec<u32>)>,
    free: VecDeque<u32>,
}

pub struct Visitor {
    client: Client,
    tokenizer: Arc<Tokenizer>,
    dice: Dice,
    /// Of batches and requests, unlike any other visitor's.
    next: u64,
    batch: Option<u64>,
    live: BTreeMap<u64, Live>,
    placed: Option<Placed>,
    visit: Visit,
}

impl Visitor {
    /// One whose requests the shard places.
    pub fn new(number: u32, client: Client, tokenizer: Arc<Tokenizer>) -> Visitor {
        Visitor {
            client,
            tokenizer,
            dice: Dice { client: number, n_rolled: 0 },
            next: u64::from(number) << 32,
            batch: None,
            live: BTreeMap::new(),
            placed: None,
            visit: Visit::default(),
        }
    }

    /// One that owns the slots below `n_slots` and keeps the texts' beginnings in some of them.
    pub async fn placing(number: u32, client: Client, tokenizer: Arc<Tokenizer>, n_slots: u32) -> Visitor {
        let mut visitor = Visitor::new(number, client, tokenizer);
        let mut free: VecDeque<u32> = (1..n_slots).collect();
        let mut texts = Vec::new();
        for text in TEXTS {
            let tokens = visitor.encode(text);
            let slots: Vec<u32> = free.drain(..tokens.len()).collect();
            let first = on_slots(request(visitor.number(), text, 1), slots.clone());
            let call = prefill(visitor.number(), vec![first], None);
            let answer = visitor.client.prefill(call).await.unwrap().into_inner();
            assert!(answer.batch.is_none(), "a request of one token goes on");
            texts.push((tokens, slots));
        }
        visitor.placed = Some(Placed { texts, free });
        visitor
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, true, TRUNCATE as usize).unwrap()
    }

    /// Calls until `end`, then lets what runs run out.
    pub async fn stay(mut self, end: Instant) -> Visit {
        while Instant::now() < end {
            self.act().await;
        }
        while let Some(batch) = self.batch {
            self.decode(batch).await;
        }
        self.visit
    }

    async fn act(&mut self) {
        self.visit.n_calls += 1;
        let Some(batch) = self.batch else { return self.prefill(None).await };
        match self.dice.roll(40) {
            0..8 => self.prefill(Some(batch)).await,
            8 => self.filter_some(batch).await,
            9 if self.dice.once_in(8) => self.clear(batch).await,
            10 if self.dice.once_in(8) => self.leave(batch).await,
            11 => self.ask_for_nonsense().await,
            _ => self.decode(batch).await,
        }
    }

    async fn prefill(&mut self, merge: Option<u64>) {
        let n = if self.placed.is_some() { 1 } else { 1 + self.dice.roll(4) };
        let requests: Vec<v3::Request> = (0..n).map(|index| self.request(index + 1 == n)).collect();
        let number = self.number();
        let news: Vec<u64> = requests.iter().map(|request| request.id).collect();
        match self.client.prefill(prefill(number, requests, merge)).await {
            Ok(answer) => {
                let v3::PrefillResponse { generations, batch, .. } = answer.into_inner();
                self.take(merge.unwrap_or(number), generations, batch).await;
            }
            // Slots or lanes run short; whoever merges is told by the request's text instead.
            Err(status) => {
                assert_eq!((status.code(), merge), (Code::ResourceExhausted, None), "{status}");
                self.visit.n_refused += news.len();
                news.into_iter().for_each(|id| self.forget(id));
            }
        }
    }

    fn request(&mut self, is_last: bool) -> v3::Request {
        let dice = &mut self.dice;
        let which = dice.roll(TEXTS.len() as u32) as usize;
        let mut text = TEXTS[which].to_owned();
        for _ in 0..if dice.once_in(8) { 120 } else { dice.roll(12) } {
            text.push(' ');
            text.push_str(dice.pick(&WORDS));
        }
        let max_new_tokens = 1 + dice.roll(80);
        let mut parameters = greedy();
        let is_greedy = !dice.once_in(3);
        if !is_greedy {
            parameters = v3::NextTokenChooserParameters {
                do_sample: !dice.once_in(4),
                seed: u64::from(dice.roll(1000)),
                temperature: dice.pick(&[1.0, 0.7, 1.3]),
                top_k: dice.pick(&[0, 0, 5, 50]),
                top_p: dice.pick(&[1.0, 1.0, 0.9]),
                typical_p: dice.pick(&[1.0, 1.0, 0.8]),
                repetition_penalty: dice.pick(&[1.0, 1.2]),
                frequency_penalty: dice.pick(&[0.0, 0.5]),
                watermark: dice.once_in(5),
                ..parameters
            };
        }
        let top_n_tokens = dice.pick(&[0, 0, 0, 5]);
        let stop_sequences = if dice.once_in(4) { vec!["the".into(), "a ".into()] } else { vec![] };
        let ignore_eos_token = dice.once_in(2);
        let chunk_len = (is_last && dice.once_in(4)).then(|| 1 + dice.roll(30));
        let id = self.number();
        let prompt = self.encode(&text);
        let mut made = request(id, &text, max_new_tokens);
        made.truncate = TRUNCATE;
        made.parameters = Some(parameters);
        made.top_n_tokens = top_n_tokens;
        made.chunk_len = chunk_len;
        made.stopping_parameters =
            Some(v3::StoppingCriteriaParameters { max_new_tokens, stop_sequences, ignore_eos_token });
        let mut private = Vec::new();
        if let Some(placed) = &mut self.placed {
            let (tokens, slots) = &placed.texts[which];
            let n_shared = tokens.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
            let n_positions = prompt.len() + max_new_tokens as usize - 1;
            // A prompt that lost its beginning shares less than the text is long.
            private = placed.free.drain(..n_positions - n_shared).collect();
            made = on_slots(made, slots[..n_shared].iter().chain(&private).copied());
            made.cache_len = n_shared.min(prompt.len() - 1) as u32;
            made.chunk_len = chunk_len.filter(|&len| len < prompt.len() as u32 - made.cache_len);
            self.visit.n_claimed += made.cache_len as usize;
        }
        self.visit.n_requests += 1;
        self.live.insert(id, Live { prompt, is_greedy, private, collected: Collected::default() });
        made
    }

    async fn decode(&mut self, batch: u64) {
        let answer = self.client.decode(decode(&[batch])).await.unwrap_or_else(|status| panic!("{status}"));
        let v3::DecodeResponse { generations, batch: left, .. } = answer.into_inner();
        self.take(batch, generations, left).await;
    }

    /// Takes an answer as a router does: news to the clients, then those that have ended are filtered out.
    async fn take(&mut self, batch: u64, generations: Vec<v3::Generation>, left: Option<v3::CachedBatch>) {
        let mut over = Vec::new();
        for generation in &generations {
            let id = generation.request_id;
            let live =
                self.live.get_mut(&id).unwrap_or_else(|| panic!("news of request {id}, which is over"));
            let refused = generation
                .generated_text
                .as_ref()
                .is_some_and(|end| end.text.starts_with("[request refused"));
            if refused {
                self.visit.n_refused += 1;
                live.collected = Collected::default();
            } else {
                live.collected.add(id, std::slice::from_ref(generation));
            }
            if refused || live.collected.end.is_some() {
                over.push(id);
            }
        }
        over.into_iter().for_each(|id| self.forget(id));
        self.batch = left.is_some().then_some(batch);
        let Some(left) = left else {
            assert!(self.live.is_empty(), "live requests were lost: {:?}", self.live.keys());
            return;
        };
        assert_eq!(left.id, batch);
        let keep: Vec<u64> =
            left.request_ids.iter().copied().filter(|id| self.live.contains_key(id)).collect();
        assert_eq!(keep.len(), self.live.len(), "live requests were lost");
        if keep.len() < left.request_ids.len() {
            self.keep(batch, keep).await;
        }
    }

    async fn keep(&mut self, batch: u64, keep: Vec<u64>) {
        if keep.is_empty() {
            return self.clear(batch).await;
        }
        let kept = self.client.filter_batch(filter(batch, &keep)).await.unwrap().into_inner();
        assert_eq!(kept.batch.unwrap().request_ids, keep);
        let gone: Vec<u64> = self.live.keys().copied().filter(|id| !keep.contains(id)).collect();
        self.visit.n_cut_off += gone.len();
        gone.into_iter().for_each(|id| self.forget(id));
    }

    async fn filter_some(&mut self, batch: u64) {
        let ids: Vec<u64> = self.live.keys().rev().copied().collect();
        let keep = ids.into_iter().filter(|_| !self.dice.once_in(3)).collect();
        self.keep(batch, keep).await;
    }

    async fn clear(&mut self, batch: u64) {
        self.client.clear_cache(v3::ClearCacheRequest { id: Some(batch) }).await.unwrap();
        self.visit.n_cut_off += self.live.len();
        self.batch = None;
        self.live.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| self.forget(id));
    }

    /// Drops a call that has been sent, whose news are lost then, and clears the batch later.
    async fn leave(&mut self, batch: u64) {
        let patience = Duration::from_micros(u64::from(self.dice.roll(400)));
        match tokio::time::timeout(patience, self.client.decode(decode(&[batch]))).await {
            Ok(answer) => {
                let v3::DecodeResponse { generations, batch: left, .. } = answer.unwrap().into_inner();
                self.take(batch, generations, left).await;
            }
            Err(_) => self.clear(batch).await,
        }
    }

    /// Each with its own status; nothing changes by it.
    async fn ask_for_nonsense(&mut self) {
        let number = self.number();
        let mut asked = request(number, TEXTS[0], 5);
        let answer: Result<_, Status> = match self.dice.roll(5) {
            0 => self.client.decode(decode(&[u64::MAX])).await.map(|_| ()),
            1 => {
                asked.stopping_parameters.as_mut().unwrap().max_new_tokens = 0;
                self.client.prefill(prefill(number, vec![asked], None)).await.map(|_| ())
            }
            2 => {
                asked.stopping_parameters.as_mut().unwrap().max_new_tokens = 1 << 20;
                self.client.prefill(prefill(number, vec![asked], None)).await.map(|_| ())
            }
            3 => {
                asked.parameters.as_mut().unwrap().temperature = f32::NAN;
                self.client.prefill(prefill(number, vec![asked], None)).await.map(|_| ())
            }
            _ => self.client.filter_batch(filter(u64::MAX, &[1])).await.map(|_| ()),
        };
        let code = answer.expect_err("nonsense is refused").code();
        assert!([Code::NotFound, Code::InvalidArgument].contains(&code), "{code:?}");
    }

    /// A request that is over: what it got so far is right, and its slots are free.
    fn forget(&mut self, id: u64) {
        let Some(Live { prompt, is_greedy, private, collected }) = self.live.remove(&id) else { return };
        if let Some(placed) = &mut self.placed {
            placed.free.extend(private);
        }
        self.visit.n_tokens += collected.ids.len();
        if is_greedy && !collected.ids.is_empty() {
            self.visit.answers.push(Answer { prompt, output: collected.ids });
        }
    }
}
