//! Messages too large, in and out.

use std::fs;

use kvshard::pb::v3;
use prost::Message as _;
use serde_json::Value;
use tonic::Code;

use super::{PROMPT, Witness, known};
use crate::support::fixture;
use crate::support::shard::{TestShard, on_slots, prefill, request, run_to_end};

/// What a router takes.
const MAX_ANSWER_BYTES: usize = 4 << 20;

#[tokio::test]
async fn a_message_beyond_the_limit_is_refused_with_the_numbers() {
    let mut witness = Witness::start(&["--max-message-mb", "1"]).await;
    let sized = |n_bytes: usize| v3::Request { inputs: "x".repeat(n_bytes), ..known(7) };
    for n_bytes in [1 << 20, 5 << 20, 40 << 20] {
        let status = witness.shard.client.prefill(prefill(7, vec![sized(n_bytes)], None)).await.unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange, "{status}");
        assert!(status.message().contains("1048576"), "{status}");
        witness.check("a message beyond the limit").await;
    }
    let fits = run_to_end(&mut witness.shard.client, 7, vec![sized((1 << 20) - 4096)]).await;
    assert_eq!(fits, [witness.known.clone()]);
    witness.finish().await;
}

#[tokio::test]
async fn alternatives_of_many_rows_fit_an_answer() {
    let flags = ["--enable-prefill-logprobs", "--pool-tokens", "12000", "--own-slots", "2000"];
    let mut witness = Witness::start(&flags).await;
    // Every lane but the running request's.
    let requests: Vec<v3::Request> = (1000..1063)
        .map(|id| {
            let mut wide = request(id, &PROMPT.repeat(3), 1);
            (wide.truncate, wide.top_n_tokens, wide.prefill_logprobs) = (120, u32::MAX, true);
            let first = 300 + 120 * (id as u32 - 1000);
            on_slots(wide, first..first + 120)
        })
        .collect();
    let answer = witness.shard.client.prefill(prefill(7, requests, None)).await.unwrap().into_inner();
    assert!(answer.encoded_len() < MAX_ANSWER_BYTES);
    assert_eq!((answer.generations.len(), answer.batch), (63, None));
    for generation in &answer.generations {
        assert_eq!(generation.top_tokens.len(), 1);
        assert_eq!(generation.top_tokens[0].ids.len(), 100, "more than asked for by anybody, less than all");
        assert_eq!(generation.prefill_tokens.as_ref().unwrap().ids.len(), 120);
    }
    witness.check("alternatives of many rows").await;
    witness.finish().await;
}

/// A model with a token whose text is a page, so that a short prompt makes a long answer.
fn wordy_model() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("llama")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let page = format!("<{}>", "page ".repeat(4000));
    let path = folder.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    added.iter_mut().find(|token| token["content"] == "<eoh>").unwrap()["content"] = page.as_str().into();
    fs::write(&path, tokenizer.to_string()).unwrap();
    (folder, page)
}

#[tokio::test]
async fn prompt_tokens_beyond_an_answer_are_left_out_for_that_request_alone() {
    let (model, page) = wordy_model();
    let mut witness =
        Witness::before(TestShard::start_folder(model.path(), &["--enable-prefill-logprobs"]).await).await;
    let asking = |request: v3::Request| v3::Request { prefill_logprobs: true, ..request };
    let large = asking(request(8, &page.repeat(300), 1));
    let small = asking(v3::Request { id: 9, ..request(9, PROMPT, 1) });
    let call = prefill(7, vec![large, small], None);
    assert!(call.encoded_len() > MAX_ANSWER_BYTES);
    let answer = witness.shard.client.prefill(call).await.unwrap().into_inner();
    assert!(answer.encoded_len() < MAX_ANSWER_BYTES);
    let [large, small] = answer.generations.as_slice() else {
        panic!("{} requests", answer.generations.len())
    };
    assert!(large.prefill_tokens.is_none(), "six megabytes");
    assert_eq!(large.tokens.as_ref().unwrap().ids.len(), 1);
    assert!(small.prefill_tokens.as_ref().is_some_and(|tokens| tokens.texts.concat().contains("fox")));
    assert_eq!(small.tokens.as_ref().unwrap().ids[..], witness.known.ids[..1]);
    witness.check("a prompt of pages").await;
    witness.finish().await;
}

#[tokio::test]
async fn the_longest_lists_of_slots_are_read() {
    let mut witness = Witness::start(&[]).await;
    let mut greedy = on_slots(known(7), 300..500);
    greedy.slots.extend(std::iter::repeat_n(u32::MAX, 1 << 20));
    greedy.blocks = vec![u32::MAX; 1 << 20];
    // Surplus slots count for nothing, if they could be slots at all.
    let status = witness.shard.client.prefill(prefill(7, vec![greedy], None)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    witness.check("a million slots").await;
    witness.finish().await;
}
