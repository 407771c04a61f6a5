//! Seeded draws on the GPU are those of the CPU, up to the noise of the distributions that are drawn from.
//!
//! A draw is a race in which each token runs `ln p − ln e`, `e` being the token's own random number. The numbers are the
//! same on both devices, so the token that won on the GPU is within noise of the winner where the CPU runs the same race.

use std::collections::BTreeMap;

use kvshard::backend::random::Draws;
use kvshard::backend::step::{Choice, Feed, LaneStart, Row, Sampled, SamplingParams, StepInput};
use kvshard::ids::Lane;
use kvshard::model::Device;
use kvshard::model::checkpoint::DType;
use kvshard::model::executor::Executor;

use crate::card::{self, Card, DTYPES};
use crate::noise::{Noise, Seen};
use crate::rescore::run;
use crate::support::EngineOptions;
use crate::support::driver::{Asked, Driver, prompt};

const SIZES: EngineOptions = EngineOptions {
    n_ranks: 1,
    n_slots: 1000,
    own_slots: 500,
    n_lanes: 8,
    max_prefill_tokens: 256,
    max_step_tokens: 256,
    run_ahead: true,
};
const TEMPERATURE: f32 = 0.9;

fn drawing(n: u32) -> Asked {
    let choice = Choice::Draw { seed: 1 + u64::from(n) };
    let sampling = SamplingParams { choice, temperature: TEMPERATURE, ..SamplingParams::GREEDY };
    Asked { prompt: prompt(n, 10 + 5 * n), sampling, max_new_tokens: 40 }
}

/// By how much each token of an output loses the CPU's race for its position.
fn losses(cpu: &mut dyn Executor, asked: &Asked, output: &[u32]) -> Vec<f32> {
    let Choice::Draw { seed } = asked.sampling.choice else { panic!("nothing is drawn") };
    let lane = Lane(0);
    let sampling = SamplingParams { top_n: cpu.info().vocab, ..asked.sampling };
    let slots = (1..=asked.n_positions()).collect();
    let mut starts = vec![LaneStart { lane, slots, prompt: asked.prompt.clone(), sampling }];
    let (mut start, mut fed) = (0, asked.prompt.clone());
    let mut losses = Vec::new();
    for &token in output {
        let feed = Feed::Prompt { len: fed.len() as u32 };
        let input = StepInput {
            starts: std::mem::take(&mut starts),
            rows: vec![Row { lane, start, feed, store_from: 0, sample: true, n_targets: 0 }],
            prompt_tokens: fed.clone(),
            targets: vec![],
        };
        start += fed.len() as u32;
        let [Sampled::Token { id: winner, top, .. }] = &run(cpu, input).sampled[..] else {
            panic!("a token")
        };
        let mut draws = Draws::new(seed, start);
        let raced: BTreeMap<u32, f32> =
            top.iter().map(|&(id, logprob)| (id, logprob - draws.exponential(id).ln())).collect();
        assert!(raced.values().all(|&score| score <= raced[winner]), "another race than the CPU's");
        losses.push(raced[winner] - raced[&token]);
        fed = vec![token];
    }
    losses
}

#[test]
fn a_draw_is_the_cpus_up_to_rounding() {
    let _gpu = card::alone();
    let mut cpu = card::load(&card::model_folder("demo"), Device::Cpu, SIZES).unwrap();
    let asked: Vec<Asked> = (0..6).map(drawing).collect();
    for dtype in DTYPES {
        let mut driver = Driver::new(Card::load("demo", dtype, SIZES).engine(|_| ()));
        let mut seen = Seen::default();
        let mut n_other = 0;
        for (way, got) in [("alone", driver.alone(&asked)), ("together", driver.together(&asked))] {
            for (asked, got) in asked.iter().zip(&got) {
                for (token, loss) in losses(&mut *cpu, asked, &got.ids).into_iter().enumerate() {
                    assert!(loss <= margin(dtype), "{dtype}, {way}: token {token} loses by {loss}: {got:?}");
                    n_other += usize::from(loss > 0.0);
                    seen.add(loss);
                }
            }
        }
        println!(
            "demo {dtype:8} {} draws, {n_other} lost on the CPU, by {:.4} at most",
            seen.n(),
            seen.largest()
        );
    }
}

/// Of the distribution, divided by the temperature as logits are.
fn margin(dtype: DType) -> f32 {
    Noise::of(dtype).margin / TEMPERATURE
}
