//! A router of one request: Prefill, then Decode until the end.
//!
//! It may run beside a live router: its ids are random, it names no slots, and it clears nothing but its own batch.

use std::hash::{BuildHasher as _, RandomState};
use std::io::{ErrorKind, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tonic::Status;

use super::shard::{Shard, connect};
use crate::config::Parameters;
use crate::pb::v3;

/// How a generation went.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Tokens generated.
    pub n_tokens: u32,
    /// From the call to the first token.
    pub first_token: Duration,
    /// From the call to the last token.
    pub total: Duration,
    /// Why it ended.
    pub ending: Ending,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model ended it.
    EndOfText,
    /// By a stop sequence.
    StopSequence,
    /// By its length.
    Length,
    /// Whoever read it has gone.
    ReaderLeft,
}

impl Summary {
    /// Tokens a second, the first one left out: it waited for the prompt.
    pub fn tokens_per_second(&self) -> f64 {
        let decoding = (self.total - self.first_token).as_secs_f64();
        if decoding > 0.0 { f64::from(self.n_tokens.saturating_sub(1)) / decoding } else { 0.0 }
    }

    /// In a line.
    pub fn line(&self) -> String {
        format!(
            "{} tokens, {:.0} tokens/s, first token after {:.1} ms ({})",
            self.n_tokens,
            self.tokens_per_second(),
            self.first_token.as_secs_f64() * 1e3,
            match self.ending {
                Ending::EndOfText => "end of text",
                Ending::StopSequence => "stop sequence",
                Ending::Length => "length",
                Ending::ReaderLeft => "reader left",
            }
        )
    }
}

/// Generates from one prompt on the shard at `url`; each token's text goes to `out` as it comes.
///
/// # Errors
/// What the shard answered, and what `out` could not take.
pub async fn generate(url: &str, prompt: &str, parameters: &Parameters, out: &mut impl Write) -> Result<Summary> {
    let mut shard = connect(url).await?;
    let batch = RandomState::new().hash_one("batch");
    let outcome = run(&mut shard, batch, prompt, parameters, out).await;
    if !matches!(&outcome, Ok(summary) if summary.ending != Ending::ReaderLeft) {
        // What is left of it would hold slots for minutes; a shard that is gone holds nothing.
        let _ = shard.clear_cache(v3::ClearCacheRequest { id: Some(batch) }).await;
    }
    outcome
}

async fn run(
    shard: &mut Shard,
    batch: u64,
    prompt: &str,
    parameters: &Parameters,
    out: &mut impl Write,
) -> Result<Summary> {
    let began = Instant::now();
    let request = request(prompt, parameters);
    let call = v3::PrefillRequest {
        batch: Some(v3::Batch { id: batch, size: 1, requests: vec![request], ..Default::default() }),
        cached_batch: None,
    };
    let answer = shard.prefill(call).await.map_err(told)?.into_inner();
    let (mut generations, mut cached) = (answer.generations, answer.batch);
    let mut first_token = None;
    let mut n_tokens = 0;
    loop {
        for generation in generations {
            let tokens = generation.tokens.unwrap_or_default();
            first_token.get_or_insert_with(|| began.elapsed());
            n_tokens += tokens.ids.len() as u32;
            let shown = tokens.texts.iter().zip(&tokens.is_special).filter(|(_, special)| !**special);
            let text: String = shown.map(|(text, _)| text.as_str()).collect();
            let ending = match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
                Ok(()) => generation.generated_text.map(|text| ending(&text)),
                Err(error) if error.kind() == ErrorKind::BrokenPipe => Some(Ending::ReaderLeft),
                Err(error) => return Err(error.into()),
            };
            if let Some(ending) = ending {
                let first_token = first_token.unwrap_or_default();
                return Ok(Summary { n_tokens, first_token, total: began.elapsed(), ending });
            }
        }
        let Some(batch) = cached else { bail!("the shard lost the request") };
        let answer = shard.decode(v3::DecodeRequest { batches: vec![batch] }).await.map_err(told)?.into_inner();
        (generations, cached) = (answer.generations, answer.batch);
    }
}

fn request(prompt: &str, parameters: &Parameters) -> v3::Request {
    let chunk = v3::InputChunk { chunk: Some(v3::input_chunk::Chunk::Text(prompt.to_owned())) };
    v3::Request {
        id: RandomState::new().hash_one("request") >> 1,
        inputs: prompt.to_owned(),
        // What is too long is refused by the shard, with its limit, and not cut in silence.
        truncate: u32::MAX,
        parameters: Some(v3::NextTokenChooserParameters {
            temperature: parameters.temperature,
            top_k: parameters.top_k,
            top_p: parameters.top_p,
            typical_p: parameters.typical_p,
            do_sample: parameters.do_sample,
            seed: parameters.seed,
            repetition_penalty: parameters.repetition_penalty,
            ..Default::default()
        }),
        stopping_parameters: Some(v3::StoppingCriteriaParameters {
            max_new_tokens: parameters.max_new_tokens,
            stop_sequences: parameters.stop.clone(),
            ignore_eos_token: false,
        }),
        input_chunks: Some(v3::Input { chunks: vec![chunk] }),
        add_special_tokens: true,
        ..Default::default()
    }
}

fn ending(text: &v3::GeneratedText) -> Ending {
    match text.finish_reason() {
        v3::FinishReason::EosToken => Ending::EndOfText,
        v3::FinishReason::StopSequence => Ending::StopSequence,
        v3::FinishReason::Length => Ending::Length,
    }
}

/// What a status says to a person.
fn told(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}
