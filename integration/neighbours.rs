//! Clients without slots beside a live router: they harm nobody, and the router harms them only by the pool's limits.

use kvshard::client::{Ending, generate};
use kvshard::config::Parameters;
use kvshard::pb::v3;
use tonic::Code;

use crate::support::shard::{
    Client, Collected, TestShard, decode, filter, on_slots, prefill, request, run_to_end,
};

const PROMPTS: [&str; 3] =
    ["the quick brown fox jumps", "over the lazy dog and then some more words follow", "hello there"];
/// Pool and reserve: the neighbours have 120 slots, the router 880.
const FLAGS: [&str; 4] = ["--pool-tokens", "1000", "--own-slots", "120"];

fn parameters(max_new_tokens: u32) -> Parameters {
    Parameters {
        max_new_tokens,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        watermark: false,
        top_n: 0,
        do_sample: false,
        seed: 0,
        stop: vec![],
    }
}

/// The requests of a round, each on slots of its own.
fn of_round(round: u64) -> [v3::Request; 3] {
    let on = |index: u64, n_new: u32, first: u32| {
        let request = request(3 * round + index, PROMPTS[index as usize], n_new);
        on_slots(request, first..first + 200)
    };
    [on(0, 14, 1), on(1, 6, 300), on(2, 9, 600)]
}

/// A router's rounds: a batch begins, a second request merges into it in chunks, a third one comes as a batch of its
/// own and is concatenated, those that ended are filtered out.
async fn route(client: &mut Client, n_rounds: u64) -> Vec<[Collected; 3]> {
    let mut rounds = Vec::new();
    for round in 0..n_rounds {
        let mut collected = <[Collected; 3]>::default();
        let [first, mut second, third] = of_round(round);
        second.chunk_len = Some(5);
        let (main, other) = (2 * round, 2 * round + 1);
        let mut steps = vec![client.prefill(prefill(main, vec![first], None)).await.unwrap().into_inner()];
        steps.push(client.prefill(prefill(other, vec![second], Some(main))).await.unwrap().into_inner());
        steps.push(client.prefill(prefill(other, vec![third], None)).await.unwrap().into_inner());
        let mut batches = vec![main, other];
        loop {
            for generations in steps.drain(..).map(|step| step.generations) {
                (0..3).for_each(|index| collected[index].add(3 * round + index as u64, &generations));
            }
            let answer = client.decode(decode(&batches)).await.unwrap().into_inner();
            batches.truncate(1);
            let left = answer.batch.clone();
            steps.push(v3::PrefillResponse { generations: answer.generations, ..Default::default() });
            let Some(batch) = left else { break };
            let ended = |id: &&u64| {
                let index = (**id % 3) as usize;
                let news = steps[0].generations.iter().find(|generation| generation.request_id == **id);
                collected[index].end.is_some() || news.is_some_and(|news| news.generated_text.is_some())
            };
            let keep: Vec<u64> = batch.request_ids.iter().filter(|id| !ended(id)).copied().collect();
            if keep.len() < batch.request_ids.len() {
                client.filter_batch(filter(main, &keep)).await.unwrap();
            }
        }
        for generations in steps.drain(..).map(|step| step.generations) {
            (0..3).for_each(|index| collected[index].add(3 * round + index as u64, &generations));
        }
        rounds.push(collected);
    }
    rounds
}

/// What each of a router's requests gets on an empty shard.
async fn alone(shard: &mut TestShard) -> [Collected; 3] {
    let mut outputs = Vec::new();
    for request in of_round(0) {
        outputs.extend(run_to_end(&mut shard.client, 0, vec![request]).await);
    }
    outputs.try_into().unwrap()
}

#[tokio::test]
async fn one_prompt_clients_and_a_router_do_not_notice_each_other() {
    let mut shard = TestShard::start("llama", &FLAGS).await;
    let expected = alone(&mut shard).await;
    let url = shard.shard.url().to_owned();
    let mut out = Vec::new();
    let lone = generate(&url, PROMPTS[1], &parameters(20), &mut out).await.unwrap();
    assert_eq!((lone.n_tokens, lone.ending), (20, Ending::Length));
    let mut router = shard.connect().await;
    let neighbour = async {
        let mut outputs = Vec::new();
        for _ in 0..6 {
            let mut out = Vec::new();
            outputs.push((generate(&url, PROMPTS[1], &parameters(20), &mut out).await.unwrap(), out));
        }
        outputs
    };
    let (rounds, outputs) = tokio::join!(route(&mut router, 5), neighbour);
    for round in rounds {
        assert_eq!(round, expected);
    }
    for (summary, streamed) in outputs {
        assert_eq!((summary.text.as_str(), summary.n_tokens), (lone.text.as_str(), lone.n_tokens));
        assert_eq!(streamed, out);
    }
    assert_eq!(shard.stats().await.n_batches, 0);
    shard.finish().await;
}

/// Takes own slots until there are none; the batches that hold them.
async fn hoard(client: &mut Client) -> Vec<u64> {
    let mut held = Vec::new();
    for batch in 1 << 40.. {
        match client.prefill(prefill(batch, vec![request(batch, PROMPTS[2], 12)], None)).await {
            Ok(_) => held.push(batch),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                assert!(status.message().contains("slots of the shard's own"), "{status}");
                return held;
            }
        }
    }
    unreachable!()
}

#[tokio::test]
async fn neighbours_that_use_up_the_reserve_leave_the_router_its_slots() {
    let mut shard = TestShard::start("llama", &FLAGS).await;
    let expected = alone(&mut shard).await;
    let url = shard.shard.url().to_owned();
    let (mut router, mut hoarder) = (shard.connect().await, shard.connect().await);
    let greedy = async {
        let held = hoard(&mut hoarder).await;
        assert!(held.len() >= 3, "{} batches", held.len());
        // For another neighbour there is nothing left; it hears so, and keeps nothing.
        let refused = generate(&url, PROMPTS[1], &parameters(20), &mut Vec::new()).await.unwrap_err();
        assert!(refused.to_string().contains("slots"), "{refused}");
        // What is held still runs.
        let answer = hoarder.decode(decode(&held)).await.unwrap().into_inner();
        assert_eq!(answer.generations.len(), held.len());
        held
    };
    let (rounds, held) = tokio::join!(route(&mut router, 4), greedy);
    assert_eq!(shard.stats().await.n_requests as usize, held.len());
    // The reserve is still exhausted, and the router's probes run.
    let mut probe = request(u64::MAX, "liveness", 1);
    (probe.truncate, probe.add_special_tokens) = (1, false);
    let probed = router.prefill(prefill(u64::MAX, vec![on_slots(probe, [0])], None)).await.unwrap();
    assert_eq!(probed.into_inner().generations.len(), 1);
    for round in rounds.into_iter().chain(route(&mut router, 1).await) {
        assert_eq!(round, expected);
    }
    // Concatenated, they are the first one's.
    hoarder.clear_cache(v3::ClearCacheRequest { id: Some(held[0]) }).await.unwrap();
    generate(&url, PROMPTS[1], &parameters(20), &mut Vec::new()).await.unwrap();
    assert_eq!(shard.stats().await.n_leased, 0);
    shard.finish().await;
}
