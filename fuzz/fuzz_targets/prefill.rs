//! Any Prefill is requests that the engine can take, or sentences: `cargo fuzz run prefill`. The first byte turns what
//! does not decode into a request with the rest as its prompt, so that texts reach the tokenizer from the start.

#![no_main]

use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex};

use kvshard::backend::step::Watermark;
use kvshard::engine::{Capacity, Placement};
use kvshard::pb::v3;
use kvshard::sampling::Limits;
use kvshard::server::Intake;
use kvshard::text::Tokenizer;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

const CAPACITY: Capacity =
    Capacity { max_supported_total_tokens: 2048, max_input_tokens: 511, max_total_tokens: 512 };
const VOCAB: u32 = 384;

static INTAKES: LazyLock<[Intake; 2]> = LazyLock::new(|| ["spm", "byte-level"].map(intake));

fn intake(tokenizer: &str) -> Intake {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures/tokenizers");
    Intake {
        tokenizer: Arc::new(Tokenizer::load(&fixtures.join(tokenizer)).expect("a tokenizer")),
        eos: Arc::new([2]),
        limits: Limits { vocab: VOCAB, watermark: Watermark { gamma: 0.5, delta: 2.0 } },
        prompt_logprobs: true,
        model_names: Vec::new(),
        adapter_warning: Mutex::new(None),
    }
}

fn message(bytes: &[u8], as_text: bool) -> Option<v3::PrefillRequest> {
    if !as_text {
        return v3::PrefillRequest::decode(bytes).ok();
    }
    let request = v3::Request {
        inputs: String::from_utf8_lossy(bytes).into_owned(),
        truncate: 300,
        add_special_tokens: bytes.len() % 2 == 0,
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens: 5,
            ..Default::default()
        }),
        ..Default::default()
    };
    let batch = v3::Batch { requests: vec![request], size: 1, ..Default::default() };
    Some(v3::PrefillRequest { batch: Some(batch), cached_batch: None })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let Some(message) = message(bytes, first & 1 == 1) else { return };
    let n_requests = message.batch.as_ref().map_or(0, |batch| batch.requests.len());
    let Ok(arrivals) = INTAKES[usize::from(first >> 1 & 1)].arrivals(message, CAPACITY) else { return };
    assert_eq!(arrivals.len(), n_requests);
    for prepared in arrivals.into_iter().filter_map(|arrival| arrival.prepared.ok()) {
        let (len, new) = (prepared.prompt.len(), prepared.stopping.max_new_tokens() as usize);
        assert!(len >= 1 && prepared.prompt.iter().all(|id| *id < VOCAB));
        assert!(len <= CAPACITY.max_input_tokens as usize && len + new <= CAPACITY.max_total_tokens as usize);
        let cached = match &prepared.placement {
            Placement::Own => 0,
            Placement::Router { slots, cache_len } => {
                assert!(slots.len() >= len + new - 1);
                *cache_len as usize
            }
        };
        assert!(cached < len);
        assert!(prepared.chunk_len.is_none_or(|chunk| chunk >= 1 && cached + (chunk as usize) < len));
        let sampling = prepared.sampling;
        assert!(sampling.temperature > 0.0 && sampling.top_k <= VOCAB && sampling.top_n <= VOCAB);
    }
});
