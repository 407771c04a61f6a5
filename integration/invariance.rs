//! A request's answer is its own, through the whole engine: alone, batched, in chunks, with a cached prefix, after
//! others have been filtered out, run ahead or not, and on several ranks it gets the same tokens. On one rank
//! log-probabilities have the same bits too; ranks sum in another order.

use std::collections::BTreeSet;

use kvshard::backend::step::SamplingParams;
use kvshard::engine::Placement;
use kvshard::ids::Protocol;

use crate::support::driver::{Asked, Driver, Got, all, prompt};
use crate::support::golden::Golden;
use crate::support::{EngineOptions, start_engine};

pub const OPTIONS: EngineOptions = EngineOptions {
    n_ranks: 1,
    n_slots: 2000,
    own_slots: 1000,
    n_lanes: 16,
    max_prefill_tokens: 1000,
    max_step_tokens: 1000,
    run_ahead: true,
};

fn drive(golden: &Golden, options: EngineOptions) -> Driver {
    Driver::new(start_engine(&golden.folder, options))
}

pub fn same(got: &[Got], expected: &[Got], what: &str) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got, expected, "request {index}, {what}");
    }
}

/// Ids are equal, numbers nearly.
pub fn alike(got: &[Got], expected: &[Got], what: &str) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.ids, expected.ids, "request {index}, {what}");
        assert_eq!(got.top_ids, expected.top_ids, "request {index}, {what}");
        let numbers = |got: &Got| -> Vec<f32> {
            got.logprobs.iter().chain(&got.top_logprobs).map(|&bits| f32::from_bits(bits)).collect()
        };
        for (got, expected) in numbers(got).into_iter().zip(numbers(expected)) {
            assert!((got - expected).abs() < 1e-3, "request {index}, {what}: {got} and {expected}");
        }
    }
}

/// Together these have every way of positions, attention, blocks and experts.
const FIXTURES: [&str; 13] = [
    "llama",
    "qwen2",
    "mistral",
    "llama-dynamic",
    "llama-longrope",
    "bloom",
    "gpt-bigcode",
    "qwen",
    "cohere-qk-norm",
    "falcon-groups",
    "gemma3",
    "gpt-oss",
    "deepseek-v2-lite",
];

#[test]
fn company_changes_nothing() {
    for name in FIXTURES {
        let (golden, asked) = (Golden::open(name), all());
        let expected = drive(&golden, EngineOptions { run_ahead: false, ..OPTIONS }).alone(&asked);
        let mut driver = drive(&golden, OPTIONS);
        let distinct: BTreeSet<u32> = expected.iter().flat_map(|got| got.ids.clone()).collect();
        assert!(distinct.len() > 20, "{name}: a model that always says the same proves nothing");
        let lengths = expected.iter().map(|got| got.ids.len() as u32);
        assert!(lengths.eq(asked.iter().map(|asked| asked.max_new_tokens)));
        same(&driver.alone(&asked), &expected, "alone, run ahead");
        same(&driver.together(&asked), &expected, "together");
        same(&driver.one_after_the_other(&asked), &expected, "one after the other");
        for part in asked.chunks(3).zip(expected.chunks(3)) {
            same(&driver.after_filter(part.0, &asked), part.1, "after others were filtered out");
        }
        let stats = driver.runtime.block_on(driver.engine.check_integrity()).unwrap();
        assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0));
    }
}

#[test]
fn chunks_change_nothing() {
    for name in FIXTURES {
        let (golden, asked) = (Golden::open(name), all());
        let expected = drive(&golden, OPTIONS).alone(&asked);
        for size in [1, 3, 16, 31] {
            let options =
                EngineOptions { max_prefill_tokens: size, max_step_tokens: size.max(16), ..OPTIONS };
            let mut driver = drive(&golden, options);
            same(&driver.alone(&asked), &expected, &format!("{name}, chunks of {size}"));
            same(&driver.together(&asked), &expected, &format!("{name}, together in chunks of {size}"));
            same(&driver.one_after_the_other(&asked), &expected, &format!("{name}, joining by {size}"));
        }
    }
}

#[test]
fn a_cached_prefix_changes_nothing() {
    for name in FIXTURES {
        let mut driver = drive(&Golden::open(name), OPTIONS);
        let asked: Vec<Asked> = all().into_iter().filter(|asked| asked.prompt.len() > 8).collect();
        let expected = driver.alone(&asked);
        for (asked, expected) in asked.iter().zip(&expected) {
            let len = asked.prompt.len() as u32;
            for n_shared in [1, len / 2, len - 1, len] {
                for claimed in [0, n_shared.min(len - 1), len - 1] {
                    for chunk_len in [None, Some(2)] {
                        let got = driver.cached(asked, n_shared, claimed, chunk_len);
                        let what = format!("{name}: {n_shared} of {len} cached, {claimed} claimed");
                        same(&[got], std::slice::from_ref(expected), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn ranks_change_no_token() {
    for name in FIXTURES {
        let (golden, asked) = (Golden::open(name), all());
        let expected = drive(&golden, OPTIONS).alone(&asked);
        // BLOOM's six heads do not divide among four.
        for n_ranks in [2, 4].into_iter().filter(|&n_ranks| name != "bloom" || n_ranks < 4) {
            let mut driver = drive(&golden, EngineOptions { n_ranks, ..OPTIONS });
            let on_ranks = driver.alone(&asked);
            alike(&on_ranks, &expected, &format!("{name} on {n_ranks} ranks"));
            // Among themselves they are as one rank is.
            same(&driver.together(&asked), &on_ranks, &format!("{name} together on {n_ranks} ranks"));
            same(
                &driver.one_after_the_other(&asked),
                &on_ranks,
                &format!("{name} joining on {n_ranks} ranks"),
            );
            let long = asked.iter().zip(&on_ranks).filter(|(asked, _)| asked.prompt.len() > 20);
            for (asked, expected) in long {
                let got = driver.cached(asked, 20, 20, None);
                same(&[got], std::slice::from_ref(expected), &format!("{name} cached on {n_ranks} ranks"));
            }
        }
    }
}

/// Where keys depend on the length of the sequence (two fixtures change theirs beyond 64 tokens) or of the prompt (one
/// changes its beyond 32, and again beyond 64), a prefix computed within one length is not that of another, although its
/// tokens are.
#[test]
fn a_prefix_is_not_taken_over_the_border_of_a_position_regime() {
    for name in ["llama-dynamic", "llama-longrope", "qwen", "llama"] {
        let mut driver = drive(&Golden::open(name), OPTIONS);
        let of_len = |len, max_new_tokens| Asked {
            prompt: prompt(1, len),
            sampling: SamplingParams::GREEDY,
            max_new_tokens,
        };
        // The last crosses the border with its output, and so do the tags of what it has stored.
        let lengths = [(63, 1), (64, 1), (65, 1), (66, 9), (90, 5), (50, 40), (64, 20)];
        let asked: Vec<Asked> = lengths.into_iter().map(|(len, new)| of_len(len, new)).collect();
        let expected = driver.alone(&asked);
        // Every one on the same slots after every other, all of the prompt claimed.
        for before in &asked {
            for (asked, expected) in asked.iter().zip(&expected) {
                let clear = driver.engine.clear(Protocol::V3, None);
                driver.runtime.block_on(clear).unwrap();
                let slots = |asked: &Asked| (1..=asked.n_positions()).collect();
                driver.one(before, Placement::Router { slots: slots(before), cache_len: 0 }, None);
                let claimed = Placement::Router { slots: slots(asked), cache_len: 1000 };
                let got = driver.one(asked, claimed, None);
                let what = format!("{name}: {} after {}", asked.prompt.len(), before.prompt.len());
                same(&[got], std::slice::from_ref(expected), &what);
            }
        }
        // A router continues a text: prompt and output of the one before become the prompt.
        let (first, output) = (&asked[5], &expected[5]);
        let continued =
            Asked { prompt: first.prompt.iter().chain(&output.ids).copied().collect(), ..of_len(0, 10) };
        let alone = driver.alone(std::slice::from_ref(&continued));
        let slots = |asked: &Asked| (1..=asked.n_positions()).collect();
        driver.one(first, Placement::Router { slots: slots(first), cache_len: 0 }, None);
        let claimed = Placement::Router { slots: slots(&continued), cache_len: 1000 };
        same(&[driver.one(&continued, claimed, None)], &alone, &format!("{name}: a text continued"));
    }
}
