//! Prompts and outputs of all lengths.

use kvshard::pb::v3;

use super::calls::Case;
use super::prompt_len;

pub(super) fn cases() -> Vec<Case> {
    let n = prompt_len().to_string();
    let of = |max_new_tokens| {
        move |request: &mut v3::Request| {
            request.stopping_parameters.as_mut().unwrap().max_new_tokens = max_new_tokens;
        }
    };
    let longer = |request: &mut v3::Request| {
        let text = "jumps ".repeat(3000);
        request.input_chunks.as_mut().unwrap().chunks[0].chunk = Some(v3::input_chunk::Chunk::Text(text));
    };
    vec![
        Case::invalid("truncate 0", |request| request.truncate = 0, &["truncate is 0"]),
        Case::served("truncate 1", |request| request.truncate = 1),
        Case::known("the largest truncate", |request| request.truncate = u32::MAX),
        Case::invalid("no new tokens", of(0), &["max_new_tokens is 0"]),
        Case::invalid(
            "no stopping parameters",
            |request| request.stopping_parameters = None,
            &["max_new_tokens is 0"],
        ),
        Case::invalid("one position too many", of(513 - prompt_len()), &[&n, "513", "512"]),
        Case::invalid("the most new tokens", of(u32::MAX), &[&n, "4294967295", "512"]),
        Case::invalid(
            "a prompt beyond the positions",
            |request| {
                longer(request);
                request.truncate = u32::MAX;
            },
            &["511"],
        ),
        Case::invalid(
            "a prompt of all positions",
            |request| {
                longer(request);
                request.truncate = 512;
            },
            &["512", "511"],
        ),
        Case::served("the longest prompt", |request| {
            longer(request);
            request.truncate = 508;
        }),
    ]
}
