use proptest::prelude::*;

use super::*;
use crate::sampling::RawStopping;
use crate::server::draft::NEUTRAL;

const CAPACITY: Capacity =
    Capacity { max_supported_total_tokens: 100, max_input_tokens: 20, max_total_tokens: 30 };

fn draft(slots: Vec<u32>) -> RequestDraft {
    RequestDraft {
        id: RequestId(1),
        prompt: "a prompt".to_owned(),
        add_special_tokens: true,
        truncate: 100,
        sampling: NEUTRAL,
        grammar: Grammar::Unconstrained,
        stopping: RawStopping { max_new_tokens: 4, stop_sequences: Vec::new(), ignore_eos: false },
        prompt_logprobs: false,
        n_blocks: slots.len(),
        slots,
        cache_len: 0,
        chunk_len: None,
        adapter: None,
    }
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("refused").to_string()
}

#[test]
fn a_batch_is_what_it_says() {
    let serve = Purpose::Serve(CAPACITY);
    let drafts = [draft(vec![]), RequestDraft { id: RequestId(2), ..draft(vec![]) }];
    assert_eq!(check_batch(&drafts, 2, serve), Ok(()));
    assert!(message(check_batch(&[], 0, serve)).contains("no requests"));
    assert!(message(check_batch(&drafts, 3, serve)).contains("size 3 and has 2"));
    let twice = [draft(vec![]), draft(vec![])];
    assert!(message(check_batch(&twice, 2, serve)).contains("request 1 is in the batch twice"));
    // A router's Warmup numbers all its requests 0.
    assert_eq!(check_batch(&twice, 2, Purpose::Warmup), Ok(()));
}

#[test]
fn grammars_are_refused_by_name() {
    assert_eq!(check_grammar(Grammar::Unconstrained), Ok(()));
    assert!(matches!(check_grammar(Grammar::Regex), Err(Error::Unsupported(_))));
    assert!(matches!(check_grammar(Grammar::Json), Err(Error::Unsupported(_))));
    assert!(matches!(check_grammar(Grammar::Unknown(7)), Err(Error::Invalid(_))));
}

#[test]
fn prompts_are_tokens_of_the_model() {
    assert_eq!(check_prompt(&[0, 9], 10), Ok(()));
    assert!(matches!(check_prompt(&[], 10), Err(Error::Invalid(_))));
    assert!(message(check_prompt(&[3, 10], 10)).contains("token 10"));
}

#[test]
fn limits_are_told_with_the_numbers() {
    assert_eq!(check_length(20, 10, CAPACITY), Ok(()));
    assert!(message(check_length(21, 1, CAPACITY)).contains("21 tokens, the limit is 20"));
    assert!(message(check_length(20, 11, CAPACITY)).contains("31, the limit is 30"));
    assert!(check_length(20, u32::MAX, CAPACITY).is_err());
}

#[test]
fn slots_and_blocks_come_together() {
    assert_eq!(place(&draft(vec![]), 3, 4), Ok((Placement::Own, None)));
    let no_blocks = RequestDraft { n_blocks: 0, ..draft((1..8).collect()) };
    assert!(matches!(place(&no_blocks, 3, 4), Err(Error::Invalid(_))));
    let no_slots = RequestDraft { n_blocks: 3, ..draft(vec![]) };
    assert!(matches!(place(&no_slots, 3, 4), Err(Error::Invalid(_))));
}

#[test]
fn slots_suffice_and_differ() {
    assert!(place(&draft((1..7).collect()), 3, 4).is_ok());
    assert!(message(place(&draft((1..6).collect()), 3, 4)).contains("5 slots are too few"));
    assert!(message(place(&draft(vec![1, 2, 3, 4, 5, 2]), 3, 4)).contains("slot 2"));
    assert!(place(&draft((1..6).collect()), 3, u32::MAX).is_err());
}

#[test]
fn a_probe_runs_on_own_slots() {
    let probe = RequestDraft { id: RequestId::PROBE, ..draft(vec![0]) };
    assert_eq!(place(&probe, 1, 1), Ok((Placement::Own, None)));
}

proptest! {
    #[test]
    fn claims_beyond_the_prompt_are_clamped(
        prompt_len in 1u32..50,
        max_new_tokens in 1u32..50,
        cache_len in any::<u32>(),
        chunk_len in any::<Option<u32>>(),
    ) {
        let slots: Vec<u32> = (1..prompt_len + max_new_tokens).collect();
        let asked = RequestDraft { cache_len, chunk_len, ..draft(slots.clone()) };
        let (placement, chunk_len) = place(&asked, prompt_len, max_new_tokens).expect("placed");
        let Placement::Router { slots: placed, cache_len } = placement else { panic!("the router's slots") };
        prop_assert_eq!(placed, slots);
        prop_assert_eq!(cache_len, asked.cache_len, "the engine has to know what is shared");
        let cache_len = cache_len.min(prompt_len - 1);
        if let Some(chunk_len) = chunk_len {
            prop_assert!(chunk_len >= 1 && cache_len + chunk_len < prompt_len);
        }
    }

    #[test]
    fn a_stretched_text_is_as_long_as_it_would_be(repeats in 1usize..5000, truncate in 1usize..5000) {
        let text = "_test ".repeat(repeats);
        let piece = leading_bytes(&text, 600);
        // Two tokens for each word.
        let ids: Vec<u32> = (0..piece.len() as u32 / 3).take(truncate).collect();
        let stretched = stretch(ids.clone(), piece.len(), text.len(), truncate);
        prop_assert_eq!(stretched.len(), if ids.len() < 200 && piece.len() < text.len() {
            (ids.len() * text.len() / piece.len()).min(truncate)
        } else {
            (2 * repeats).min(truncate)
        });
    }
}

#[test]
fn text_is_cut_between_characters() {
    assert_eq!(leading_bytes("aüb", 2), "a");
    assert_eq!(leading_bytes("aüb", 3), "aü");
    assert_eq!(leading_bytes("aüb", 9), "aüb");
    assert_eq!(leading_bytes("ü", 1), "");
}
