//! Alone, together, joining, padded, in chunks, on a cached prefix, after others were filtered out: sums are made in
//! another order there, so tokens may differ; each one, scored alone, is the likeliest within the dtype's noise.

use kvshard::backend::step::SamplingParams;
use kvshard::engine::Placement;
use kvshard::model::checkpoint::DType;

use crate::card::{self, Card, DTYPES};
use crate::noise::{Noise, Seen};
use crate::rescore::deficits;
use crate::support::EngineOptions;
use crate::support::driver::{Asked, Driver, Got, all, prompt};

pub const SIZES: EngineOptions = EngineOptions {
    n_ranks: 1,
    n_slots: 2000,
    own_slots: 1000,
    n_lanes: 16,
    max_prefill_tokens: 512,
    max_step_tokens: 512,
    run_ahead: true,
};

/// Greedy requests of many lengths; some cross the length on which the frequencies of two fixtures depend.
pub fn greedy() -> Vec<Asked> {
    let longer = Asked { prompt: prompt(9, 100), sampling: SamplingParams::GREEDY, max_new_tokens: 0 };
    let asked = all().into_iter().chain([longer]);
    asked.map(|asked| Asked { sampling: SamplingParams::GREEDY, max_new_tokens: 24, ..asked }).collect()
}

/// What each request got in each way.
fn in_every_way(card: &Card, asked: &[Asked]) -> Vec<(&'static str, Vec<Got>)> {
    let mut driver = Driver::new(card.engine(|_| ()));
    let mut ways = vec![
        ("alone", driver.alone(asked)),
        ("together", driver.together(asked)),
        ("three at once", asked.chunks(3).flat_map(|three| driver.together(three)).collect()),
        ("one after the other", driver.one_after_the_other(asked)),
        ("after others", asked.chunks(3).flat_map(|three| driver.after_filter(three, asked)).collect()),
    ];
    let mut cached = |n_shared: fn(u32) -> u32, chunk_len: Option<u32>| -> Vec<Got> {
        let on_prefix = |asked: &Asked| {
            let len = asked.prompt.len() as u32;
            let n_shared = n_shared(len).max(1);
            driver.cached(asked, n_shared, n_shared.min(len - 1), chunk_len.filter(|&chunk| chunk < len))
        };
        asked.iter().map(on_prefix).collect()
    };
    ways.push(("half of it cached", cached(|len| len / 2, None)));
    ways.push(("all of it cached", cached(|len| len, None)));
    ways.push(("half of it cached, the rest in chunks", cached(|len| len / 2, Some(2))));
    let in_chunks = |asked: &Asked| driver.one(asked, Placement::Own, Some(1));
    ways.push(("its first token by itself", asked.iter().map(in_chunks).collect()));
    drop(driver);
    let mut driver = Driver::new(card.engine(|options| options.max_prefill_tokens = 16));
    ways.push(("in chunks of 16", driver.together(asked)));
    ways
}

/// A model's answers in every way, on so many GPUs.
pub fn check(name: &str, dtype: DType, n_ranks: usize) {
    let mut card = Card::load(name, dtype, EngineOptions { n_ranks, ..SIZES });
    let asked = greedy();
    let ways = in_every_way(&card, &asked);
    let margin = Noise::of(dtype).margin;
    let mut seen = Seen::default();
    let mut n_other = 0;
    for (way, got) in &ways {
        for (index, ((asked, got), alone)) in asked.iter().zip(got).zip(&ways[0].1).enumerate() {
            let what = format!("{name} in {dtype}, request {index} {way}");
            assert_eq!(got.ids.len(), asked.max_new_tokens as usize, "{what}");
            n_other += usize::from(got.ids != alone.ids);
            for (token, deficit) in deficits(&mut card, &asked.prompt, &got.ids).into_iter().enumerate() {
                assert!(
                    deficit <= margin,
                    "{what}: token {token} is {deficit} below the likeliest\n{:?}\n{:?}",
                    asked.prompt,
                    got.ids
                );
                // Below 0 where scoring the whole text gave more than scoring the position alone.
                seen.add(deficit.max(0.0));
            }
        }
    }
    println!(
        "{name:15} {dtype:8} {n_ranks} ranks {} tokens in {} ways, {:.4} below the likeliest at most; {n_other} of {} answers differ from those alone",
        seen.n(),
        ways.len(),
        seen.largest(),
        (ways.len() - 1) * asked.len()
    );
}

#[test]
fn company_changes_no_more_than_rounding_does() {
    let _gpu = card::alone();
    for name in ["demo", "mistral", "llama-dynamic", "llama-longrope"] {
        DTYPES.into_iter().for_each(|dtype| check(name, dtype, 1));
    }
}
