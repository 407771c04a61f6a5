//! The stored results of a fixture, and the steps that compute the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use kvshard::backend::step::{Choice, Feed, LaneStart, Row, SamplingParams, StepInput, StepOutput};
use kvshard::error::Result;
use kvshard::ids::Lane;
use kvshard::model::checkpoint::Checkpoint;
use kvshard::model::executor::Executor;
use kvshard::model::families::{self, Resolved};
use kvshard::model::spec::DecoderSpec;
use kvshard::model::weights::Weights;
use kvshard::model::{self, Device, Options, Parts, PoolSize};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

use super::{fixture, synthetic};

/// Longest prompt and its output; beyond what `llama-dynamic` announces, whose arithmetic goes on, unlike that of a table
/// of positions.
pub const MAX_POSITIONS: usize = 320;

/// A fixture's stored results.
pub struct Golden {
    /// Holds the checkpoint: the fixture itself, or a copy of it with generated weights.
    pub folder: PathBuf,
    pub about: Value,
    pub tensors: BTreeMap<String, Vec<f32>>,
    /// Largest difference that rounding may make.
    pub tolerance: f32,
    /// The copy, while the tests run.
    _generated: Option<TempDir>,
}

/// One prompt of a fixture.
pub struct Prompt<'a> {
    pub golden: &'a Golden,
    pub about: &'a Value,
    pub name: &'a str,
    pub ids: Vec<u32>,
    pub greedy: Vec<u32>,
}

impl Golden {
    pub fn open(name: &str) -> Golden {
        let folder = fixture(name);
        let about: Value = serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
        let file = fs::read(folder.join("golden.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&file).unwrap();
        let numbers =
            |bytes: &[u8]| bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect();
        let tensors = stored.iter().map(|(name, view)| (name.to_owned(), numbers(view.data()))).collect();
        let usual = || 1e-4 * about["max_abs_logit"].as_f64().unwrap().max(1.0);
        let tolerance = about["tolerance"].as_f64().unwrap_or_else(usual) as f32;
        let generated = folder.join("tensors.json").exists().then(|| synthetic::checkpoint(&folder));
        let folder = generated.as_ref().map_or(folder, |copy| copy.path().to_owned());
        Golden { folder, about, tensors, tolerance, _generated: generated }
    }

    pub fn prompts(&self) -> impl Iterator<Item = Prompt<'_>> {
        self.about["prompts"].as_array().unwrap().iter().map(|about| Prompt {
            golden: self,
            about,
            name: about["name"].as_str().unwrap(),
            ids: ids(&about["ids"]),
            greedy: ids(&about["greedy"]["ids"]),
        })
    }

    /// The model that one of the folder's configs describes.
    pub fn resolve(&self, config: &str) -> Resolved {
        let config = serde_json::from_slice(&fs::read(self.folder.join(config)).unwrap()).unwrap();
        families::resolve(&config).unwrap()
    }

    /// Loads it with a pool of [`MAX_POSITIONS`] slots on a device.
    pub fn executor(&self, device: Device, n_ranks: usize) -> Box<dyn Executor> {
        self.executor_by(device, n_ranks, |spec, parts, options| {
            model::load(spec, parts, options, &|_, _| ())
        })
    }

    /// As [`Golden::executor`], loaded in another way.
    pub fn executor_by(
        &self,
        device: Device,
        n_ranks: usize,
        load: impl FnOnce(DecoderSpec, Box<Parts>, Options) -> Result<Box<dyn Executor>>,
    ) -> Box<dyn Executor> {
        let Resolved { mut spec, names, .. } = self.resolve(families::CONFIG_FILE);
        let longest = self.prompts().map(|prompt| prompt.ids.len() + prompt.greedy.len()).max();
        if longest > Some(spec.max_positions) {
            spec.max_positions = MAX_POSITIONS;
        }
        let weights = Weights::open(&Checkpoint::open(&self.folder).unwrap(), &spec, &names).unwrap();
        let options = Options {
            device,
            n_ranks,
            pool: PoolSize::Slots(MAX_POSITIONS + 1),
            n_lanes: 1,
            max_step_tokens: MAX_POSITIONS,
            graphs: device != Device::Cpu,
            fault: None,
        };
        let parts = Box::new(move |role, shard| weights.part(role, shard));
        load(spec, parts, options).unwrap_or_else(|error| panic!("{error}"))
    }

    pub fn vocab(&self) -> usize {
        self.about["vocab_size"].as_u64().unwrap() as usize
    }
}

impl Prompt<'_> {
    pub fn place(&self, what: &str) -> String {
        format!("{} {} {what}", self.golden.about["fixture"], self.name)
    }

    /// A stored result of this prompt, in rows as wide as the vocabulary.
    pub fn logits(&self, what: &str) -> Vec<&[f32]> {
        self.golden.tensors[&format!("{}.{what}", self.name)].chunks_exact(self.golden.vocab()).collect()
    }

    pub fn has(&self, what: &str) -> bool {
        self.about[what].as_bool().unwrap()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Log-probabilities of logits.
pub fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| (f64::from(x - max) - sum.ln()) as f32).collect()
}

/// A whole prompt on lane 0, which is to generate `n_new` tokens.
pub fn prefill(prompt: &[u32], n_new: usize, top_n: u32) -> StepInput {
    let lane = Lane(0);
    let n_slots = prompt.len() + n_new - 1;
    // Neither in order nor from the first on, so that slots and positions cannot be mistaken.
    let slots = (0..n_slots as u32).map(|position| MAX_POSITIONS as u32 - position).collect();
    let sampling = SamplingParams { choice: Choice::Greedy, top_n, ..SamplingParams::GREEDY };
    let feed = Feed::Prompt { len: prompt.len() as u32 };
    StepInput {
        starts: vec![LaneStart { lane, slots, prompt: prompt.to_vec(), sampling }],
        rows: vec![Row { lane, start: 0, feed, store_from: 0, sample: true, n_targets: 0 }],
        prompt_tokens: prompt.to_vec(),
        targets: Vec::new(),
    }
}

pub fn run(executor: &mut dyn Executor, input: StepInput) -> StepOutput {
    executor.submit(input).unwrap();
    executor.wait().unwrap()
}
