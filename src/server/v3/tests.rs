use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::engine::Timings;

/// What a 3.3 router sends for a short prompt.
fn routers_request() -> wire::Request {
    wire::Request {
        id: 7,
        inputs: "What is deep learning?".to_owned(),
        truncate: 256,
        parameters: Some(wire::NextTokenChooserParameters {
            temperature: 1.0,
            top_p: 1.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            seed: 6_978_650_542_795_796_259,
            ..Default::default()
        }),
        stopping_parameters: Some(wire::StoppingCriteriaParameters {
            max_new_tokens: 3,
            ..Default::default()
        }),
        input_chunks: Some(wire::Input { chunks: vec![text("What is deep learning?")] }),
        blocks: (8..16).collect(),
        slots: (8..16).collect(),
        cache_len: 2,
        chunk_len: Some(4),
        add_special_tokens: true,
        ..Default::default()
    }
}

fn text(text: &str) -> wire::InputChunk {
    wire::InputChunk { chunk: Some(wire::input_chunk::Chunk::Text(text.to_owned())) }
}

fn image() -> wire::InputChunk {
    let image = wire::Image { data: vec![1, 2, 3], mimetype: "image/png".to_owned() };
    wire::InputChunk { chunk: Some(wire::input_chunk::Chunk::Image(image)) }
}

#[test]
fn a_routers_request_is_understood() {
    let draft = request_draft(routers_request());
    let expected = RequestDraft {
        id: RequestId(7),
        prompt: "What is deep learning?".to_owned(),
        add_special_tokens: true,
        truncate: 256,
        sampling: RawSampling { seed: 6_978_650_542_795_796_259, ..NEUTRAL },
        grammar: Grammar::Unconstrained,
        stopping: RawStopping { max_new_tokens: 3, stop_sequences: Vec::new(), ignore_eos: false },
        prompt_logprobs: false,
        n_blocks: 8,
        slots: (8..16).collect(),
        cache_len: 2,
        chunk_len: Some(4),
        adapter: None,
    };
    assert_eq!(draft, expected);
}

#[test]
fn the_prompt_is_the_text_of_the_chunks() {
    let of = |chunks: Option<Vec<wire::InputChunk>>| {
        prompt_text(chunks.map(|chunks| wire::Input { chunks }), "inputs".to_owned())
    };
    assert_eq!(of(None), "inputs");
    assert_eq!(of(Some(vec![])), "inputs");
    assert_eq!(of(Some(vec![text("a"), image()])), "a");
    assert_eq!(of(Some(vec![text("a"), image(), text("b"), text("c")])), "abc");
    assert_eq!(of(Some(vec![image(), wire::InputChunk { chunk: None }])), "");
}

#[test]
fn missing_parameters_are_neutral() {
    let (grammar, sampling) = parameters(None, 5);
    assert_eq!((grammar, sampling), (Grammar::Unconstrained, RawSampling { top_n: 5, ..NEUTRAL }));
}

#[test]
fn grammars_count_only_with_text() {
    let of = |grammar: &str, kind: i32| {
        let message = wire::NextTokenChooserParameters {
            grammar: grammar.to_owned(),
            grammar_type: kind,
            ..Default::default()
        };
        parameters(Some(message), 0).0
    };
    assert_eq!(of("", 2), Grammar::Unconstrained);
    assert_eq!(of("a+", 0), Grammar::Unconstrained);
    assert_eq!(of("{}", wire::GrammarType::Json.into()), Grammar::Json);
    assert_eq!(of("a+", wire::GrammarType::Regex.into()), Grammar::Regex);
    assert_eq!(of("a+", 9), Grammar::Unknown(9));
}

#[test]
fn calls_keep_what_they_name() {
    let message = wire::PrefillRequest {
        batch: Some(wire::Batch { id: 4, requests: vec![routers_request()], size: 1, ..Default::default() }),
        cached_batch: Some(wire::CachedBatch { id: 3, ..Default::default() }),
    };
    let draft = prefill_draft(message);
    assert_eq!(draft.merge, Some(batch_id(3)));
    let batch = draft.batch.expect("a batch");
    assert_eq!((batch.id, batch.size, batch.requests.len()), (batch_id(4), 1, 1));
    assert_eq!(prefill_draft(wire::PrefillRequest::default()), PrefillDraft { batch: None, merge: None });

    let draft = warmup_draft(wire::WarmupRequest {
        batch: None,
        max_input_tokens: Some(0),
        max_prefill_tokens: 64,
        max_total_tokens: None,
    });
    assert_eq!(
        (draft.max_input_tokens, draft.max_prefill_tokens, draft.max_total_tokens),
        (Some(0), 64, None)
    );
}

#[test]
fn info_keeps_what_routers_rely_on() {
    let facts =
        Facts { dtype: "torch.float32".to_owned(), device: "cpu", chunking: true, prefix_caching: true };
    let message = info(facts);
    assert!(!message.requires_padding && message.support_chunking && message.use_prefix_caching);
    assert_eq!((message.block_size, message.window_size, message.speculate), (1, None, 0));
    assert_eq!((message.dtype.as_str(), message.device_type.as_str()), ("torch.float32", "cpu"));
}

fn any_tokens() -> impl Strategy<Value = Tokens> {
    prop::collection::vec((any::<u32>(), -50.0f32..0.0, "\\PC{0,4}", any::<bool>()), 1..4).prop_map(|rows| {
        let mut tokens = Tokens::default();
        for (id, logprob, text, special) in rows {
            tokens.ids.push(id);
            tokens.logprobs.push(logprob);
            tokens.texts.push(text);
            tokens.is_special.push(special);
        }
        tokens
    })
}

fn any_generation() -> impl Strategy<Value = Generation> {
    let reason = prop_oneof![
        Just(FinishReason::Length),
        Just(FinishReason::EndOfText),
        Just(FinishReason::StopSequence)
    ];
    let end = ("\\PC{0,9}", 1u32.., reason, any::<Option<u64>>()).prop_map(
        |(text, n_tokens, finish_reason, seed)| GeneratedText { text, n_tokens, finish_reason, seed },
    );
    (
        any::<u64>(),
        prop::option::of(any_tokens()),
        any_tokens(),
        prop::option::of(end),
        prop::collection::vec(any_tokens(), 0..3),
    )
        .prop_map(|(id, prefill_tokens, tokens, generated_text, top_tokens)| Generation {
            request: RequestId(id),
            prefill_tokens,
            tokens,
            generated_text,
            top_tokens,
        })
}

fn tokens_back(tokens: wire::Tokens) -> Tokens {
    Tokens { ids: tokens.ids, logprobs: tokens.logprobs, texts: tokens.texts, is_special: tokens.is_special }
}

/// How a router reads a generation.
fn generation_back(generation: wire::Generation) -> Generation {
    Generation {
        request: RequestId(generation.request_id),
        prefill_tokens: generation.prefill_tokens.map(tokens_back),
        tokens: tokens_back(generation.tokens.expect("a router needs tokens")),
        generated_text: generation.generated_text.map(|text| GeneratedText {
            n_tokens: text.generated_tokens,
            finish_reason: match text.finish_reason {
                0 => FinishReason::Length,
                1 => FinishReason::EndOfText,
                2 => FinishReason::StopSequence,
                other => panic!("a router panics at finish reason {other}"),
            },
            text: text.text,
            seed: text.seed,
        }),
        top_tokens: generation.top_tokens.into_iter().map(tokens_back).collect(),
    }
}

proptest! {
    #[test]
    fn answers_survive_the_wire(
        generations in prop::collection::vec(any_generation(), 0..4),
        request_ids in prop::collection::vec(any::<u64>(), 0..4),
        concat_ns in any::<Option<u64>>(),
    ) {
        let batch = CachedBatch {
            id: batch_id(9),
            request_ids: request_ids.iter().copied().map(RequestId).collect(),
            max_tokens: 40,
            current_tokens: 3,
        };
        let answer = StepAnswer {
            generations: generations.clone(),
            batch: (!request_ids.is_empty()).then_some(batch),
            timings: Timings { forward_ns: 1, decode_ns: 2, concat_ns, n_tokens: 3, n_rows: 4 },
            notices: Vec::new(),
        };
        let bytes = decode_response(step_answer(answer, 5)).encode_to_vec();
        let message = wire::DecodeResponse::decode(bytes.as_slice()).expect("decodes");
        prop_assert_eq!((message.forward_ns, message.decode_ns, message.total_ns), (1, 2, 5));
        prop_assert_eq!(message.concat_ns, concat_ns);
        prop_assert_eq!(message.batch.is_some(), !request_ids.is_empty());
        if let Some(batch) = message.batch {
            prop_assert_eq!(batch.size as usize, batch.request_ids.len());
            prop_assert_eq!((batch.id, batch.max_tokens, batch.current_tokens), (9, 40, 3));
            prop_assert_eq!(batch.request_ids, request_ids);
        }
        let back: Vec<_> = message.generations.into_iter().map(generation_back).collect();
        prop_assert_eq!(back, generations);
    }
}
