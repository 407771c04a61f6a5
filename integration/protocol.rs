//! The protocol's rules, each through a real socket.

use std::time::Duration;

use kvshard::pb::{v2, v3};
use tonic::Code;

use crate::support::shard::{
    Collected, TestShard, decode, filter, greedy, on_slots, prefill, request, run_to_end,
};

const LONG: &str = "the quick brown fox jumps over the lazy dog and then some more words follow in a row";

/// The batch that a router warms up with.
fn warmup_batch(lengths: &[u32], new_tokens: u32) -> v3::Batch {
    let image = v3::Image { data: vec![0x89; 551], mimetype: "image/jpeg;base64".into() };
    let requests = lengths.iter().enumerate().map(|(index, &len)| {
        let text = "_test ".repeat(len as usize);
        let mut request = request(0, &text, new_tokens);
        request.truncate = len;
        request.prefill_logprobs = true;
        request.top_n_tokens = 20;
        request.parameters = Some(v3::NextTokenChooserParameters {
            temperature: 0.9,
            top_k: 10,
            top_p: 0.9,
            typical_p: 0.9,
            repetition_penalty: 1.2,
            frequency_penalty: 0.1,
            watermark: true,
            ..Default::default()
        });
        if index == 0 {
            let image = v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Image(image.clone())) };
            request.input_chunks.as_mut().unwrap().chunks.push(image);
        }
        request
    });
    let requests: Vec<v3::Request> = requests.collect();
    v3::Batch { id: 0, size: requests.len() as u32, requests, ..Default::default() }
}

fn warmup(input: Option<u32>, total: Option<u32>, lengths: &[u32]) -> v3::WarmupRequest {
    v3::WarmupRequest {
        batch: Some(warmup_batch(lengths, total.map_or(1, |total| total - lengths[0]))),
        max_input_tokens: input,
        max_prefill_tokens: lengths.iter().sum(),
        max_total_tokens: total,
    }
}

#[tokio::test]
async fn a_router_starts_up_twice() {
    let mut shard = TestShard::start("llama", &[]).await;
    for _ in 0..2 {
        let found =
            shard.client.service_discovery(v3::ServiceDiscoveryRequest {}).await.unwrap().into_inner();
        assert_eq!(found.urls, [shard.shard.url()]);
        assert!(found.urls[0].starts_with("unix:///"));
        shard.client.clear_cache(v3::ClearCacheRequest { id: None }).await.unwrap();
        shard.client.clear_cache(v3::ClearCacheRequest { id: Some(77) }).await.unwrap();
        let info = shard.client.info(v3::InfoRequest {}).await.unwrap().into_inner();
        assert!(!info.requires_padding && info.support_chunking && info.use_prefix_caching);
        assert_eq!((info.block_size, info.window_size, info.speculate), (1, None, 0));
        assert_eq!((info.dtype.as_str(), info.device_type.as_str()), ("torch.float32", "cpu"));
        let free = shard.client.warmup(warmup(None, None, &[300])).await.unwrap().into_inner();
        // 512 positions, 1,024 slots of which slot 0 is nobody's.
        assert_eq!(free.max_supported_total_tokens, Some(1024));
        assert_eq!((free.max_input_tokens, free.max_total_tokens), (511, 512));
        let limited =
            shard.client.warmup(warmup(Some(100), Some(120), &[100, 100, 56])).await.unwrap().into_inner();
        assert_eq!((limited.max_input_tokens, limited.max_total_tokens), (100, 120));
        assert_eq!(shard.stats().await.n_batches, 0);
    }
    shard.finish().await;
}

#[tokio::test]
async fn limits_that_cannot_hold_fail_warmup_with_the_numbers() {
    let mut shard = TestShard::start("llama", &[]).await;
    for (call, numbers) in [
        (warmup(Some(100), Some(4000), &[100]), ["4000", "512"]),
        (warmup(Some(120), Some(120), &[100]), ["120", "119"]),
        (v3::WarmupRequest { max_prefill_tokens: 5000, ..warmup(None, None, &[100]) }, ["5000", "1024"]),
        (v3::WarmupRequest { max_prefill_tokens: 0, ..warmup(None, None, &[100]) }, ["0", "1024"]),
    ] {
        let status = shard.client.warmup(call).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(numbers.iter().all(|number| status.message().contains(number)), "{status}");
    }
    shard.finish().await;
}

/// The call sequence of one client request, with and without slots, in order and scattered.
#[tokio::test]
async fn a_request_gets_the_same_tokens_wherever_its_slots_are() {
    let mut shard = TestShard::start("llama", &[]).await;
    let own = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 9)]).await;
    assert_eq!(own[0].ids.len(), 9);
    assert_eq!(own[0].end.as_ref().unwrap().finish_reason(), v3::FinishReason::Length);
    let ordered = run_to_end(&mut shard.client, 1, vec![on_slots(request(1, LONG, 9), 1..200)]).await;
    let scattered = (0..200).map(|index| 1 + (index * 389) % 1021);
    let scattered = run_to_end(&mut shard.client, 2, vec![on_slots(request(2, LONG, 9), scattered)]).await;
    assert_eq!(own, ordered);
    assert_eq!(own, scattered);
    assert_eq!(shard.stats().await.n_leased, 0);
    shard.finish().await;
}

#[tokio::test]
async fn a_cached_prefix_is_used_where_it_is_true_and_recomputed_where_it_is_not() {
    let mut shard = TestShard::start("llama", &[]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 6)]).await;
    let n = {
        let mut counted = request(9, LONG, 1);
        counted.prefill_logprobs = true;
        // The prompt's length, by the slots it takes: all of the pool's but what a request of one token leaves.
        let answer =
            shard.client.prefill(prefill(9, vec![request(9, LONG, 2)], None)).await.unwrap().into_inner();
        shard.client.clear_cache(v3::ClearCacheRequest { id: Some(9) }).await.unwrap();
        answer.batch.unwrap().max_tokens - 1
    };
    let claim = |id, first: u32, cache_len| {
        let mut request = on_slots(request(id, LONG, 6), first..first + n + 5);
        request.cache_len = cache_len;
        request
    };
    for (id, cache_len) in [(1, 0), (2, n - 1), (3, n / 2), (4, n + 50)] {
        let hit = run_to_end(&mut shard.client, id, vec![claim(id, 1, cache_len)]).await;
        assert_eq!(hit, alone, "cache_len {cache_len}");
    }
    // Slots that nobody wrote, and slots that hold another prompt's KV.
    let lie = run_to_end(&mut shard.client, 5, vec![claim(5, 300, n - 1)]).await;
    assert_eq!(lie, alone);
    let mut other = on_slots(request(6, "something else entirely, which is not long", 6), 1..200);
    other.cache_len = 7;
    let other = run_to_end(&mut shard.client, 6, vec![other]).await;
    let alone =
        run_to_end(&mut shard.client, 7, vec![request(7, "something else entirely, which is not long", 6)])
            .await;
    assert_eq!(other, alone);
    shard.finish().await;
}

#[tokio::test]
async fn a_fully_cached_prompt_may_be_shared_by_live_requests() {
    let mut shard = TestShard::start("llama", &[]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![on_slots(request(0, LONG, 8), 1..200)]).await;
    let n = 200 - 1 - 8 - count_unused(&mut shard, LONG).await;
    let shared = |id: u64, first: u32| {
        let mut request = on_slots(request(id, LONG, 8), (1..=n).chain(first..first + 8));
        request.cache_len = n - 1;
        request
    };
    let both = run_to_end(&mut shard.client, 1, vec![shared(1, 400), shared(2, 500), shared(3, 600)]).await;
    assert!(both.iter().all(|collected| *collected == alone[0]));
    shard.finish().await;
}

/// A router that counts more tokens than the shard believes slots to be shared that lie behind the prompt's end here.
#[tokio::test]
async fn a_claim_beyond_the_prompt_spares_the_live_request_that_it_points_at() {
    let mut shard = TestShard::start("llama", &[]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 8)]).await;
    let cut = LONG.len() / 2;
    let half_alone = run_to_end(&mut shard.client, 0, vec![request(0, &LONG[..cut], 8)]).await;
    let first = prefill(1, vec![on_slots(request(1, LONG, 8), 1..200)], None);
    let mut answer = shard.client.prefill(first).await.unwrap().into_inner();
    let (mut live, mut half) = (Collected::default(), Collected::default());
    live.add(1, &answer.generations);
    let mut claimed = on_slots(request(2, &LONG[..cut], 8), (1..50).chain(300..500));
    claimed.cache_len = 49;
    answer = shard.client.prefill(prefill(2, vec![claimed], Some(1))).await.unwrap().into_inner();
    loop {
        live.add(1, &answer.generations);
        half.add(2, &answer.generations);
        let Some(batch) = answer.batch else { break };
        let next = shard.client.decode(decode(&[batch.id])).await.unwrap().into_inner();
        (answer.generations, answer.batch) = (next.generations, next.batch);
    }
    assert_eq!(([live], [half]), ([alone[0].clone()], [half_alone[0].clone()]));
    shard.finish().await;
}

/// How many of 200 − 1 slots a request for 8 tokens after `text` leaves unused.
async fn count_unused(shard: &mut TestShard, text: &str) -> u32 {
    let call = prefill(90, vec![on_slots(request(90, text, 8), 700..899)], None);
    let used = shard.client.prefill(call).await.unwrap().into_inner().batch.unwrap().max_tokens;
    shard.client.clear_cache(v3::ClearCacheRequest { id: Some(90) }).await.unwrap();
    // A request takes prompt and new tokens less one.
    199 - used - 1
}

#[tokio::test]
async fn chunks_continue_in_decode_and_a_step_may_bring_no_news() {
    let mut shard = TestShard::start("llama", &["--max-batch-prefill-tokens", "10"]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 5)]).await;
    let mut chunked = on_slots(request(1, LONG, 5), 1..200);
    chunked.chunk_len = Some(7);
    let answer = shard.client.prefill(prefill(1, vec![chunked], None)).await.unwrap().into_inner();
    assert!(answer.generations.is_empty());
    let mut cached = answer.batch;
    assert_eq!(cached.as_ref().unwrap().current_tokens, 10, "the next chunk");
    let mut collected = Collected::default();
    let mut silent = 0;
    while let Some(batch) = cached {
        let answer = shard.client.decode(decode(&[batch.id])).await.unwrap().into_inner();
        silent += u32::from(answer.generations.is_empty());
        collected.add(1, &answer.generations);
        if let (1, Some(batch)) = (answer.generations.len(), &answer.batch) {
            assert_eq!(batch.current_tokens, 1);
        }
        cached = answer.batch;
    }
    assert!(silent >= 1);
    assert_eq!(collected, alone[0]);
    shard.finish().await;
}

#[tokio::test]
async fn new_requests_merge_into_a_running_batch_old_first() {
    let mut shard = TestShard::start("llama", &[]).await;
    let alone =
        run_to_end(&mut shard.client, 0, vec![request(0, LONG, 8), request(1, "hello there", 4)]).await;
    let (mut first, mut second) = (Collected::default(), Collected::default());
    let answer =
        shard.client.prefill(prefill(5, vec![on_slots(request(7, LONG, 8), 1..200)], None)).await.unwrap();
    first.add(7, &answer.into_inner().generations);
    let mut newer = on_slots(request(8, "hello there", 4), 300..400);
    newer.chunk_len = Some(2);
    let answer = shard.client.prefill(prefill(6, vec![newer], Some(5))).await.unwrap().into_inner();
    first.add(7, &answer.generations);
    assert_eq!(answer.generations.len(), 1, "the new one is in mid-prefill");
    let batch = answer.batch.unwrap();
    assert_eq!((batch.id, batch.request_ids.as_slice(), batch.size), (5, [7, 8].as_slice(), 2));
    assert!(answer.concat_ns.is_some());
    let gone = shard.client.decode(decode(&[6])).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "the new batch's id has disappeared");
    let mut cached = Some(batch);
    while let Some(batch) = cached {
        let answer = shard.client.decode(decode(&[batch.id])).await.unwrap().into_inner();
        first.add(7, &answer.generations);
        second.add(8, &answer.generations);
        // Ended requests stay listed until they are filtered out.
        assert!(answer.batch.as_ref().is_none_or(|batch| batch.request_ids == [7, 8]));
        cached = answer.batch;
    }
    assert_eq!([first, second], [alone[0].clone(), alone[1].clone()]);
    shard.finish().await;
}

#[tokio::test]
async fn decode_concatenates_two_batches() {
    let mut shard = TestShard::start("llama", &[]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 6), request(1, "hello", 3)]).await;
    let (mut first, mut second) = (Collected::default(), Collected::default());
    let answer =
        shard.client.prefill(prefill(1, vec![request(0, LONG, 6)], None)).await.unwrap().into_inner();
    first.add(0, &answer.generations);
    let answer =
        shard.client.prefill(prefill(2, vec![request(1, "hello", 3)], None)).await.unwrap().into_inner();
    second.add(1, &answer.generations);
    let answer = shard.client.decode(decode(&[1, 2])).await.unwrap().into_inner();
    assert!(answer.concat_ns.is_some());
    let mut cached = answer.batch;
    let mut generations = answer.generations;
    loop {
        first.add(0, &generations);
        second.add(1, &generations);
        let Some(batch) = cached else { break };
        assert_eq!(batch.id, 1);
        let answer = shard.client.decode(decode(&[1])).await.unwrap().into_inner();
        (generations, cached) = (answer.generations, answer.batch);
    }
    assert_eq!([first, second], [alone[0].clone(), alone[1].clone()]);
    shard.finish().await;
}

#[tokio::test]
async fn filter_keeps_the_listed_in_order_in_prefill_and_in_decode() {
    let mut shard = TestShard::start("llama", &["--max-batch-prefill-tokens", "12"]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 5)]).await;
    let mut requests: Vec<v3::Request> = (1..5).map(|id| request(id, LONG, 5)).collect();
    requests[3].chunk_len = Some(4);
    let answer = shard.client.prefill(prefill(3, requests, None)).await.unwrap().into_inner();
    let mut collected = Collected::default();
    let leased = shard.stats().await.n_leased;
    // 99 was never there, 3 is named twice.
    let kept =
        shard.client.filter_batch(filter(3, &[4, 99, 3, 3])).await.unwrap().into_inner().batch.unwrap();
    assert_eq!((kept.id, kept.request_ids.as_slice(), kept.size), (3, [4, 3].as_slice(), 2));
    assert_eq!(shard.stats().await.n_leased, leased / 2);
    assert_eq!(answer.generations.len(), 3);
    loop {
        let answer = shard.client.decode(decode(&[3])).await.unwrap().into_inner();
        collected.add(4, &answer.generations);
        if answer.batch.is_none() {
            break;
        }
    }
    assert_eq!(collected, alone[0]);
    assert_eq!(shard.client.filter_batch(filter(3, &[4])).await.unwrap_err().code(), Code::NotFound);
    shard.client.prefill(prefill(4, vec![request(6, LONG, 5)], None)).await.unwrap();
    let empty = shard.client.filter_batch(filter(4, &[])).await.unwrap_err();
    assert_eq!(empty.code(), Code::InvalidArgument);
    shard.client.decode(decode(&[4])).await.expect("the batch is still there");
    shard.finish().await;
}

#[tokio::test]
async fn a_failed_prefill_takes_the_batch_it_was_to_merge_with() {
    let mut shard = TestShard::start("llama", &[]).await;
    for bad in [
        prefill(2, vec![], Some(1)),
        v3::PrefillRequest { batch: None, ..prefill(2, vec![], Some(1)) },
        prefill(2, vec![request(1, "hi", 3)], Some(1)),
    ] {
        shard.client.prefill(prefill(1, vec![request(1, LONG, 9)], None)).await.unwrap();
        shard.client.prefill(bad).await.unwrap_err();
        assert_eq!(shard.client.decode(decode(&[1])).await.unwrap_err().code(), Code::NotFound);
        assert_eq!(shard.stats().await.n_leased, 0);
    }
    shard.client.prefill(prefill(2, vec![request(1, "hi", 3)], Some(1))).await.unwrap_err();
    assert_eq!(shard.stats().await.n_batches, 0, "nothing of the new one stays either");
    shard.finish().await;
}

#[tokio::test]
async fn a_draw_repeats_with_its_seed_and_only_a_draw_has_one() {
    let mut shard = TestShard::start("llama", &[]).await;
    let drawn = |id: u64, seed| {
        let mut request = request(id, LONG, 12);
        let parameters =
            v3::NextTokenChooserParameters { do_sample: true, seed, temperature: 1.3, ..greedy() };
        request.parameters = Some(parameters);
        request
    };
    let alone = run_to_end(&mut shard.client, 0, vec![drawn(0, 5)]).await;
    assert_eq!(alone[0].end.as_ref().unwrap().seed, Some(5));
    let together =
        run_to_end(&mut shard.client, 1, vec![drawn(1, 6), drawn(2, 5), request(3, LONG, 12), drawn(4, 7)])
            .await;
    assert_eq!(together[1], alone[0]);
    assert_ne!(together[0].ids, alone[0].ids);
    assert_eq!(together[2].end.as_ref().unwrap().seed, None);
    let mut on_temperature = request(9, LONG, 3);
    on_temperature.parameters =
        Some(v3::NextTokenChooserParameters { temperature: 0.9, seed: 3, ..greedy() });
    let sampled = run_to_end(&mut shard.client, 2, vec![on_temperature]).await;
    assert_eq!(sampled[0].end.as_ref().unwrap().seed, Some(3), "any warper makes it a draw");
    shard.finish().await;
}

#[tokio::test]
async fn alternatives_and_stop_sequences() {
    let mut shard = TestShard::start("llama", &[]).await;
    let mut wide = request(0, LONG, 4);
    wide.top_n_tokens = 5;
    let answer = shard.client.prefill(prefill(0, vec![wide], None)).await.unwrap().into_inner();
    let generation = &answer.generations[0];
    let top = &generation.top_tokens[0];
    assert_eq!((generation.top_tokens.len(), top.ids.len()), (1, 5));
    assert_eq!(top.ids[0], generation.tokens.as_ref().unwrap().ids[0], "greedy takes the likeliest");
    assert!(top.logprobs.windows(2).all(|pair| pair[0] >= pair[1]));
    assert!(generation.prefill_tokens.is_none(), "prompt log-probabilities are off unless enabled");
    let free = run_to_end(&mut shard.client, 1, vec![request(1, LONG, 12)]).await;
    let text = &free[0].text;
    let cut = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[..cut].chars().rev().take(3).collect::<Vec<_>>().into_iter().rev().collect();
    let mut stopped = request(2, LONG, 12);
    stopped.stopping_parameters.as_mut().unwrap().stop_sequences = vec![stop.clone()];
    let stopped = run_to_end(&mut shard.client, 2, vec![stopped]).await;
    if stopped[0].text.ends_with(&stop) {
        assert_eq!(stopped[0].end.as_ref().unwrap().finish_reason(), v3::FinishReason::StopSequence);
        assert!(stopped[0].ids.len() < 12);
    }
    assert!(free[0].ids.starts_with(&stopped[0].ids));
    shard.finish().await;
}

#[tokio::test]
async fn prompt_logprobs_when_enabled_come_once_whole_over_chunks() {
    let flags = ["--enable-prefill-logprobs", "--max-batch-prefill-tokens", "9"];
    let mut shard = TestShard::start("llama", &flags).await;
    let mut whole = request(0, LONG, 2);
    whole.prefill_logprobs = true;
    let answer = shard.client.prefill(prefill(0, vec![whole.clone()], None)).await.unwrap().into_inner();
    let expected = answer.generations[0].prefill_tokens.clone().unwrap();
    assert!(expected.logprobs[0].is_nan() && expected.logprobs[1..].iter().all(|logprob| *logprob < 0.0));
    assert_eq!(expected.ids.len(), expected.texts.len());
    shard.client.clear_cache(v3::ClearCacheRequest { id: Some(0) }).await.unwrap();
    whole.chunk_len = Some(5);
    let mut answer = shard.client.prefill(prefill(0, vec![whole], None)).await.unwrap().into_inner();
    while answer.generations.is_empty() {
        let next = shard.client.decode(decode(&[0])).await.unwrap().into_inner();
        (answer.generations, answer.batch) = (next.generations, next.batch);
    }
    let chunked = answer.generations[0].prefill_tokens.clone().unwrap();
    assert_eq!(chunked.ids, expected.ids);
    for (chunked, expected) in chunked.logprobs.iter().zip(&expected.logprobs).skip(1) {
        assert!((chunked - expected).abs() < 1e-4);
    }
    let next = shard.client.decode(decode(&[0])).await.unwrap().into_inner();
    assert!(next.generations[0].prefill_tokens.is_none());
    shard.finish().await;
}

#[tokio::test]
async fn truncation_is_from_the_left_and_keeps_the_beginning_of_text() {
    let shard = TestShard::start("llama", &["--enable-prefill-logprobs"]).await;
    let prompt_ids = |mut request: v3::Request| {
        request.prefill_logprobs = true;
        let mut client = shard.client.clone();
        async move {
            let answer = client.prefill(prefill(3, vec![request], None)).await.unwrap().into_inner();
            answer.generations[0].prefill_tokens.clone().unwrap().ids
        }
    };
    let whole = prompt_ids(request(0, LONG, 1)).await;
    let mut cut = request(1, LONG, 1);
    cut.truncate = 6;
    let cut = prompt_ids(cut).await;
    assert_eq!(cut.len(), 6);
    assert_eq!(cut[0], 1, "BOS stays");
    assert_eq!(cut[1..], whole[whole.len() - 5..]);
    let mut bare = request(2, LONG, 1);
    bare.add_special_tokens = false;
    assert_eq!(prompt_ids(bare).await, whole[1..]);
    shard.finish().await;
}

#[tokio::test]
async fn large_requests_pass_and_answers_stay_small() {
    let mut shard = TestShard::start("llama", &["--enable-prefill-logprobs"]).await;
    let mut large = request(0, "hello", 2);
    large.inputs = "x".repeat(6 << 20);
    let image = v3::Image { data: vec![7; 5 << 20], mimetype: "image/png".into() };
    let image = v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Image(image)) };
    large.input_chunks.as_mut().unwrap().chunks.push(image);
    let collected = run_to_end(&mut shard.client, 0, vec![large]).await;
    let plain = run_to_end(&mut shard.client, 1, vec![request(0, "hello", 2)]).await;
    assert_eq!(collected, plain, "a text model ignores images");
    shard.finish().await;
}

#[tokio::test]
async fn health_answers_during_a_long_prefill_and_a_probe_disturbs_nobody() {
    let mut shard = TestShard::start("llama", &["--pool-tokens", "40000", "--own-slots", "30000"]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 10)]).await;
    let mut other = shard.connect().await;
    // Enough work for the check below to fall into it: 60 prompts of 500 tokens.
    let long: Vec<v3::Request> = (10..70)
        .map(|id| {
            let mut long = request(id, &LONG.repeat(12), 2);
            long.truncate = 500;
            long
        })
        .collect();
    let busy = tokio::spawn(async move { other.prefill(prefill(5, long, None)).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(5)).await;
    let mut healthy_while_busy = 0;
    while !busy.is_finished() {
        shard.client.health(v3::HealthRequest {}).await.unwrap();
        healthy_while_busy += 1;
    }
    // One that waits for the step is answered with it, and no second one is asked.
    assert!(healthy_while_busy > 2, "{healthy_while_busy} answers during the step");
    busy.await.unwrap();
    let mut probe = request(u64::MAX, "liveness", 1);
    (probe.truncate, probe.add_special_tokens) = (1, false);
    let probe = on_slots(probe, [0]);
    let mut client = shard.connect().await;
    let probing = tokio::spawn(async move {
        for _ in 0..20 {
            let answer =
                client.prefill(prefill(u64::MAX, vec![probe.clone()], None)).await.unwrap().into_inner();
            assert!(answer.batch.is_none() && answer.generations.len() == 1);
        }
    });
    let beside = run_to_end(&mut shard.client, 7, vec![on_slots(request(1, LONG, 10), 9000..9200)]).await;
    probing.await.unwrap();
    assert_eq!(beside, alone);
    shard.finish().await;
}

#[tokio::test]
async fn when_lanes_run_out_the_router_is_told_and_requests_wait() {
    let mut shard =
        TestShard::start("llama", &["--max-lanes", "3", "--max-batch-prefill-tokens", "200"]).await;
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, "hello there", 4)]).await;
    let requests: Vec<v3::Request> = (1..6).map(|id| request(id, "hello there", 4)).collect();
    let answer = shard.client.prefill(prefill(1, requests, None)).await.unwrap().into_inner();
    assert!(answer.generations.len() < 5);
    assert_eq!(answer.batch.as_ref().unwrap().current_tokens, 200, "the whole prefill budget");
    // A probe still runs.
    let probe = on_slots(request(u64::MAX, "liveness", 1), [0]);
    let probed = shard.client.prefill(prefill(u64::MAX, vec![probe], None)).await.unwrap().into_inner();
    assert_eq!(probed.generations.len(), 1);
    let mut collected = vec![Collected::default(); 5];
    let (mut generations, mut cached) = (answer.generations, answer.batch);
    loop {
        (1..6).zip(&mut collected).for_each(|(id, collected)| collected.add(id, &generations));
        let Some(batch) = cached else { break };
        let answer = shard.client.decode(decode(&[batch.id])).await.unwrap().into_inner();
        (generations, cached) = (answer.generations, answer.batch);
    }
    assert!(collected.iter().all(|collected| *collected == alone[0]));
    shard.finish().await;
}

#[tokio::test]
async fn the_benchmark_tools_way_of_calling() {
    // No Warmup, no slots, batch id 0 again and again, more prompt tokens than the budget, all end together.
    let mut shard = TestShard::start("llama", &["--max-batch-prefill-tokens", "20"]).await;
    shard.client.clear_cache(v3::ClearCacheRequest { id: None }).await.unwrap();
    for run in 0..3 {
        let requests: Vec<v3::Request> = (0..8)
            .map(|id| {
                let mut request = request(id, LONG, 5);
                request.truncate = 15;
                request
            })
            .collect();
        let answer = shard.client.prefill(prefill(0, requests, None)).await.unwrap().into_inner();
        assert_eq!(answer.generations.len(), 8, "Prefill must not return early");
        if run == 1 {
            continue; // The tool may leave a run unfinished; the id comes again.
        }
        for step in 1..5 {
            let answer = shard.client.decode(decode(&[0])).await.unwrap().into_inner();
            assert_eq!(answer.generations.len(), 8);
            assert_eq!(answer.batch.is_none(), step == 4);
        }
    }
    shard.finish().await;
}

#[tokio::test]
async fn own_requests_keep_to_their_reserve_once_a_router_is_there() {
    let mut shard = TestShard::start("llama", &["--pool-tokens", "700", "--own-slots", "100"]).await;
    // Alone, a caller without slots may use the whole pool.
    let many: Vec<v3::Request> = (0..3)
        .map(|id| {
            let mut r = request(id, &LONG.repeat(4), 50);
            r.truncate = 150;
            r
        })
        .collect();
    shard.client.prefill(prefill(0, many.clone(), None)).await.unwrap();
    let leased = shard.stats().await.n_leased;
    assert!(leased > 400, "{leased}");
    // A router's slot under such a lease is refused, until it comes back.
    let refused = shard
        .client
        .prefill(prefill(9, vec![on_slots(request(9, "hello", 2), 500..599)], None))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    shard.client.clear_cache(v3::ClearCacheRequest { id: Some(0) }).await.unwrap();
    let expected = run_to_end(&mut shard.client, 9, vec![on_slots(request(9, "hello", 3), 500..599)]).await;
    // From now on the reserve is all there is.
    let status = shard.client.prefill(prefill(0, many, None)).await;
    let answer = status.map(|answer| answer.into_inner().generations.len());
    assert!(matches!(&answer, Err(status) if status.code() == Code::ResourceExhausted), "{answer:?}");
    let own = run_to_end(&mut shard.client, 1, vec![request(1, "hello", 3)]).await;
    assert_eq!(own[0].ids, expected[0].ids);
    shard.finish().await;
}

#[tokio::test]
async fn the_older_protocol_beside_the_newer_one() {
    let mut shard = TestShard::start("llama", &[]).await;
    let mut older = shard.client_v2().await;
    let info = older.info(v2::InfoRequest {}).await.unwrap().into_inner();
    assert!(!info.requires_padding);
    let parameters = v2::NextTokenChooserParameters {
        temperature: 1.0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        ..Default::default()
    };
    let stopping =
        v2::StoppingCriteriaParameters { max_new_tokens: 4, ignore_eos_token: true, ..Default::default() };
    let old_request = |id: u64| v2::Request {
        id,
        inputs: LONG.into(),
        truncate: 512,
        parameters: Some(parameters.clone()),
        stopping_parameters: Some(stopping.clone()),
        ..Default::default()
    };
    let batch = |id| v2::Batch { id, size: 1, requests: vec![old_request(id)], ..Default::default() };
    let warm = v2::WarmupRequest {
        batch: Some(batch(0)),
        max_input_length: 100,
        max_prefill_tokens: 200,
        max_total_tokens: 200,
    };
    let capacity = older.warmup(warm).await.unwrap().into_inner();
    assert_eq!(capacity.max_supported_total_tokens, Some(1024));
    let alone = run_to_end(&mut shard.client, 0, vec![request(0, LONG, 4)]).await;
    // The same batch number in both protocols names two batches.
    shard.client.prefill(prefill(3, vec![request(3, "hi", 9)], None)).await.unwrap();
    let answer = older.prefill(v2::PrefillRequest { batch: Some(batch(3)) }).await.unwrap().into_inner();
    let mut ids = answer.generations[0].tokens.clone().unwrap().ids;
    let mut end = None;
    while end.is_none() {
        let handle = v2::CachedBatch { id: 3, ..Default::default() };
        let answer = older.decode(v2::DecodeRequest { batches: vec![handle] }).await.unwrap().into_inner();
        ids.extend(answer.generations[0].tokens.clone().unwrap().ids);
        end = answer.generations[0].generated_text.clone();
        assert_eq!(answer.batch.is_none(), end.is_some());
    }
    assert_eq!((ids, end.unwrap().text), (alone[0].ids.clone(), alone[0].end.clone().unwrap().text));
    shard.client.decode(decode(&[3])).await.unwrap();
    shard.finish().await;
}
