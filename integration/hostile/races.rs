//! Calls that meet: from two connections, or with a number that is still in use.

use kvshard::pb::v3;
use tonic::{Code, Status};

use super::{Witness, known};
use crate::support::shard::{Client, decode, on_slots, prefill, run_to_end};

/// Sends two Prefills at once.
async fn race(
    clients: &mut [Client; 2],
    calls: [v3::PrefillRequest; 2],
) -> [Result<v3::PrefillResponse, Status>; 2] {
    let [first, second] = clients;
    let [one, other] = calls;
    let (one, other) = tokio::join!(first.prefill(one), second.prefill(other));
    [one, other].map(|answer| answer.map(tonic::Response::into_inner))
}

async fn clear(client: &mut Client, ids: &[u64]) {
    for &id in ids {
        client.clear_cache(v3::ClearCacheRequest { id: Some(id) }).await.unwrap();
    }
}

#[tokio::test]
async fn two_prefills_from_two_connections() {
    let mut witness = Witness::start(&[]).await;
    let mut clients = [witness.shard.connect().await, witness.shard.connect().await];
    for round in 0..8 {
        let answers = race(&mut clients, [8, 9].map(|id| prefill(id, vec![known(id)], None))).await;
        for (id, answer) in [8, 9].into_iter().zip(answers) {
            assert_eq!(answer.unwrap().batch.unwrap().request_ids, [id], "round {round}");
        }
        clear(&mut clients[0], &[8, 9]).await;
        witness.check("two batches at once").await;

        let wanted = |id: u64, first: u32| prefill(id, vec![on_slots(known(id), first..first + 200)], None);
        let answers = race(&mut clients, [wanted(8, 400), wanted(9, 420)]).await;
        let refused: Vec<Code> =
            answers.iter().filter_map(|answer| Some(answer.as_ref().err()?.code())).collect();
        assert_eq!(refused, [Code::ResourceExhausted], "one of them gets slots that both want");
        clear(&mut clients[0], &[8, 9]).await;
        witness.check("two batches on the same slots").await;

        // One number for two batches: the later one replaces the earlier.
        let answers = race(&mut clients, [7, 8].map(|request| prefill(6, vec![known(request)], None))).await;
        assert!(answers.iter().all(Result::is_ok));
        let left = clients[0].decode(decode(&[6])).await.unwrap().into_inner();
        assert_eq!(left.generations.len(), 1);
        clear(&mut clients[1], &[6]).await;
        witness.check("two batches by the same number").await;
    }
    witness.finish().await;
}

#[tokio::test]
async fn probes_race_with_everything() {
    let mut witness = Witness::start(&["--max-lanes", "2"]).await;
    let probe = |truncate, slots: &[u32]| {
        let mut probe = crate::support::shard::request(u64::MAX, "liveness", 1);
        (probe.truncate, probe.add_special_tokens) = (truncate, truncate > 1);
        prefill(u64::MAX, vec![on_slots(probe, slots.iter().copied())], None)
    };
    let mut clients = [witness.shard.connect().await, witness.shard.connect().await];
    let sixteen: Vec<u32> = (0..16).collect();
    for calls in [
        [probe(1, &[0]), probe(1, &[0])],
        [probe(10, &sixteen), probe(10, &sixteen)],
        [probe(1, &[0]), prefill(9, vec![known(9)], None)],
    ] {
        for answer in race(&mut clients, calls).await {
            assert_eq!(answer.unwrap().generations.len(), 1);
        }
        clear(&mut clients[0], &[9]).await;
        witness.check("a race of probes").await;
    }
    witness.finish().await;
}

#[tokio::test]
async fn a_batch_id_that_comes_again_replaces_what_it_named() {
    let mut witness = Witness::start(&[]).await;
    let client = &mut witness.shard.client;
    let mut long = on_slots(known(8), 300..500);
    long.stopping_parameters.as_mut().unwrap().max_new_tokens = 50;
    client.prefill(prefill(8, vec![long], None)).await.unwrap();
    // On the very slots of the one it replaces.
    let again = run_to_end(client, 8, vec![on_slots(known(9), 300..500)]).await;
    assert_eq!(again, [witness.known.clone()]);
    witness.check("a batch id that came again").await;
    // A refused call replaces nothing.
    let client = &mut witness.shard.client;
    client.prefill(prefill(8, vec![known(8)], None)).await.unwrap();
    client.prefill(prefill(8, vec![], None)).await.unwrap_err();
    client.decode(decode(&[8])).await.unwrap();
    clear(client, &[8]).await;
    witness.check("a refused batch by a known number").await;
    witness.finish().await;
}

#[tokio::test]
async fn a_warmup_that_fails_half_way_leaves_a_shard_that_serves() {
    let mut witness = Witness::start(&[]).await;
    let client = &mut witness.shard.client;
    let long = |id| {
        let mut request = crate::support::shard::request(id, &"jumps ".repeat(400), 1);
        request.truncate = 500;
        request
    };
    // More than the pool has, in a single step.
    let call = v3::WarmupRequest {
        batch: prefill(0, (0..40).map(long).collect(), None).batch,
        max_input_tokens: None,
        max_prefill_tokens: 1024,
        max_total_tokens: None,
    };
    let status = client.warmup(call).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    // It starts afresh, so the running batch is gone.
    assert_eq!(client.decode(decode(&[super::RUNNING])).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(run_to_end(client, 0, vec![known(0)]).await, [witness.known.clone()]);
    let stats = witness.shard.stats().await;
    assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0));
    witness.shard.finish().await;
}
