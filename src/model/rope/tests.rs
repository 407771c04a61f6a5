//! Against the numbers that `transformers` 5.23's `ROPE_INIT_FUNCTIONS` give for the same parameters.

use super::*;
use crate::model::executor::PositionRegime;
use crate::model::spec::Positions;

fn assert_frequencies(scaling: RopeScaling, base: f64, len: u32, expected: &[f64], amplitude: f64) {
    let frequencies = Frequencies::new(&Rope { base, width: 2 * expected.len(), scaling });
    let (found, found_amplitude) = frequencies.for_position(len, 0);
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let found = f64::from(*found);
        // The reference computes powers in f32.
        assert!((found - expected).abs() <= 2e-6 * expected, "pair {i}: {found} is not {expected}");
    }
    assert!((f64::from(found_amplitude) - amplitude).abs() < 1e-6, "{found_amplitude} is not {amplitude}");
}

#[test]
fn unscaled_and_linear() {
    assert_frequencies(RopeScaling::Unscaled, 1e4, 10, &[1.0, 0.1, 0.01, 0.001], 1.0);
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_frequencies(linear, 1e4, 10, &[0.25, 0.025, 0.0025, 0.00025], 1.0);
}

#[test]
fn dynamic_grows_with_the_length_beyond_the_original() {
    let dynamic = RopeScaling::Dynamic { factor: 2.0, original: 64 };
    assert_frequencies(dynamic.clone(), 1e4, 1, &[1.0, 0.1, 0.01, 0.001], 1.0);
    assert_frequencies(dynamic.clone(), 1e4, 64, &[1.0, 0.1, 0.01, 0.001], 1.0);
    assert_frequencies(dynamic.clone(), 1e4, 65, &[1.0, 0.098979525, 0.0097969454, 0.00096969696], 1.0);
    assert_frequencies(dynamic, 1e4, 200, &[1.0, 0.05753696, 0.0033105016, 0.00019047619], 1.0);
}

#[test]
fn dynamic_of_the_narrowest_head_is_finite() {
    assert_frequencies(RopeScaling::Dynamic { factor: 2.0, original: 64 }, 1e4, 65, &[1.0], 1.0);
}

#[test]
fn llama3_keeps_short_waves_and_divides_long_ones() {
    let llama3 =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 64 };
    let expected = [
        1.0,
        0.079403013,
        0.0047007538,
        0.00091158313,
        0.00017677668,
        3.4281024e-05,
        6.6478697e-06,
        1.2891732e-06,
    ];
    assert_frequencies(llama3, 5e5, 10, &expected, 1.0);
}

fn yarn(factor: f64, original: u32, ramp_bounds: RampBounds, amplitude: f64) -> RopeScaling {
    RopeScaling::Yarn { factor, beta_fast: 32.0, beta_slow: 1.0, original, ramp_bounds, amplitude }
}

#[test]
fn yarn_with_whole_bounds() {
    let expected =
        [1.0, 0.22399466, 0.041666664, 0.0039528473, 0.00125, 0.00039528473, 0.00012500001, 3.9528473e-05];
    assert_frequencies(yarn(8.0, 64, RampBounds::Whole, 1.25), 1e4, 10, &expected, 1.25);
    let expected =
        [1.0, 0.31622776, 0.1, 0.023914725, 0.0051249997, 0.00084986218, 2.4999999e-05, 7.9056945e-06];
    assert_frequencies(yarn(40.0, 4096, RampBounds::Whole, 1.0), 1e4, 10, &expected, 1.0);
}

#[test]
fn yarn_with_exact_bounds() {
    let expected = [
        1.0,
        0.225418,
        0.050813273,
        0.0067949593,
        0.00045648392,
        1.8188337e-05,
        4.0999785e-06,
        9.2420896e-07,
    ];
    assert_frequencies(yarn(32.0, 4096, RampBounds::Exact, 1.0), 1.5e5, 10, &expected, 1.0);
}

#[test]
fn longrope_changes_sets_past_the_original_length() {
    let longrope = RopeScaling::LongRope {
        short: vec![1.0, 1.1, 1.3, 2.0],
        long: vec![1.1, 2.0, 4.5, 9.0],
        original: 64,
        amplitude: 1.224744871391589,
    };
    let short = [1.0, 0.090909094, 0.0076923077, 0.0005];
    let long = [0.90909088, 0.050000001, 0.0022222223, 0.00011111111];
    assert_frequencies(longrope.clone(), 1e4, 64, &short, 1.2247449);
    assert_frequencies(longrope, 1e4, 65, &long, 1.2247449);
}

#[test]
fn regimes_follow_the_frequencies() {
    let rope = |scaling| Rope { base: 1e4, width: 8, scaling };
    let regime = |scaling| PositionRegime::of(&Positions::Rope(vec![rope(scaling)]));
    assert_eq!(PositionRegime::of(&Positions::Alibi), PositionRegime::Fixed);
    assert_eq!(regime(RopeScaling::Linear { factor: 2.0 }), PositionRegime::Fixed);
    let dynamic = RopeScaling::Dynamic { factor: 2.0, original: 64 };
    assert_eq!(regime(dynamic.clone()), PositionRegime::EachLength { threshold: 64 });
    let longrope =
        RopeScaling::LongRope { short: vec![1.0; 4], long: vec![2.0; 4], original: 9, amplitude: 1.0 };
    assert_eq!(regime(longrope.clone()), PositionRegime::TwoLengths { threshold: 9 });
    let prompt = RopeScaling::PromptNtk { trained: 9 };
    assert_eq!(regime(prompt.clone()), PositionRegime::Prompt { trained: 9 });
    // Equal salts mean equal frequencies, different ones different frequencies.
    for scaling in [dynamic, longrope, prompt] {
        let rope = rope(scaling);
        let (frequencies, regime) = (Frequencies::new(&rope), PositionRegime::of_scaling(&rope.scaling));
        for (a, b) in [(1, 9), (9, 10), (10, 11), (17, 18), (18, 19), (64, 65), (65, 66)] {
            for (p, q) in [(0, 0), (3, 5), (9, 80), (80, 9)] {
                let same = regime.salt(a, p) == regime.salt(b, q);
                let alike = frequencies.for_position(a, p).0 == frequencies.for_position(b, q).0;
                assert_eq!(same, alike, "{rope:?} {a} {b} {p} {q}");
            }
        }
    }
}

#[test]
fn the_prompt_decides_by_powers_of_two() {
    let alphas = [1, 31, 32, 33, 64, 65, 70, 128, 129].map(|len| prompt_alpha(len, 32));
    assert_eq!(alphas, [1, 1, 1, 3, 3, 7, 7, 7, 15]);
    let frequencies =
        Frequencies::new(&Rope { base: 1e4, width: 8, scaling: RopeScaling::PromptNtk { trained: 32 } });
    let (first, later) = (frequencies.for_position(33, 0), frequencies.for_position(33, 1000));
    assert_eq!(first, later);
    // 10000 · 3^(8/6), to the power of −1/4.
    assert!((f64::from(first.0[1]) - 0.1 * 3f64.powf(-1.0 / 3.0)).abs() < 1e-7, "{first:?}");
    assert_eq!(frequencies.for_position(32, 1000), frequencies.for_position(1, 0));
}
