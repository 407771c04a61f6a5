//! Routers take 4 MiB an answer: what is too large is left out for its request alone.

use crate::batch::{Generation, Tokens};

/// What a router takes, less room for the rest of the message.
const MAX_ANSWER_BYTES: usize = (4 << 20) - (64 << 10);

/// Drops the largest lists until the answer fits: prompt tokens first, then alternatives. Tells what it dropped.
///
/// What is left then is a token and at most one text a request, which a router cannot do without.
pub(super) fn fit(generations: &mut [Generation]) -> Vec<String> {
    let mut n_bytes: usize = generations.iter().map(size_at_most).sum();
    let mut notices = Vec::new();
    if n_bytes <= MAX_ANSWER_BYTES {
        return notices;
    }
    let prompt_bytes = |generation: &Generation| generation.prefill_tokens.as_ref().map_or(0, tokens_at_most);
    for index in largest_first(generations, prompt_bytes) {
        let generation = &mut generations[index];
        if n_bytes > MAX_ANSWER_BYTES && generation.prefill_tokens.is_some() {
            n_bytes -= prompt_bytes(generation);
            generation.prefill_tokens = None;
            let request = generation.request;
            notices.push(format!("prompt tokens of request {request} are left out: the answer passes 4 MiB"));
        }
    }
    for index in largest_first(generations, top_at_most) {
        let generation = &mut generations[index];
        if n_bytes > MAX_ANSWER_BYTES && !generation.top_tokens.is_empty() {
            n_bytes -= top_at_most(generation);
            generation.top_tokens.clear();
            let request = generation.request;
            notices.push(format!("top tokens of request {request} are left out: the answer passes 4 MiB"));
        }
    }
    notices
}

fn largest_first(generations: &[Generation], bytes: impl Fn(&Generation) -> usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..generations.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(bytes(&generations[*index])));
    order
}

/// Bytes of a field's tag and length.
const FIELD: usize = 6;

/// An upper bound of what the wire takes for `tokens`: ids are varints of at most 5 bytes, log-probabilities 4
/// bytes, flags one.
fn tokens_at_most(tokens: &Tokens) -> usize {
    let texts: usize = tokens.texts.iter().map(|text| FIELD + text.len()).sum();
    4 * FIELD + 5 * tokens.ids.len() + 4 * tokens.logprobs.len() + texts + tokens.is_special.len()
}

fn top_at_most(generation: &Generation) -> usize {
    generation.top_tokens.iter().map(|tokens| FIELD + tokens_at_most(tokens)).sum()
}

fn size_at_most(generation: &Generation) -> usize {
    // Ids, counts and the seed are varints of at most 10 bytes with their tags.
    let text = generation.generated_text.as_ref().map_or(0, |text| 40 + FIELD + text.text.len());
    let prompt = generation.prefill_tokens.as_ref().map_or(0, tokens_at_most);
    40 + tokens_at_most(&generation.tokens) + prompt + text + top_at_most(generation)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::batch::GeneratedText;
    use crate::engine::StepAnswer;
    use crate::ids::RequestId;
    use crate::sampling::FinishReason;
    use crate::server::v3;

    fn tokens(n: usize, text: &str) -> Tokens {
        Tokens {
            ids: vec![u32::MAX; n],
            logprobs: vec![-1.0; n],
            texts: vec![text.to_owned(); n],
            is_special: vec![true; n],
        }
    }

    fn generation(id: u64, n_prompt: usize, n_top: usize, text: &str) -> Generation {
        Generation {
            request: RequestId(id),
            prefill_tokens: (n_prompt > 0).then(|| tokens(n_prompt, text)),
            tokens: tokens(1, text),
            generated_text: Some(GeneratedText {
                text: text.to_owned(),
                n_tokens: u32::MAX,
                finish_reason: FinishReason::StopSequence,
                seed: Some(u64::MAX),
            }),
            top_tokens: if n_top > 0 { vec![tokens(n_top, text)] } else { Vec::new() },
        }
    }

    fn wire_bytes(generations: &[Generation]) -> usize {
        v3::step_answer(StepAnswer { generations: generations.to_vec(), ..StepAnswer::default() }, 0)
            .encoded_len()
    }

    #[test]
    fn the_largest_prompt_goes_alone() {
        let mut generations = vec![
            generation(1, 1000, 5, "word"),
            generation(2, 500_000, 5, "word"),
            generation(3, 0, 5, "word"),
        ];
        let notices = fit(&mut generations);
        assert_eq!(notices.len(), 1, "{notices:?}");
        assert!(notices[0].contains("request 2"));
        assert!(generations[0].prefill_tokens.is_some() && generations[1].prefill_tokens.is_none());
        assert!(generations.iter().all(|generation| generation.top_tokens.len() == 1));
        assert!(wire_bytes(&generations) < 4 << 20);
    }

    #[test]
    fn alternatives_go_when_prompts_are_not_enough() {
        let text = "x".repeat(2000);
        let mut generations: Vec<_> = (0..40).map(|id| generation(id, 2, 100, &text)).collect();
        fit(&mut generations);
        assert!(generations.iter().all(|generation| generation.prefill_tokens.is_none()));
        assert!(generations.iter().any(|generation| !generation.top_tokens.is_empty()));
        assert!(generations.iter().any(|generation| generation.top_tokens.is_empty()));
        assert!(wire_bytes(&generations) < 4 << 20);
    }

    proptest! {
        #[test]
        fn the_bound_is_one(n_prompt in 0usize..300, n_top in 0usize..50, text in "\\PC{0,40}") {
            let generations = [generation(u64::MAX, n_prompt, n_top, &text)];
            let bound: usize = generations.iter().map(|generation| FIELD + size_at_most(generation)).sum();
            prop_assert!(wire_bytes(&generations) <= bound);
            let mut fitted = generations.clone();
            prop_assert!(fit(&mut fitted).is_empty());
            prop_assert_eq!(fitted, generations);
        }
    }
}
