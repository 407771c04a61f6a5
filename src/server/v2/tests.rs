use super::*;
use crate::engine::Timings;

#[test]
fn a_request_is_placed_by_the_shard() {
    let draft = request_draft(wire::Request {
        id: 1,
        inputs: "a prompt".to_owned(),
        truncate: 10,
        prefill_logprobs: true,
        top_n_tokens: 4,
        ..Default::default()
    });
    let expected = RequestDraft {
        id: RequestId(1),
        prompt: "a prompt".to_owned(),
        add_special_tokens: true,
        truncate: 10,
        sampling: RawSampling { top_n: 4, ..NEUTRAL },
        grammar: Grammar::Unconstrained,
        stopping: RawStopping { max_new_tokens: 0, stop_sequences: Vec::new(), ignore_eos: false },
        prompt_logprobs: true,
        n_blocks: 0,
        slots: Vec::new(),
        cache_len: 0,
        chunk_len: None,
        adapter: None,
    };
    assert_eq!(draft, expected);
}

#[test]
fn limits_are_plain_numbers() {
    let message = wire::WarmupRequest {
        batch: None,
        max_input_length: 100,
        max_prefill_tokens: 64,
        max_total_tokens: 0,
    };
    let draft = warmup_draft(message);
    assert_eq!(
        (draft.max_input_tokens, draft.max_prefill_tokens, draft.max_total_tokens),
        (Some(100), 64, None)
    );
}

#[test]
fn batches_of_this_version_are_its_own() {
    let draft =
        prefill_draft(wire::PrefillRequest { batch: Some(wire::Batch { id: 4, ..Default::default() }) });
    let id = draft.batch.expect("a batch").id;
    assert_eq!(id, BatchId { protocol: Protocol::V2, number: 4 });
    assert_ne!(id, BatchId { protocol: Protocol::V3, number: 4 });
    assert_eq!(draft.merge, None);
}

#[test]
fn answers_keep_size_and_times() {
    let batch = CachedBatch {
        id: batch_id(2),
        request_ids: vec![RequestId(5), RequestId(6)],
        max_tokens: 30,
        current_tokens: 2,
    };
    let answer = || StepAnswer {
        batch: Some(batch.clone()),
        timings: Timings { forward_ns: 1, decode_ns: 2, concat_ns: Some(3), n_tokens: 0, n_rows: 0 },
        ..StepAnswer::default()
    };
    let decoded = step_answer(answer(), 9);
    assert_eq!(
        (decoded.forward_ns, decoded.decode_ns, decoded.total_ns, decoded.concat_ns),
        (1, 2, 9, Some(3))
    );
    let prefilled = prefill_response(step_answer(answer(), 9));
    let batch = prefilled.batch.expect("a batch");
    assert_eq!((batch.id, batch.size, batch.max_tokens), (2, 2, 30));
    assert_eq!(batch.request_ids, [5, 6]);
}
