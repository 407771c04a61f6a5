//! What a load test sends, and when: lengths, prompts, arrivals. The same seed makes the same load.

use std::f64::consts::TAU;
use std::time::Duration;

use super::prefix::Prefix;
use crate::config::{BenchConfig, Lengths};

/// Words of prompts: frequent enough to be a token or two in any vocabulary, and never less than one.
pub(super) const WORDS: [&str; 64] = [
    "time", "people", "way", "year", "work", "day", "world", "life", "part", "house", "place", "case",
    "group", "number", "water", "room", "money", "story", "fact", "month", "book", "eye", "job", "word",
    "business", "side", "kind", "head", "friend", "hour", "game", "line", "end", "member", "law", "car",
    "city", "name", "team", "minute", "idea", "body", "back", "face", "level", "door", "health", "person",
    "art", "war", "history", "party", "result", "change", "morning", "reason", "research", "girl", "moment",
    "air", "teacher", "force", "order", "light",
];

/// Random numbers, 64 bits of state: SplitMix64 (Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// The same numbers for the same seed.
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In (0, 1], so that it has a logarithm.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Below `n`.
    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// Standard normal, by Box and Muller.
    fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().ln()).sqrt() * (TAU * self.unit()).cos()
    }

    /// Exponential, of mean 1.
    fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    /// A length, in tokens.
    pub(super) fn length(&mut self, lengths: Lengths) -> u32 {
        match lengths {
            Lengths::Fixed(length) => length,
            Lengths::Uniform(from, to) => from + self.below(u64::from(to - from) + 1) as u32,
            Lengths::Normal(mean, deviation) => Lengths::clamp(mean + deviation * self.normal()),
            Lengths::LogNormal(median, sigma) => Lengths::clamp(median * (sigma * self.normal()).exp()),
        }
    }

    /// A text of `n` of these words, each with a space before it.
    pub(super) fn text(&mut self, words: &[&str], n: u32) -> String {
        let mut text = String::with_capacity(7 * n as usize);
        for _ in 0..n {
            text.push(' ');
            text.push_str(words[self.below(words.len() as u64) as usize]);
        }
        text
    }

    /// When `n` requests arrive that come at `rate` a second: a Poisson process.
    pub(super) fn arrivals(&mut self, rate: f64, n: usize) -> Vec<Duration> {
        let mut at = 0.0;
        let mut next = || {
            at += self.exponential() / rate;
            Duration::from_secs_f64(at)
        };
        (0..n).map(|_| next()).collect()
    }
}

/// A request to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// Its text, to be cut to its length by the shard.
    pub(super) prompt: String,
    /// Length of its prompt.
    pub(super) input_tokens: u32,
    /// Length of its output.
    pub(super) output_tokens: u32,
}

impl Job {
    /// The next one. Its prompt is of random words from the first on, so that it shares no beginning with another,
    /// neither whole nor cut; but a longer one than the prefix begins with that, and has its length as it is.
    pub(super) fn next(config: &BenchConfig, random: &mut Random, prefix: Option<&Prefix>) -> Job {
        let input_tokens = random.length(config.input_tokens);
        let output_tokens = random.length(config.output_tokens);
        let prompt = match prefix.filter(|prefix| input_tokens > prefix.n_tokens) {
            Some(prefix) => prefix.text.clone() + &random.text(&prefix.words, input_tokens - prefix.n_tokens),
            None => random.text(&WORDS, input_tokens),
        };
        Job { prompt, input_tokens, output_tokens }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const N: usize = 20_000;

    fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt())
    }

    fn lengths(text: &str) -> Vec<f64> {
        let lengths = text.parse().expect("a distribution");
        let mut random = Random::new(1);
        (0..N).map(|_| f64::from(random.length(lengths))).collect()
    }

    fn is_near(value: f64, expected: f64) {
        assert!((value / expected - 1.0).abs() < 0.03, "{value}, not {expected}");
    }

    #[test]
    fn lengths_are_distributed_as_named() {
        assert!(lengths("17").iter().all(|&length| length == 17.0));
        let uniform = lengths("uniform:3..7");
        let seen: BTreeSet<u64> = uniform.iter().map(|&length| length as u64).collect();
        assert_eq!(seen, (3..=7).collect());
        is_near(mean_and_deviation(&uniform).1, 2f64.sqrt());
        let (mean, deviation) = mean_and_deviation(&lengths("normal:512,64"));
        is_near(mean, 512.0);
        is_near(deviation, 64.0);
        let mut lognormal = lengths("lognormal:300,0.5");
        lognormal.sort_by(f64::total_cmp);
        is_near(lognormal[N / 2], 300.0);
        is_near(mean_and_deviation(&lognormal).0, 300.0 * 0.125f64.exp());
        assert!(lengths("normal:2,100").iter().all(|&length| length >= 1.0));
    }

    #[test]
    fn arrivals_are_a_poisson_process() {
        let arrivals = Random::new(3).arrivals(8.0, N);
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let (mean, deviation) = mean_and_deviation(&gaps);
        is_near(mean, 0.125);
        is_near(deviation, 0.125);
    }

    #[test]
    fn prompts_differ_from_the_first_word_and_are_the_same_again() {
        let mut random = Random::new(7);
        let texts: Vec<String> = (0..100).map(|_| random.text(&WORDS, 40)).collect();
        let tails: BTreeSet<&str> = texts.iter().map(|text| &text[text.len() - 60..]).collect();
        let heads: BTreeSet<&str> = texts.iter().map(|text| &text[..30]).collect();
        assert_eq!((tails.len(), heads.len()), (100, 100));
        assert!(texts.iter().all(|text| text.split_whitespace().count() == 40));
        assert_eq!(Random::new(7).text(&WORDS, 40), texts[0]);
    }
}
