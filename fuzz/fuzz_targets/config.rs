//! Any `config.json` is a decoder or a sentence: `cargo fuzz run config`.

#![no_main]

use kvshard::model::families;
use kvshard::model::plan::{MemoryPlan, PlanOptions};
use kvshard::model::rope::Frequencies;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok(config) = serde_json::from_slice(text) else { return };
    let Ok(model) = families::resolve(&config) else { return };
    model.spec.check().expect("what is resolved is sound");
    for rope in model.spec.ropes() {
        let frequencies = Frequencies::new(rope);
        for len in [1, model.spec.max_positions as u32] {
            let (frequencies, amplitude) = frequencies.for_position(len, 0);
            assert!(amplitude.is_finite() && frequencies.iter().all(|f| f.is_finite()));
        }
    }
    let _ = MemoryPlan::new(&model, None, &PlanOptions::default());
});
