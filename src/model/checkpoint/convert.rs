//! `pytorch_model*.bin` → safetensors beside them, for programs that read nothing else, and a faster start.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use super::{Entry, Format, Index, map};
use crate::error::{Error, Result};

/// Bytes between two reports.
const CHUNK_BYTES: usize = 16 << 20;

/// Writes the tensors of a folder's `pytorch_model*.bin` as `model*.safetensors` beside them, with an index where
/// they are several, all in their dtypes. Each file gets its name when all are whole, the index last. Returns the
/// names of the weight files written; none where the folder has safetensors already, or nothing to convert.
///
/// Of tensors that share their numbers, which safetensors cannot express, the file's first is written: modules are
/// listed in the order of their definition, so an embedding goes before the head that is tied to it. Tensors that
/// overlap otherwise are written in full.
///
/// `progress` hears of bytes done, and of all.
///
/// # Errors
/// [`Error::Checkpoint`] for files that cannot be read, see [`super::Checkpoint::open`], or written.
pub fn convert(folder: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<String>> {
    let has = |name: &str| folder.join(name).is_file();
    if has(Format::Safetensors.single()) || has(Format::Safetensors.index()) {
        return Ok(Vec::new());
    }
    let index;
    let (files, is_listed) = if has(Format::Torch.single()) {
        let name = Format::Torch.single();
        (BTreeMap::from([(name, map(folder, Format::Torch, name)?)]), false)
    } else if has(Format::Torch.index()) {
        index = Index::read(folder, Format::Torch)?;
        (index.map(folder)?, true)
    } else {
        return Ok(Vec::new());
    };
    let n_files = files.len();
    let files: BTreeMap<String, Vec<(String, Entry)>> = files
        .into_iter()
        .map(|(name, tensors)| (safetensors_name(name), without_duplicates(tensors)))
        .collect();
    if files.len() < n_files {
        let index = Format::Torch.index();
        return Err(Error::Checkpoint(format!(
            "{index} names files that would get the same name as safetensors"
        )));
    }
    check_growth(&files)?;
    let total: u64 = files.values().flatten().map(|(_, entry)| entry.n_bytes() as u64).sum();
    let mut done = 0;
    let mut partial = Partial { folder, names: Vec::new() };
    for (name, tensors) in &files {
        partial.write(name, |file| {
            write_safetensors(file, tensors, &mut |written| {
                done += written;
                progress(done, total);
            })
        })?;
    }
    if is_listed {
        let of_file = |(file, tensors): (&String, &Vec<(String, Entry)>)| {
            tensors.iter().map(|(name, _)| (name.clone(), file.clone())).collect::<Vec<_>>()
        };
        let weight_map: BTreeMap<String, String> = files.iter().flat_map(of_file).collect();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        partial.write(Format::Safetensors.index(), |file| Ok(serde_json::to_writer_pretty(file, &index)?))?;
    }
    partial.complete()?;
    Ok(files.into_keys().collect())
}

/// `pytorch_model-00001-of-00002.bin` → `model-00001-of-00002.safetensors`.
fn safetensors_name(name: &str) -> String {
    let stem = name.strip_suffix(".bin").unwrap_or(name);
    format!("{}.safetensors", stem.strip_prefix("pytorch_").unwrap_or(stem))
}

/// A file's tensors, of those that are the same numbers in the same order only the first.
fn without_duplicates(mut tensors: Vec<(String, Entry)>) -> Vec<(String, Entry)> {
    let mut seen = BTreeSet::new();
    tensors.retain(|(_, entry)| {
        let Entry { dtype, shape, strides, range, .. } = entry;
        // Empty tensors share nothing.
        range.is_empty() || seen.insert((range.start, range.end, *dtype, shape.clone(), strides.clone()))
    });
    tensors
}

/// Tensors that overlap are written in full, but a few numbers must not fill a disk.
fn check_growth(files: &BTreeMap<String, Vec<(String, Entry)>>) -> Result<()> {
    for (name, tensors) in files {
        let needed = tensors.iter().try_fold(0usize, |sum, (_, entry)| sum.checked_add(entry.n_bytes()));
        let held = tensors.first().map_or(0, |(_, entry)| (*entry.file).as_ref().len());
        if needed.is_none_or(|needed| needed / 2 > held) {
            let needed = needed.map_or("far too many".to_owned(), |needed| needed.to_string());
            return Err(Error::Checkpoint(format!(
                "{name} is not written: its tensors take {needed} bytes, its file has {held}"
            )));
        }
    }
    Ok(())
}

impl Entry {
    fn n_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a safetensors file: widest dtypes first, so that every tensor lies at a multiple of its number's size.
fn write_safetensors(
    file: &mut BufWriter<File>,
    tensors: &[(String, Entry)],
    progress: &mut dyn FnMut(u64),
) -> Result<(), WriteError> {
    let mut tensors: Vec<&(String, Entry)> = tensors.iter().collect();
    tensors.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.dtype.bitsize()));
    let mut end = 0;
    let info = |(name, entry): &&(String, Entry)| {
        let start = end;
        end += entry.n_bytes();
        (
            name.clone(),
            TensorInfo { dtype: entry.dtype, shape: entry.shape.clone(), data_offsets: (start, end) },
        )
    };
    // Libraries ask for this mark of who wrote a file.
    let written_by = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(written_by), tensors.iter().map(info).collect())
        .map_err(|error| WriteError::Other(error.to_string()))?;
    let mut header = serde_json::to_vec(&metadata)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (_, entry) in tensors {
        let entry = entry.in_row_major_order().map_err(|error| WriteError::Other(error.to_string()))?;
        for chunk in (*entry.file).as_ref()[entry.range.clone()].chunks(CHUNK_BYTES) {
            file.write_all(chunk)?;
            progress(chunk.len() as u64);
        }
    }
    Ok(())
}

/// Why a file could not be written.
enum WriteError {
    Io(io::Error),
    Other(String),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> WriteError {
        WriteError::Io(error)
    }
}

impl From<serde_json::Error> for WriteError {
    fn from(error: serde_json::Error) -> WriteError {
        WriteError::Other(error.to_string())
    }
}

/// Files that do not have their names yet. Dropped before that, they are removed.
struct Partial<'a> {
    folder: &'a Path,
    names: Vec<String>,
}

impl Partial<'_> {
    /// Another process may be at the same work.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!(".{name}.{}.partial", std::process::id()))
    }

    /// Writes one file, down to the disk.
    fn write(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut BufWriter<File>) -> Result<(), WriteError>,
    ) -> Result<()> {
        self.names.push(name.to_owned());
        let written = || {
            let mut file = BufWriter::new(File::create(self.path(name))?);
            write(&mut file)?;
            file.flush()?;
            Ok(file.get_ref().sync_all()?)
        };
        written().map_err(|error: WriteError| {
            let why = match error {
                WriteError::Io(error) => error.to_string(),
                WriteError::Other(why) => why,
            };
            Error::Checkpoint(format!("{name} cannot be written: {why}"))
        })
    }

    /// Gives the files their names, in the order in which they were written.
    fn complete(mut self) -> Result<()> {
        while let Some(name) = self.names.first() {
            fs::rename(self.path(name), self.folder.join(name))
                .map_err(|error| Error::Checkpoint(format!("{name} cannot be written: {error}")))?;
            self.names.remove(0);
        }
        Ok(())
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            // Nothing can be done about a file that stays.
            let _ = fs::remove_file(self.path(name));
        }
    }
}

#[cfg(test)]
mod tests;
