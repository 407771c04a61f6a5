//! The table: every call, what becomes of it, and that it harms nobody.

use kvshard::pb::v3;
use tonic::{Code, Status};

use super::{N_NEW, NOBODY, RUNNING, Witness, known, lengths, requests, slots};
use crate::support::shard::{Collected, decode, filter, handle, prefill};

pub(super) struct Case {
    name: String,
    call: Call,
    expected: Expected,
}

enum Call {
    Prefill(v3::PrefillRequest),
    Decode(v3::DecodeRequest),
    Filter(v3::FilterBatchRequest),
    Warmup(v3::WarmupRequest),
}

enum Expected {
    /// With this code, and a message that holds these words.
    Refused(Code, Vec<String>),
    /// Every request gets the known tokens.
    Known,
    /// Every request gets its tokens, whichever.
    Served,
}

impl Case {
    /// A Prefill of the known request, changed.
    fn changed(name: impl Into<String>, change: impl FnOnce(&mut v3::Request), expected: Expected) -> Case {
        let mut request = known(7);
        change(&mut request);
        Case { name: name.into(), call: Call::Prefill(prefill(7, vec![request], None)), expected }
    }

    pub(super) fn invalid(
        name: impl Into<String>,
        change: impl FnOnce(&mut v3::Request),
        words: &[&str],
    ) -> Case {
        Case::refused(name, change, Code::InvalidArgument, words)
    }

    pub(super) fn refused(
        name: impl Into<String>,
        change: impl FnOnce(&mut v3::Request),
        code: Code,
        words: &[&str],
    ) -> Case {
        Case::changed(name, change, refused(code, words))
    }

    /// Served with the known tokens.
    pub(super) fn known(name: impl Into<String>, change: impl FnOnce(&mut v3::Request)) -> Case {
        Case::changed(name, change, Expected::Known)
    }

    /// Served with other tokens.
    pub(super) fn served(name: impl Into<String>, change: impl FnOnce(&mut v3::Request)) -> Case {
        Case::changed(name, change, Expected::Served)
    }

    async fn run(self, witness: &mut Witness) {
        let Case { name, call, expected } = self;
        let client = &mut witness.shard.client;
        let outcome = match call {
            Call::Prefill(call) => run_prefill(witness, call).await,
            Call::Decode(call) => client.decode(call).await.map(|_| Vec::new()),
            Call::Filter(call) => client.filter_batch(call).await.map(|_| Vec::new()),
            Call::Warmup(call) => client.warmup(call).await.map(|_| Vec::new()),
        };
        match (expected, outcome) {
            (Expected::Refused(code, words), Err(status)) => {
                assert_eq!(status.code(), code, "{name}: {status}");
                check_message(&name, status.message(), &words);
            }
            (Expected::Known, Ok(outputs)) => {
                for output in outputs {
                    assert_eq!(output.ids, witness.known.ids, "{name}");
                    assert_eq!(output.text, witness.known.text, "{name}");
                }
            }
            (Expected::Served, Ok(outputs)) => {
                assert!(
                    outputs.iter().all(|output| output.ids.len() == N_NEW as usize),
                    "{name}: {outputs:?}"
                );
            }
            (_, outcome) => panic!("{name} ended in {outcome:?}"),
        }
        witness.check(&name).await;
    }
}

fn refused(code: Code, words: &[&str]) -> Expected {
    Expected::Refused(code, words.iter().map(|word| (*word).to_owned()).collect())
}

/// Runs a Prefill's requests to their end.
async fn run_prefill(witness: &mut Witness, call: v3::PrefillRequest) -> Result<Vec<Collected>, Status> {
    let batch = call.batch.as_ref();
    let ids: Vec<u64> = batch.iter().flat_map(|batch| &batch.requests).map(|request| request.id).collect();
    let client = &mut witness.shard.client;
    let mut collected = vec![Collected::default(); ids.len()];
    let answer = client.prefill(call).await?.into_inner();
    let (mut generations, mut cached) = (answer.generations, answer.batch);
    loop {
        ids.iter().zip(&mut collected).for_each(|(id, collected)| collected.add(*id, &generations));
        let Some(batch) = cached else { return Ok(collected) };
        let answer = client.decode(decode(&[batch.id])).await?.into_inner();
        (generations, cached) = (answer.generations, answer.batch);
    }
}

/// A message is for people: it says what is wrong, with the numbers, in one short line.
fn check_message(name: &str, message: &str, words: &[String]) {
    for word in words {
        assert!(message.contains(word.as_str()), "{name}: {word:?} is not in {message:?}");
    }
    assert!(message.len() < 300 && !message.contains('\n') && !message.ends_with('.'), "{name}: {message:?}");
    assert!(message.starts_with(|first: char| !first.is_uppercase()), "{name}: {message:?}");
}

/// What is wrong with a call as a whole.
fn about_the_call() -> Vec<Case> {
    let case = |name: &str, call, expected| Case { name: name.into(), call, expected };
    let sized = |size| {
        let mut call = prefill(7, vec![known(7)], None);
        call.batch.as_mut().unwrap().size = size;
        Call::Prefill(call)
    };
    let invalid = |words: &[&str]| refused(Code::InvalidArgument, words);
    let empty = v3::PrefillRequest { batch: None, cached_batch: None };
    let mut boastful = prefill(7, vec![known(7)], None);
    let batch = boastful.batch.as_mut().unwrap();
    (batch.max_tokens, batch.max_blocks) = (u32::MAX, u32::MAX);
    vec![
        case("a Prefill without a batch", Call::Prefill(empty), invalid(&["no batch"])),
        case("a batch of nothing", Call::Prefill(prefill(7, vec![], None)), invalid(&["no requests"])),
        case("size 0", sized(0), invalid(&["size 0", "1 requests"])),
        case("size 3", sized(3), invalid(&["size 3", "1 requests"])),
        case("the largest size", sized(u32::MAX), invalid(&["size 4294967295", "1 requests"])),
        case(
            "a request twice",
            Call::Prefill(prefill(7, vec![known(7), known(8), known(7)], None)),
            invalid(&["request 7", "twice"]),
        ),
        case(
            "a merge with a batch that is not here",
            Call::Prefill(prefill(7, vec![known(7)], Some(NOBODY))),
            refused(Code::NotFound, &["404"]),
        ),
        case("the largest estimates", Call::Prefill(boastful), Expected::Known),
        case("the largest batch id", Call::Prefill(prefill(u64::MAX, vec![known(1)], None)), Expected::Known),
        case(
            "the probe's request id on a request that is none",
            Call::Prefill(prefill(7, vec![known(u64::MAX)], None)),
            invalid(&["18446744073709551615", "probe", "16"]),
        ),
    ]
}

/// What is wrong with the handles of batches.
fn about_handles() -> Vec<Case> {
    let case = |name: &str, call, code, words: &[&str]| Case {
        name: name.into(),
        call,
        expected: refused(code, words),
    };
    let (invalid, unknown) = (Code::InvalidArgument, Code::NotFound);
    vec![
        case("a Decode of nothing", Call::Decode(decode(&[])), invalid, &["no batch"]),
        case("a Decode of nobody", Call::Decode(decode(&[NOBODY])), unknown, &["404"]),
        case(
            "a Decode of the largest id",
            Call::Decode(decode(&[u64::MAX])),
            unknown,
            &["18446744073709551615"],
        ),
        case("a batch named twice", Call::Decode(decode(&[RUNNING, RUNNING])), invalid, &["500", "twice"]),
        case("a batch and nobody", Call::Decode(decode(&[RUNNING, NOBODY])), unknown, &["404"]),
        case("nobody and a batch", Call::Decode(decode(&[NOBODY, RUNNING])), unknown, &["404"]),
        case("a filter of nobody", Call::Filter(filter(NOBODY, &[1])), unknown, &["404"]),
        case("a filter that keeps nothing", Call::Filter(filter(RUNNING, &[])), invalid, &["500"]),
        case("a filter of nobody that keeps nothing", Call::Filter(filter(NOBODY, &[])), invalid, &["404"]),
    ]
}

/// Warmups that cannot be: refused before anything is dropped for them.
fn about_warmup() -> Vec<Case> {
    let good = v3::WarmupRequest {
        batch: prefill(0, vec![known(0), known(0)], None).batch,
        max_input_tokens: None,
        max_prefill_tokens: 200,
        max_total_tokens: None,
    };
    let case = |name: &str, call, code, words: &[&str]| Case {
        name: name.into(),
        call: Call::Warmup(call),
        expected: refused(code, words),
    };
    let of = |change: fn(&mut v3::Request)| {
        let mut call = good.clone();
        call.batch.as_mut().unwrap().requests.iter_mut().for_each(change);
        call
    };
    let sized = |size| {
        let mut call = good.clone();
        call.batch.as_mut().unwrap().size = size;
        call
    };
    let limits = |max_input_tokens, max_total_tokens| v3::WarmupRequest {
        max_input_tokens,
        max_total_tokens,
        ..good.clone()
    };
    let prefilling = |max_prefill_tokens| v3::WarmupRequest { max_prefill_tokens, ..good.clone() };
    let (invalid, cannot) = (Code::InvalidArgument, Code::FailedPrecondition);
    let largest = "4294967295";
    vec![
        case(
            "a Warmup without a batch",
            v3::WarmupRequest { batch: None, ..good.clone() },
            invalid,
            &["no batch"],
        ),
        case("a Warmup that counts wrongly", sized(9), invalid, &["size 9", "2 requests"]),
        case("a Warmup with room for no prompt", prefilling(0), cannot, &["0", "1024"]),
        case("a Warmup with the largest prefill", prefilling(u32::MAX), cannot, &[largest, "1024"]),
        case("the largest input", limits(Some(u32::MAX), None), cannot, &[largest, "511"]),
        case("the largest total", limits(None, Some(u32::MAX)), cannot, &[largest, "512"]),
        case("the largest of both", limits(Some(u32::MAX), Some(u32::MAX)), cannot, &[largest, "512"]),
        case("no input", limits(Some(0), None), cannot, &["0", "511"]),
        case("no total", limits(None, Some(0)), cannot, &["0", "512"]),
        case("input and no output", limits(Some(100), Some(100)), cannot, &["100", "99"]),
        case(
            "a Warmup that truncates to nothing",
            of(|request| request.truncate = 0),
            invalid,
            &["truncate is 0"],
        ),
        case(
            "a Warmup at no temperature",
            of(|request| request.parameters.as_mut().unwrap().temperature = 0.0),
            invalid,
            &["temperature is 0"],
        ),
    ]
}

async fn run_all(mut witness: Witness) {
    let tables = [
        about_the_call(),
        about_handles(),
        about_warmup(),
        requests::cases(),
        lengths::cases(),
        slots::cases(),
    ];
    for case in tables.into_iter().flatten() {
        case.run(&mut witness).await;
    }
    // Echoes in a handle count for nothing, and unknown batches are no error of ClearCache.
    let lying = v3::CachedBatch {
        request_ids: vec![u64::MAX; 3],
        size: u32::MAX,
        max_tokens: u32::MAX,
        current_tokens: u32::MAX,
        ..handle(RUNNING)
    };
    let call = v3::DecodeRequest { batches: vec![lying] };
    let answer = witness.shard.client.decode(call).await.unwrap().into_inner();
    witness.running.add(RUNNING, &answer.generations);
    for id in [NOBODY, 0, u64::MAX] {
        witness.shard.client.clear_cache(v3::ClearCacheRequest { id: Some(id) }).await.unwrap();
    }
    witness.check("ClearCache of nobody").await;
    witness.finish().await;
}

#[tokio::test]
async fn no_call_harms_anybody_before_any_warmup() {
    run_all(Witness::start(&[]).await).await;
}

#[tokio::test]
async fn no_call_harms_anybody_after_a_warmup() {
    let mut shard = crate::support::shard::TestShard::start("llama", &[]).await;
    let call = v3::WarmupRequest {
        batch: prefill(0, vec![known(0)], None).batch,
        max_input_tokens: None,
        max_prefill_tokens: 300,
        max_total_tokens: None,
    };
    shard.client.warmup(call).await.unwrap();
    run_all(Witness::before(shard).await).await;
}
