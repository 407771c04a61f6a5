//! Every fixture, from its files to its tokens, against what `transformers` computed from the same files.
//!
//! An executor returns no logits, so distributions are compared: greedy sampling that reports the whole vocabulary gives
//! the log-softmax of a position's logits, and targets give single entries of it.

use std::fs;

use kvshard::backend::step::{Feed, Row, Sampled, StepInput};
use kvshard::ids::Lane;
use kvshard::model::Device;
use kvshard::model::checkpoint::{Checkpoint, DType};
use kvshard::model::executor::Executor;
use kvshard::model::families;
use kvshard::model::plan::{MemoryPlan, PlanOptions};
use kvshard::model::weights::Weights;

use crate::support::fixture;
use crate::support::golden::{Golden, Prompt, log_softmax, prefill, run};
use crate::support::oracle::Oracle;

impl Golden {
    /// Compares a position's distribution with the log-softmax of stored logits.
    fn assert_distribution(&self, found: &Sampled, logits: &[f32], place: &str) {
        let Sampled::Token { top, .. } = found else { panic!("{place}: {found:?}") };
        assert_eq!(top.len(), logits.len(), "{place}");
        let expected = log_softmax(logits);
        for &(id, logprob) in top {
            let expected = expected[id as usize];
            assert!(
                (logprob - expected).abs() <= self.tolerance,
                "{place}: id {id} has {logprob}, not {expected}"
            );
        }
    }
}

impl Prompt<'_> {
    /// The prompt in one step, then each token alone: the greedy tokens, and the distributions of which there are
    /// stored ones.
    fn check_generation(&self, executor: &mut dyn Executor) {
        let outcomes = generate(executor, &self.ids, self.greedy.len(), self.golden.vocab() as u32);
        let found: Vec<u32> = outcomes.iter().map(token).collect();
        assert_eq!(found, self.greedy, "{}", self.place("greedy"));
        self.golden.assert_distribution(&outcomes[0], self.logits("last_logits")[0], &self.place("last"));
        if self.has("greedy_logits") {
            for (step, (outcome, logits)) in outcomes.iter().zip(self.logits("greedy_logits")).enumerate() {
                self.golden.assert_distribution(outcome, logits, &self.place(&format!("step {step}")));
            }
        }
    }

    /// Every position of the prompt: each prefix ends in one.
    fn check_all_positions(&self, executor: &mut dyn Executor) {
        for (position, logits) in self.logits("logits").iter().enumerate() {
            let outcomes = generate(executor, &self.ids[..=position], 1, self.golden.vocab() as u32);
            self.golden.assert_distribution(
                &outcomes[0],
                logits,
                &self.place(&format!("position {position}")),
            );
        }
    }

    /// The prompt's own log-probabilities, as targets.
    fn check_prompt_logprobs(&self, executor: &mut dyn Executor) {
        let expected = &self.golden.tensors[&format!("{}.prompt_logprobs", self.name)];
        let mut input = prefill(&self.ids, 1, 0);
        input.targets = self.ids[1..].to_vec();
        input.rows[0].n_targets = self.ids.len() as u32 - 1;
        let found = run(executor, input).target_logprobs;
        assert_eq!(found.len() + 1, expected.len());
        for (found, expected) in found.iter().zip(&expected[1..]) {
            let difference = (found - expected).abs();
            assert!(
                difference <= self.golden.tolerance,
                "{}: {found}, not {expected}",
                self.place("targets")
            );
        }
    }
}

/// What each of `n_new` steps sampled.
fn generate(executor: &mut dyn Executor, prompt: &[u32], n_new: usize, top_n: u32) -> Vec<Sampled> {
    let mut outcomes = run(executor, prefill(prompt, n_new, top_n)).sampled;
    for step in 1..n_new {
        let start = (prompt.len() + step - 1) as u32;
        let row = Row { lane: Lane(0), start, feed: Feed::Last, store_from: 0, sample: true, n_targets: 0 };
        outcomes.extend(run(executor, StepInput { rows: vec![row], ..StepInput::default() }).sampled);
    }
    assert_eq!(outcomes.len(), n_new);
    outcomes
}

fn token(outcome: &Sampled) -> u32 {
    match outcome {
        Sampled::Token { id, .. } => *id,
        Sampled::NoDistribution => panic!("no distribution"),
    }
}

/// The whole of a fixture, on one rank and on as many as it divides among.
fn check(name: &str, worlds: &[usize]) {
    let golden = Golden::open(name);
    let described = golden.resolve(families::CONFIG_FILE);
    if golden.folder.join("config_alt.json").exists() {
        let alt = golden.resolve("config_alt.json");
        assert_eq!(
            (&alt.spec, alt.dtype),
            (&described.spec, described.dtype),
            "{name}: the dialects disagree"
        );
    }
    let storage = golden.about["storage"].as_str().and_then(DType::from_name);
    assert_eq!(described.dtype, storage, "{name}");
    for &world in worlds {
        let mut executor = golden.executor(Device::Cpu, world);
        for prompt in golden.prompts() {
            prompt.check_generation(&mut *executor);
            if prompt.has("all_positions") {
                prompt.check_all_positions(&mut *executor);
            }
            if prompt.has("prompt_logprobs") {
                prompt.check_prompt_logprobs(&mut *executor);
            }
        }
    }
}

/// A test for each fixture, on each number of ranks among which its heads and neurons divide.
macro_rules! goldens {
    ($($test:ident: $fixture:literal on $worlds:expr;)+) => {
        const CHECKED: &[&str] = &[$($fixture),+];

        $(#[test]
        fn $test() {
            check($fixture, &$worlds);
        })+
    };
}

goldens! {
    llama: "llama" on [1, 2, 4];
    llama_with_defaults_in_shards: "llama-sharded" on [1, 2, 4];
    llama3_tied_with_its_scaling: "llama3" on [1, 2, 4];
    llama_with_biases_and_an_odd_vocabulary: "llama-bias" on [1, 2, 4];
    linear_scaling: "llama-linear" on [1, 2];
    dynamic_scaling: "llama-dynamic" on [1, 2];
    yarn: "llama-yarn" on [1, 2];
    longrope: "llama-longrope" on [1, 2];
    mistral_with_a_window: "mistral" on [1, 2, 4];
    mixtral: "mixtral" on [1, 2, 4];
    yi: "yi" on [1, 2, 4, 8];
    yi_with_its_first_names: "yi-ln" on [1, 2, 4];
    qwen: "qwen" on [1, 2, 4];
    qwen_of_the_first_revision: "qwen-first" on [1, 2, 4];
    qwen2_tied_with_windows_switched_off: "qwen2" on [1, 2, 4];
    qwen2_with_windows_on_some_layers: "qwen2-window" on [1, 2, 4];
    qwen3: "qwen3" on [1, 2, 4];
    qwen3_with_experts: "qwen3-moe" on [1, 2, 4];
    deepseek_v2_lite: "deepseek-v2-lite" on [1, 2, 4];
    deepseek_v2_with_narrow_values: "deepseek-v2-narrow" on [1, 2, 4];
    deepseek_v2: "deepseek-v2" on [1, 2, 4];
    deepseek_v3: "deepseek-v3" on [1, 2, 4];
    gemma2: "gemma2" on [1, 2, 4];
    gemma3: "gemma3" on [1, 2, 4];
    gemma3_beside_a_vision_tower: "gemma3-wrapped" on [1, 2, 4];
    gpt_oss: "gpt-oss" on [1, 2, 4];
    phi3: "phi3" on [1, 2, 4];
    phi3_with_two_sets_of_frequencies: "phi3-longrope" on [1, 2, 4];
    phi4_mini_turning_a_part_of_each_head: "phi4-mini" on [1, 2, 4];
    command_r: "cohere" on [1, 2, 4];
    command_r_plus: "cohere-qk-norm" on [1, 2, 4];
    stablelm: "stablelm" on [1, 2, 4];
    stablelm_in_parallel: "stablelm-parallel" on [1, 2, 4];
    minicpm: "minicpm" on [1, 2, 4];
    granite: "granite" on [1, 2, 4];
    internlm: "internlm" on [1, 2, 4];
    internlm_of_later_revisions: "internlm-rotary" on [1, 2, 4];
    baichuan_7b: "baichuan-7b" on [1, 2, 4];
    baichuan_13b: "baichuan-13b" on [1, 2];
    baichuan2_7b: "baichuan2-7b" on [1, 2, 4];
    baichuan2_13b: "baichuan2-13b" on [1, 2];
    chatglm2: "chatglm2" on [1, 2, 4];
    bloom: "bloom" on [1, 2];
    bloom_without_its_prefix: "bloom-bare" on [1, 2, 4];
    starcoder: "gpt-bigcode" on [1, 2, 4];
    starcoder_with_the_other_gelu: "gpt-bigcode-tanh" on [1, 2, 4];
    starcoder_with_all_kv_heads: "gpt-bigcode-mha" on [1, 2, 4];
    starcoder2: "starcoder2" on [1, 2, 4];
    falcon_7b: "falcon" on [1];
    falcon_40b: "falcon-groups" on [1, 2, 4];
}

#[test]
fn every_fixture_is_checked() {
    for entry in fs::read_dir(fixture("")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(CHECKED.contains(&name) || !path.join("golden.json").exists(), "{name}");
    }
}

/// The oracle of the schedules is itself right.
#[test]
fn the_oracle_agrees() {
    let golden = Golden::open("llama");
    let oracle = Oracle::open(&golden.folder);
    for prompt in golden.prompts().filter(|prompt| prompt.ids.len() <= 33) {
        let found = oracle.logits(&prompt.ids);
        let expected = prompt.logits("last_logits")[0];
        for (found, expected) in found[prompt.ids.len() - 1].iter().zip(expected) {
            assert!((*found as f32 - expected).abs() <= golden.tolerance, "{}", prompt.place("oracle"));
        }
    }
}

/// What the plan says before loading is what the executor says after.
#[test]
fn the_plan_is_what_is_loaded() {
    for (name, world) in [("llama", 1), ("llama3", 2), ("qwen2", 4)] {
        let golden = Golden::open(name);
        let described = golden.resolve(families::CONFIG_FILE);
        let weights = Checkpoint::open(&golden.folder)
            .and_then(|checkpoint| Weights::open(&checkpoint, &described.spec, &described.names))
            .unwrap();
        let plan =
            MemoryPlan::new(&described, Some(&weights), &PlanOptions { world, ..PlanOptions::default() })
                .unwrap();
        let executor = golden.executor(Device::Cpu, world);
        let info = executor.info();
        assert_eq!((info.family, info.vocab as usize), (described.spec.family, described.spec.vocab));
        assert_eq!(info.kv_bytes_per_slot, plan.kv_bytes_per_slot, "{name}");
        assert_eq!(info.dtype, "float32", "{name}: what the CPU computes in");
    }
}
