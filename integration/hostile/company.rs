//! One request's fault among others: the culprit ends alone, with a text that says why.

use kvshard::pb::v3;

use super::{RUNNING, Witness, known};
use crate::support::shard::{Collected, decode, on_slots, prefill};

const CULPRIT: u64 = 66;

/// What a request may be at fault of, and what its end says of it.
fn culprits() -> Vec<(&'static str, v3::Request)> {
    fn changed(change: impl FnOnce(&mut v3::Request)) -> v3::Request {
        let mut request = known(CULPRIT);
        change(&mut request);
        request
    }
    let grammar = |kind: v3::GrammarType| {
        changed(|request| {
            let parameters = request.parameters.as_mut().unwrap();
            parameters.grammar = "[a-z]+".into();
            parameters.set_grammar_type(kind);
        })
    };
    let empty = |request: &mut v3::Request| {
        (request.add_special_tokens, request.inputs, request.input_chunks) = (false, String::new(), None);
    };
    let stopping = |request: &mut v3::Request| {
        request.stopping_parameters.as_mut().unwrap().stop_sequences = vec![String::new()];
    };
    vec![
        ("regex", grammar(v3::GrammarType::Regex)),
        ("JSON", grammar(v3::GrammarType::Json)),
        (
            "temperature is NaN",
            changed(|request| request.parameters.as_mut().unwrap().temperature = f32::NAN),
        ),
        ("empty after tokenization", changed(empty)),
        ("truncate is 0", changed(|request| request.truncate = 0)),
        ("stop sequence is empty", changed(stopping)),
        (
            "the limit is 512",
            changed(|request| request.stopping_parameters.as_mut().unwrap().max_new_tokens = 600),
        ),
        ("slot 0 ", on_slots(known(CULPRIT), 0..200)),
        ("slot 1023 is there twice", on_slots(known(CULPRIT), (700..800).chain([1023, 1023]))),
        ("slot 5 at position 0 is held by a live request", on_slots(known(CULPRIT), 5..200)),
    ]
}

/// Checks the culprit's only news.
fn check_end(generations: &[v3::Generation], why: &str) {
    let mut culprit = Collected::default();
    culprit.add(CULPRIT, generations);
    let end = culprit.end.unwrap_or_else(|| panic!("{why}: the culprit runs"));
    assert_eq!(end.generated_tokens, 1);
    assert_eq!(end.text, culprit.text, "who streams and who waits read the same");
    assert!(end.text.contains(why), "{why:?} is not in {:?}", end.text);
}

#[tokio::test]
async fn a_culprit_among_new_requests_ends_alone() {
    let mut witness = Witness::start(&[]).await;
    for (why, culprit) in culprits() {
        for order in [[CULPRIT, 67], [67, CULPRIT]] {
            let requests = order.map(|id| if id == CULPRIT { culprit.clone() } else { known(id) });
            let client = &mut witness.shard.client;
            let answer = client.prefill(prefill(9, requests.to_vec(), None)).await.unwrap().into_inner();
            check_end(&answer.generations, why);
            let (mut good, mut generations, mut cached) =
                (Collected::default(), answer.generations, answer.batch);
            assert_eq!(cached.as_ref().unwrap().request_ids, [67]);
            loop {
                good.add(67, &generations);
                let Some(batch) = cached else { break };
                let answer = client.decode(decode(&[batch.id])).await.unwrap().into_inner();
                (generations, cached) = (answer.generations, answer.batch);
            }
            assert_eq!(good, witness.known, "beside {why}");
            witness.check(why).await;
        }
    }
    witness.finish().await;
}

#[tokio::test]
async fn a_culprit_merged_with_a_running_batch_ends_alone() {
    let mut witness = Witness::start(&[]).await;
    for (why, culprit) in culprits() {
        // Alone among the new ones, and beside a good one.
        for good in [None, Some(67)] {
            let requests = good.map(known).into_iter().chain([culprit.clone()]).collect();
            let client = &mut witness.shard.client;
            let answer = client.prefill(prefill(9, requests, Some(RUNNING))).await.unwrap().into_inner();
            check_end(&answer.generations, why);
            witness.running.add(RUNNING, &answer.generations);
            let listed: Vec<u64> = [RUNNING].into_iter().chain(good).collect();
            assert_eq!(answer.batch.as_ref().map(|batch| &batch.request_ids), Some(&listed));
            let Some(good) = good else { continue };
            let (mut collected, mut generations) = (Collected::default(), answer.generations);
            loop {
                collected.add(good, &generations);
                if collected.end.is_some() {
                    break;
                }
                let answer = client.decode(decode(&[RUNNING])).await.unwrap().into_inner();
                witness.running.add(RUNNING, &answer.generations);
                generations = answer.generations;
            }
            assert_eq!(collected, witness.known, "beside {why}");
            let filter = crate::support::shard::filter(RUNNING, &[RUNNING]);
            client.filter_batch(filter).await.unwrap();
        }
        witness.check(why).await;
    }
    witness.finish().await;
}
