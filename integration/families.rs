//! Every family through the whole engine: a request's answer is its own, alone, in company, in chunks, after a cached
//! prefix and on several ranks. `invariance.rs` goes deeper with a few of them.

use std::collections::BTreeSet;

use crate::invariance::{OPTIONS, alike, same};
use crate::support::driver::{Asked, Driver, all};
use crate::support::golden::Golden;
use crate::support::{EngineOptions, start_engine};

/// Distinct tokens in the answers, below which equality proves little.
const LIVELY: usize = 20;

fn check(name: &str, worlds: &[usize]) {
    let golden = Golden::open(name);
    let drive = |options| Driver::new(start_engine(&golden.folder, options));
    let asked = all();
    let expected = drive(EngineOptions { run_ahead: false, ..OPTIONS }).alone(&asked);
    let distinct: BTreeSet<u32> = expected.iter().flat_map(|got| got.ids.clone()).collect();
    assert!(distinct.len() > LIVELY, "{name}: {} distinct tokens", distinct.len());
    let mut driver = drive(OPTIONS);
    same(&driver.alone(&asked), &expected, &format!("{name} run ahead"));
    same(&driver.together(&asked), &expected, &format!("{name} together"));
    same(&driver.one_after_the_other(&asked), &expected, &format!("{name} joining"));
    for (asked, expected) in long(&asked, &expected) {
        let len = asked.prompt.len() as u32;
        for (n_shared, chunk_len) in [(len / 2, None), (len, Some(2))] {
            let got = driver.cached(asked, n_shared, n_shared.min(len - 1), chunk_len);
            let what = format!("{name}: {n_shared} of {len} cached, chunks of {chunk_len:?}");
            same(&[got], std::slice::from_ref(expected), &what);
        }
    }
    let options = EngineOptions { max_prefill_tokens: 5, max_step_tokens: 16, ..OPTIONS };
    let mut driver = drive(options);
    same(&driver.together(&asked), &expected, &format!("{name} together in chunks of 5"));
    same(&driver.one_after_the_other(&asked), &expected, &format!("{name} joining by 5"));
    for &n_ranks in worlds {
        let mut driver = drive(EngineOptions { n_ranks, ..OPTIONS });
        let on_ranks = driver.alone(&asked);
        alike(&on_ranks, &expected, &format!("{name} on {n_ranks} ranks"));
        same(&driver.together(&asked), &on_ranks, &format!("{name} together on {n_ranks} ranks"));
        for (asked, expected) in long(&asked, &on_ranks) {
            let got = driver.cached(asked, 7, 7, None);
            same(&[got], std::slice::from_ref(expected), &format!("{name} cached on {n_ranks} ranks"));
        }
    }
}

/// The requests whose prompts can be shared in part, and their answers.
fn long<'a, T>(asked: &'a [Asked], answers: &'a [T]) -> impl Iterator<Item = (&'a Asked, &'a T)> {
    asked.iter().zip(answers).filter(|(asked, _)| asked.prompt.len() > 8)
}

/// A test for each fixture whose family or variant `invariance.rs` has not, on numbers of ranks beside one.
macro_rules! families {
    ($($test:ident: $fixture:literal on $worlds:expr;)+) => {
        $(#[test]
        fn $test() {
            check($fixture, &$worlds);
        })+
    };
}

families! {
    yi: "yi" on [2, 4];
    internlm: "internlm" on [2, 4];
    mixtral: "mixtral" on [2, 4];
    qwen3: "qwen3" on [2, 4];
    qwen3_with_experts: "qwen3-moe" on [2, 4];
    deepseek_v2: "deepseek-v2" on [2, 4];
    deepseek_v3: "deepseek-v3" on [2, 4];
    gemma2: "gemma2" on [2, 4];
    phi3: "phi3" on [2, 4];
    phi3_with_two_sets_of_frequencies: "phi3-longrope" on [2, 4];
    phi4_mini: "phi4-mini" on [2, 4];
    stablelm: "stablelm" on [2, 4];
    stablelm_in_parallel: "stablelm-parallel" on [2, 4];
    minicpm: "minicpm" on [2, 4];
    granite: "granite" on [2, 4];
    baichuan_7b: "baichuan-7b" on [2, 4];
    baichuan2_7b: "baichuan2-7b" on [2, 4];
    baichuan2_13b: "baichuan2-13b" on [2];
    chatglm2: "chatglm2" on [2, 4];
    starcoder2: "starcoder2" on [2, 4];
    falcon_7b: "falcon" on [];
}
