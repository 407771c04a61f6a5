//! What `torch.save` writes since 1.6: a zip archive with the pickle of a state dict, and a file for each storage.

use std::sync::Arc;

use super::pickle::{self, View};
use super::zip::{self, Directory};
use super::{Backing, Entry, shown, strides};
use crate::error::{Error, Result};

/// Longest pickle: one tensor takes some 200 bytes.
const MAX_PICKLE_BYTES: usize = 64 << 20;
/// How files began before 1.6: protocol 2, then torch's magic number 0x1950a86a20f9469cfc6c.
const LEGACY: [u8; 14] = [0x80, 2, 0x8A, 10, 0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19];

/// The tensors of a file, in its order.
///
/// # Errors
/// [`Error::Checkpoint`] naming the file and what is wrong with it; [`Error::Unsupported`] for the format of before
/// torch 1.6.
pub(super) fn parse(name: &str, file: Backing) -> Result<Vec<(String, Entry)>> {
    let bytes: &[u8] = (*file).as_ref();
    if bytes.starts_with(&LEGACY) {
        return Err(Error::Unsupported(format!(
            "{name} is in the format that torch wrote before 1.6; load it with torch and save it again"
        )));
    }
    let wrong = |what: String| Error::Checkpoint(format!("{name} is not a whole file of torch.save: {what}"));
    let archive = Archive::read(bytes).map_err(wrong)?;
    let tensors = pickle::read_tensors(archive.pickle).map_err(wrong)?;
    let mut entries = Vec::with_capacity(tensors.len());
    for (tensor, view) in tensors {
        let told = |what: String| wrong(format!("tensor {}: {what}", shown(tensor)));
        entries.push((tensor.to_owned(), archive.entry(view, &file).map_err(told)?));
    }
    Ok(entries)
}

struct Archive<'a> {
    files: Directory<'a>,
    /// The folder that all files are in, with its slash.
    root: &'a str,
    pickle: &'a [u8],
}

impl<'a> Archive<'a> {
    fn read(bytes: &'a [u8]) -> Result<Archive<'a>, String> {
        const PICKLE: &str = "data.pkl";
        let files = zip::read_directory(bytes)?;
        let is_pickle = |root: &str| root.ends_with('/') && root.matches('/').count() == 1;
        let mut roots =
            files.keys().filter_map(|path| path.strip_suffix(PICKLE)).filter(|root| is_pickle(root));
        let (Some(root), None) = (roots.next(), roots.next()) else {
            return Err(format!("the archive does not hold one {PICKLE}"));
        };
        let contents =
            |file: &str| files.get(format!("{root}{file}").as_str()).map(|range| &bytes[range.clone()]);
        match contents("byteorder") {
            None | Some(b"little") => {}
            Some(_) => return Err("its numbers are not little-endian".to_owned()),
        }
        let pickle = contents(PICKLE).unwrap_or_default();
        if pickle.len() > MAX_PICKLE_BYTES {
            return Err(format!(
                "its pickle has {} bytes, at most {MAX_PICKLE_BYTES} are read",
                pickle.len()
            ));
        }
        Ok(Archive { root, pickle, files })
    }

    /// Where a tensor is, seen in place.
    fn entry(&self, view: View<'_>, file: &Backing) -> Result<Entry, String> {
        let View { storage, offset, shape, strides } = view;
        let stored = self.files.get(format!("{}data/{}", self.root, storage.key).as_str());
        let key = shown(storage.key);
        let stored = stored.ok_or_else(|| format!("its storage {key} is not in the archive"))?;
        let size = storage.dtype.bitsize() / 8;
        let n_stored = storage.n_elements;
        if n_stored.checked_mul(size) != Some(stored.len()) {
            let held = stored.len();
            return Err(format!("its storage {key} has {held} bytes for {n_stored} numbers of {size} bytes"));
        }
        // A view that repeats numbers would take more memory than its file.
        let n_elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let end = strides::reach(&shape, &strides).and_then(|reach| reach.checked_add(offset));
        match (n_elements, end) {
            (Some(n_elements), Some(end)) if n_elements <= n_stored && end <= n_stored => {
                let start = stored.start + offset * size;
                Ok(Entry {
                    dtype: storage.dtype,
                    strides: Some(strides).filter(|strides| !strides::is_row_major(&shape, strides)),
                    shape,
                    file: Arc::clone(file),
                    range: start..stored.start + end * size,
                    random: None,
                })
            }
            _ => Err(format!(
                "the shape {shape:?} with the strides {strides:?} from {offset} on is not in a storage of {n_stored} \
                 numbers"
            )),
        }
    }
}

#[cfg(test)]
mod tests;
