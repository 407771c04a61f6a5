//! The header of a safetensors file.

use std::sync::Arc;

use safetensors::tensor::{Metadata, TensorInfo};

use super::{Backing, Entry};
use crate::error::{Error, Result};

/// Longest header, as the format's own reader has it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Reads a header: a length (u64, little-endian), that many bytes of JSON, then the tensors.
pub(super) fn parse(name: &str, file: Backing) -> Result<Vec<(String, Entry)>> {
    let wrong = |what: String| Error::Checkpoint(format!("{name} is not a whole safetensors file: {what}"));
    let bytes: &[u8] = (*file).as_ref();
    let (length, rest) = bytes
        .split_first_chunk::<8>()
        .ok_or_else(|| wrong(format!("it has {} bytes, its header alone needs 8", bytes.len())))?;
    let header_len = u64::from_le_bytes(*length);
    if header_len > MAX_HEADER_BYTES || header_len > rest.len() as u64 {
        return Err(wrong(format!("it has {} bytes, its header claims {header_len}", bytes.len())));
    }
    let (header, data) = rest.split_at(header_len as usize);
    // Parsing checks that the tensors lie end to end from 0 and are as long as their dtypes and shapes say.
    let metadata: Metadata = serde_json::from_slice(header).map_err(|error| wrong(format!("{error}")))?;
    if metadata.data_len() != data.len() {
        let (claimed, held) = (metadata.data_len(), data.len());
        return Err(wrong(format!("its tensors have {claimed} bytes, {held} bytes follow the header")));
    }
    let start = bytes.len() - data.len();
    let entry = |info: &TensorInfo| Entry {
        dtype: info.dtype,
        shape: info.shape.clone(),
        strides: None,
        file: Arc::clone(&file),
        range: start + info.data_offsets.0..start + info.data_offsets.1,
        random: None,
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, entry(info))).collect())
}
