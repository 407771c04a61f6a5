//! A router in a loop: continuous batching of a given load, and what each request and step of it took.
//!
//! It admits as TGI's router does: in each turn, whoever waits is prefilled as far as the budget goes, merged with
//! those that run; then all decode.

use std::collections::VecDeque;
use std::mem;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::generate::{CLEAR_TIMEOUT, interrupted, random_id, request_of};
use super::load::{Job, Random};
use super::placing::Placing;
use super::record::{Record, RequestRecord, State, StepKind, StepRecord};
use super::report::{BenchEnding, Report};
use super::shard::{CallError, Shard, Step};
use crate::config::{BatchLimits, BenchConfig, Load};
use crate::pb::v3;

/// How far a load test is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// What runs.
    pub phase: Phase,
    /// Its requests that have ended.
    pub n_ended: usize,
    /// All of its requests.
    pub n_requests: usize,
}

/// What a load test is at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Phase {
    /// Requests that do not count.
    WarmUp,
    /// One of the loads.
    Measuring(Load),
}

/// Puts each load in turn on the shard. Ends early at Ctrl-C and when the shard is lost, with what was measured so
/// far; whatever ends it, the shard keeps nothing.
///
/// Where the configuration says that nobody else uses the shard, it is called as a router calls it: first Warmup, then
/// requests on slots of our choice. Otherwise a live router beside us is not disturbed: ids are random, no slots are
/// named, and neither Warmup nor a ClearCache of everything is sent.
///
/// # Errors
/// Nobody listens, or the shard refuses what comes before the first request.
pub async fn bench(config: &BenchConfig, tell: &mut dyn FnMut(Progress)) -> Result<Report> {
    let mut shard = Shard::connect(&config.url).await?;
    shard.check_alone().await?;
    let info = shard.info().await?;
    let mut random = Random::new(config.seed);
    let mut placing = match config.exclusive {
        true => Placing::begin(&mut shard, &info, config, &mut random).await?,
        false => None,
    };
    let rules = Rules::new(&info, config.limits, placing.as_ref());
    let mut report = Report::new(config, &info);
    let warmup = Load::Closed { in_flight: in_flight(config.loads[0]), n_requests: config.n_warmup };
    let phases = config.loads.iter().map(|load| Phase::Measuring(*load));
    let mut interrupted = pin!(interrupted());
    for phase in [Phase::WarmUp].into_iter().chain(phases) {
        let load = match phase {
            Phase::WarmUp => warmup,
            Phase::Measuring(load) => load,
        };
        let n_requests = load.n_requests();
        let mut tell_ended = |n_ended| tell(Progress { phase, n_ended, n_requests });
        let mut run = Run::new(&mut shard, config, rules, placing.as_mut(), load, &mut random);
        let ended = tokio::select! {
            ended = run.drive(&mut tell_ended) => ended.map_err(|error| BenchEnding::Failed(error.to_string())),
            () = &mut interrupted => Err(BenchEnding::Interrupted),
        };
        run.clear().await;
        if phase != Phase::WarmUp {
            report.add(load, run.record);
        }
        if let Err(ending) = ended {
            report.ending = ending;
            break;
        }
    }
    Ok(report)
}

/// Requests in flight that bring a shard into the state of a load.
fn in_flight(load: Load) -> usize {
    match load {
        Load::Closed { in_flight, .. } => in_flight,
        Load::Open { .. } => 1,
    }
}

/// What the shard can do, and what runs together.
#[derive(Debug, Clone, Copy)]
struct Rules {
    max_prefill_tokens: u32,
    max_requests: usize,
    /// KV slots of the running requests.
    max_total_tokens: u64,
    /// Prompts may be cut, and new requests are merged with those that run.
    chunking: bool,
    /// Tokens of a block; `None`: the shard has no blocks.
    block_tokens: Option<u64>,
    /// Tokens that longer prompts begin with alike.
    prefix_tokens: u32,
}

impl Rules {
    fn new(info: &v3::InfoResponse, limits: BatchLimits, placing: Option<&Placing>) -> Rules {
        let n_free = placing.map_or(u64::MAX, |placing| placing.blocks.n_free_slots());
        Rules {
            max_prefill_tokens: limits.max_prefill_tokens,
            max_requests: limits.max_requests,
            max_total_tokens: limits.max_total_tokens.unwrap_or(u64::MAX).min(n_free),
            chunking: info.support_chunking,
            block_tokens: (!info.requires_padding).then_some(u64::from(info.block_size.max(1))),
            prefix_tokens: placing
                .and_then(|placing| placing.prefix.as_ref())
                .map_or(0, |prefix| prefix.n_tokens),
        }
    }

    /// Leading positions of a request that are computed already.
    fn shared_of(&self, request: &RequestRecord) -> u32 {
        if request.input_tokens > self.prefix_tokens { self.prefix_tokens } else { 0 }
    }

    /// Slots that a request has for itself.
    fn slots_of(&self, request: &RequestRecord) -> u64 {
        let n_own = n_positions(request) - u64::from(self.shared_of(request));
        n_own.next_multiple_of(self.block_tokens.unwrap_or(1))
    }
}

/// Positions of a request; its last token needs none.
fn n_positions(request: &RequestRecord) -> u64 {
    u64::from(request.input_tokens) + u64::from(request.output_tokens) - 1
}

/// When requests arrive.
enum Arrivals {
    /// As long as fewer than this many are in flight.
    WhileFewerThan(usize),
    /// At these times from the beginning.
    At(Vec<Duration>),
}

/// One load on its way.
struct Run<'a> {
    shard: &'a mut Shard,
    config: &'a BenchConfig,
    rules: Rules,
    /// `None`: the shard places requests.
    placing: Option<&'a mut Placing>,
    random: &'a mut Random,
    arrivals: Arrivals,
    n_requests: usize,
    /// Request `i` of the record has this id and `i`.
    first_id: u64,
    next_batch_id: u64,
    /// Prompts of `waiting`.
    prompts: VecDeque<String>,
    /// Requests that have arrived and do not run.
    waiting: VecDeque<usize>,
    /// Requests that run.
    live: Vec<usize>,
    /// Slots of `live`.
    live_slots: u64,
    /// Blocks of each request of the record, while it runs.
    blocks: Vec<Vec<u32>>,
    /// What the shard holds; one batch, or without chunking up to two, older first.
    held: Vec<v3::CachedBatch>,
    /// What it may hold beside, while a call runs.
    in_call: Vec<u64>,
    record: Record,
}

impl<'a> Run<'a> {
    fn new(
        shard: &'a mut Shard,
        config: &'a BenchConfig,
        rules: Rules,
        placing: Option<&'a mut Placing>,
        load: Load,
        random: &'a mut Random,
    ) -> Run<'a> {
        let arrivals = match load {
            Load::Closed { in_flight, .. } => Arrivals::WhileFewerThan(in_flight),
            Load::Open { rate, n_requests } => Arrivals::At(random.arrivals(rate, n_requests)),
        };
        Run {
            shard,
            config,
            rules,
            placing,
            random,
            arrivals,
            n_requests: load.n_requests(),
            // Room for what is counted up from here.
            first_id: random_id() / 2,
            next_batch_id: random_id() / 2,
            prompts: VecDeque::new(),
            waiting: VecDeque::new(),
            live: Vec::new(),
            live_slots: 0,
            blocks: Vec::new(),
            held: Vec::new(),
            in_call: Vec::new(),
            record: Record::new(Instant::now()),
        }
    }

    /// Runs until every request has ended.
    async fn drive(&mut self, tell: &mut dyn FnMut(usize)) -> Result<()> {
        self.record = Record::new(Instant::now());
        loop {
            self.take_arrivals();
            if self.waiting.is_empty() && self.held.is_empty() {
                match self.next_arrival() {
                    Some(at) => {
                        let began = Instant::now();
                        tokio::time::sleep_until(at.into()).await;
                        self.record.waited(began.elapsed());
                        continue;
                    }
                    None => return Ok(()),
                }
            }
            if let Some(batch) = self.admit() {
                self.prefill(batch).await?;
            }
            if !self.held.is_empty() {
                self.decode().await?;
            }
            tell(self.record.n_ended());
        }
    }

    /// Puts into the queue whoever has arrived.
    fn take_arrivals(&mut self) {
        let now = Instant::now();
        while self.record.requests.len() < self.n_requests {
            let n_in_flight = self.waiting.len() + self.live.len();
            let arrived = match &self.arrivals {
                Arrivals::WhileFewerThan(limit) if n_in_flight < *limit => now,
                Arrivals::WhileFewerThan(_) => return,
                Arrivals::At(times) => match self.record.began + times[self.record.requests.len()] {
                    at if at <= now => at,
                    _ => return,
                },
            };
            let prefix = self.placing.as_ref().and_then(|placing| placing.prefix.as_ref());
            let Job { prompt, input_tokens, output_tokens } = Job::next(self.config, self.random, prefix);
            self.waiting.push_back(self.record.requests.len());
            self.prompts.push_back(prompt);
            self.blocks.push(Vec::new());
            self.record.requests.push(RequestRecord::new(arrived, input_tokens, output_tokens));
        }
    }

    /// When the next request arrives, if one does by the clock.
    fn next_arrival(&self) -> Option<Instant> {
        match &self.arrivals {
            Arrivals::At(times) => times.get(self.record.requests.len()).map(|at| self.record.began + *at),
            Arrivals::WhileFewerThan(_) => None,
        }
    }

    /// A batch of those who wait and fit, first come, first served: by prompt tokens of the step (the last prompt may
    /// be cut), by requests, and by slots.
    fn admit(&mut self) -> Option<v3::Batch> {
        let n_current: u32 = self.held.iter().map(|batch| batch.current_tokens).sum();
        let mut budget = self.rules.max_prefill_tokens.saturating_sub(n_current);
        let mut requests = Vec::new();
        while let Some(&index) = self.waiting.front() {
            let request = &self.record.requests[index];
            let n_slots = self.rules.slots_of(request);
            let is_alone = self.live.is_empty();
            if n_slots > self.rules.max_total_tokens {
                let limit = self.rules.max_total_tokens;
                self.pop_waiting();
                self.record.fail(index, &format!("it needs {n_slots} KV slots, and {limit} may be taken"));
                continue;
            }
            let fits_beside = self.live.len() < self.rules.max_requests
                && self.live_slots + n_slots <= self.rules.max_total_tokens;
            let n_to_compute = request.input_tokens - self.rules.shared_of(request);
            let is_cut = n_to_compute > budget;
            // A prompt that never fits is the shard's to judge, without chunking.
            if !fits_beside || (is_cut && !is_alone && (budget == 0 || !self.rules.chunking)) {
                break;
            }
            let chunk_len = (is_cut && self.rules.chunking).then_some(budget);
            budget = budget.saturating_sub(n_to_compute);
            self.live.push(index);
            self.live_slots += n_slots;
            self.record.requests[index].state = State::Running;
            if let Some(placing) = &mut self.placing {
                self.blocks[index] = placing.blocks.take(n_slots).unwrap_or_default();
            }
            let prompt = self.pop_waiting();
            requests.push(self.message(index, &prompt, chunk_len));
        }
        self.next_batch_id += 1;
        let size = u32::try_from(requests.len()).ok().filter(|size| *size > 0)?;
        let max_blocks = requests.iter().map(|request| request.blocks.len()).max().unwrap_or(0) as u32;
        Some(v3::Batch { id: self.next_batch_id, requests, size, max_tokens: 0, max_blocks })
    }

    fn pop_waiting(&mut self) -> String {
        self.waiting.pop_front();
        self.prompts.pop_front().unwrap_or_default()
    }

    fn message(&self, index: usize, prompt: &str, chunk_len: Option<u32>) -> v3::Request {
        let request = &self.record.requests[index];
        let mut message = request_of(prompt, &self.config.parameters);
        if let Some(parameters) = &mut message.parameters {
            parameters.seed = parameters.seed.wrapping_add(index as u64);
        }
        if let Some(placing) = &self.placing {
            let n_shared = self.rules.shared_of(request);
            let prefix = placing.prefix.as_ref().filter(|_| n_shared > 0);
            let shared = prefix.map_or(&[][..], |prefix| &prefix.slots);
            message.blocks = [shared, &self.blocks[index]].concat();
            message.slots = placing.blocks.slots(&message.blocks, n_positions(request));
            message.cache_len = n_shared;
        }
        v3::Request {
            id: self.first_id + index as u64,
            truncate: request.input_tokens,
            stopping_parameters: Some(v3::StoppingCriteriaParameters {
                max_new_tokens: request.output_tokens,
                stop_sequences: Vec::new(),
                ignore_eos_token: true,
            }),
            chunk_len,
            ..message
        }
    }

    async fn prefill(&mut self, batch: v3::Batch) -> Result<()> {
        let running = if self.rules.chunking { self.held.pop() } else { None };
        self.in_call = running.iter().map(|batch| batch.id).chain([batch.id]).collect();
        // A call that fails takes along what it was to be merged with.
        let members: Vec<usize> = match &running {
            Some(_) => self.live.clone(),
            None => self.live[self.live.len() - batch.requests.len()..].to_vec(),
        };
        let began = Instant::now();
        let answer = self.shard.prefill(batch, running).await;
        self.take(StepKind::Prefill, began, answer, members).await
    }

    async fn decode(&mut self) -> Result<()> {
        let batches = mem::take(&mut self.held);
        self.in_call = batches.iter().map(|batch| batch.id).collect();
        let began = Instant::now();
        let answer = self.shard.decode(batches).await;
        let members = if answer.is_err() { self.live.clone() } else { Vec::new() };
        self.take(StepKind::Decode, began, answer, members).await
    }

    /// Takes what a call answered; where it failed, its members have.
    async fn take(
        &mut self,
        kind: StepKind,
        began: Instant,
        answer: Result<Step, CallError>,
        members: Vec<usize>,
    ) -> Result<()> {
        let step = match answer {
            Ok(step) => step,
            Err(error) if error.is_lost() => return Err(error.into()),
            Err(error) => {
                members.into_iter().for_each(|index| self.record.fail(index, &error.to_string()));
                self.forget_ended();
                return Ok(self.clear_in_call().await?);
            }
        };
        let now = Instant::now();
        let n_rows = step.generations.len();
        let Step { generations, batch, forward_ns, decode_ns, total_ns } = step;
        self.record.push_step(StepRecord {
            kind,
            n_rows,
            began,
            answered: now,
            to_next: None,
            forward_ns,
            decode_ns,
            total_ns,
        });
        let mut any_ended = false;
        for generation in generations {
            any_ended |= self.take_news(generation, now)?;
        }
        if any_ended {
            self.forget_ended();
        }
        self.keep(batch, any_ended).await?;
        if kind == StepKind::Prefill && !any_ended {
            self.check_lengths();
        }
        self.in_call.clear();
        Ok(())
    }

    /// Takes a request's news; whether they are its last.
    fn take_news(&mut self, generation: v3::Generation, now: Instant) -> Result<bool> {
        let v3::Generation { request_id, tokens, generated_text, .. } = generation;
        let index = request_id.checked_sub(self.first_id).and_then(|index| usize::try_from(index).ok());
        let is_running = |index: &usize| {
            self.record.requests.get(*index).is_some_and(|request| request.state == State::Running)
        };
        let Some(index) = index.filter(is_running) else {
            bail!("the shard answered for request {request_id}, which does not run");
        };
        self.record.take_tokens(index, tokens.map_or(0, |tokens| tokens.ids.len()), now);
        let Some(end) = generated_text else { return Ok(false) };
        let request = &self.record.requests[index];
        let is_whole =
            request.n_tokens == request.output_tokens && end.finish_reason == v3::FinishReason::Length as i32;
        if is_whole {
            self.record.finish(index);
        } else {
            let (n, asked) = (request.n_tokens, request.output_tokens);
            let text: String = end.text.chars().take(200).collect();
            // A shard has no other way to say why it refuses one request of a batch.
            let is_refusal = n == 1 && text.starts_with('[');
            let reason = if is_refusal { text } else { format!("it ended after {n} of {asked} tokens") };
            self.record.fail(index, &reason);
        }
        Ok(true)
    }

    /// Keeps a batch that came back, less those who have ended.
    async fn keep(&mut self, batch: Option<v3::CachedBatch>, any_ended: bool) -> Result<(), CallError> {
        let Some(batch) = batch else {
            let is_held = |id: u64| self.held.iter().any(|batch| batch.request_ids.contains(&id));
            let lost: Vec<usize> =
                self.live.iter().copied().filter(|index| !is_held(self.first_id + *index as u64)).collect();
            if !lost.is_empty() {
                lost.into_iter()
                    .for_each(|index| self.record.fail(index, "the shard dropped it before its end"));
                self.forget_ended();
            }
            return Ok(());
        };
        if !any_ended {
            self.held.push(batch);
            return Ok(());
        }
        let is_live = |id: &u64| {
            let index = id.wrapping_sub(self.first_id) as usize;
            self.record.requests.get(index).is_some_and(|request| request.state == State::Running)
        };
        let keep: Vec<u64> = batch.request_ids.iter().copied().filter(is_live).collect();
        if keep.len() == batch.request_ids.len() {
            self.held.push(batch);
            return Ok(());
        }
        let began = Instant::now();
        if keep.is_empty() {
            self.shard.clear(batch.id).await?;
        } else {
            self.held.extend(self.shard.filter(batch.id, keep).await?);
        }
        self.record.waited(began.elapsed());
        Ok(())
    }

    /// Whether the shard counts as many tokens as were asked for: the slots of its batch tell.
    fn check_lengths(&mut self) {
        // Shards differ in how often they count a slot that is shared.
        let counts_alike = self.rules.block_tokens.is_some() && self.rules.prefix_tokens == 0;
        if let ([batch], true) = (&self.held[..], counts_alike) {
            self.record.check_slots(u64::from(batch.max_tokens), self.live_slots);
        }
    }

    /// Frees what requests held that run no more.
    fn forget_ended(&mut self) {
        let is_running = |index: &usize| self.record.requests[*index].state == State::Running;
        let (live, ended): (Vec<usize>, Vec<usize>) =
            mem::take(&mut self.live).into_iter().partition(is_running);
        self.live = live;
        for index in ended {
            self.live_slots -= self.rules.slots_of(&self.record.requests[index]);
            if let Some(placing) = &mut self.placing {
                placing.blocks.give_back(mem::take(&mut self.blocks[index]));
            }
        }
    }

    async fn clear_in_call(&mut self) -> Result<(), CallError> {
        while let Some(id) = self.in_call.pop() {
            self.shard.clear(id).await?;
        }
        Ok(())
    }

    /// Has the shard drop what it may still hold.
    async fn clear(&mut self) {
        self.in_call.extend(self.held.drain(..).map(|batch| batch.id));
        // The run's failure is what the caller hears of; the shard drops forgotten batches by itself.
        let _ = tokio::time::timeout(CLEAR_TIMEOUT, self.clear_in_call()).await;
    }
}
