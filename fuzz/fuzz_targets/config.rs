//! Any `config.json` is a decoder or a sentence: `cargo fuzz run config`.

#![no_main]

use kvshard::model::families;
use kvshard::model::plan::{MemoryPlan, PlanOptions};
use kvshard::model::rope::Frequencies;
use kvshard::model::spec::Positions;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok(config) = serde_json::from_slice(text) else { return };
    let Ok(model) = families::resolve(&config) else { return };
    model.spec.check().expect("what is resolved is sound");
    let Positions::Rope(rope) = &model.spec.positions;
    let frequencies = Frequencies::new(rope, model.spec.attention.head_dim);
    for len in [1, model.spec.max_positions as u32] {
        let (frequencies, amplitude) = frequencies.for_length(len);
        assert!(amplitude.is_finite() && frequencies.iter().all(|f| f.is_finite()));
    }
    let _ = MemoryPlan::new(&model, None, &PlanOptions::default());
});
