//! The directory of a zip archive whose files lie in it uncompressed, as `torch.save` writes them.
//!
//! Layout after PKWARE's APPNOTE 6.3.10: each file behind a local header, then the central directory, then the records
//! that say where it is; with 64-bit fields (zip64) where files are large.

use std::collections::BTreeMap;
use std::ops::Range;

use super::shown;

/// Longest directory: an entry for each tensor of the largest checkpoint takes a tenth.
const MAX_DIRECTORY_BYTES: usize = 64 << 20;

const LOCAL_HEADER: u32 = 0x0403_4B50;
const CENTRAL_HEADER: u32 = 0x0201_4B50;
const END: u32 = 0x0605_4B50;
const END_64: u32 = 0x0606_4B50;
const LOCATOR_64: u32 = 0x0706_4B50;

const LOCAL_HEADER_BYTES: usize = 30;
const CENTRAL_HEADER_BYTES: usize = 46;
const END_BYTES: usize = 22;
const LOCATOR_64_BYTES: usize = 20;

/// Longest comment behind the last record.
const MAX_COMMENT_BYTES: usize = 0xFFFF;
/// The number of a field that is too large for it: the extra field has it in 64 bits.
const IN_EXTRA: u64 = 0xFFFF_FFFF;
/// The extra field of 64-bit numbers.
const EXTRA_64: u16 = 1;

/// File name → where its bytes are in the archive.
pub(super) type Directory<'a> = BTreeMap<&'a str, Range<usize>>;

/// Reads the directory of an archive. No two of its files overlap.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub(super) fn read_directory(archive: &[u8]) -> Result<Directory<'_>, String> {
    let Central { n_files, range } = Central::find(archive)?;
    if range.len() > MAX_DIRECTORY_BYTES {
        return Err(format!(
            "its directory has {} bytes, at most {MAX_DIRECTORY_BYTES} are read",
            range.len()
        ));
    }
    let end = range.start;
    let mut rest = archive.get(range).ok_or("its directory lies outside of it")?;
    let mut files = Directory::new();
    for number in 0..n_files {
        let (file, after) = File::split_from(rest).ok_or_else(|| {
            format!("its directory is cut short: it claims {n_files} files, number {number} is not whole")
        })?;
        rest = after;
        let bytes = file.locate(archive, end)?;
        if files.insert(file.name()?, bytes).is_some() {
            return Err(format!("it holds {} twice", shown(file.name()?)));
        }
    }
    if !rest.is_empty() {
        return Err(format!("its directory has {} bytes more than its {n_files} files take", rest.len()));
    }
    let mut ranges: Vec<&Range<usize>> = files.values().collect();
    ranges.sort_by_key(|range| (range.start, range.end));
    match ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
        true => Err("some of its files overlap".to_owned()),
        false => Ok(files),
    }
}

/// Where the central directory is.
struct Central {
    n_files: u64,
    range: Range<usize>,
}

impl Central {
    fn find(archive: &[u8]) -> Result<Central, String> {
        let end = find_end(archive).ok_or("it is cut short: the directory at its end is missing")?;
        let numbers = match locate_end_64(archive, end) {
            Some(at) => {
                (|| Some((u64_at(archive, at + 32)?, u64_at(archive, at + 40)?, u64_at(archive, at + 48)?)))()
            }
            None => (|| {
                let n_files = u16_at(archive, end + 10)?;
                Some((n_files.into(), u32_at(archive, end + 12)?.into(), u32_at(archive, end + 16)?.into()))
            })(),
        };
        let (n_files, size, offset) = numbers.ok_or("the record of its directory is cut short")?;
        let range = range_of(offset, size).filter(|range| range.end <= end);
        let range = range.ok_or_else(|| {
            format!(
                "its directory is said to be at {offset}, {size} bytes long, in a file of {}",
                archive.len()
            )
        })?;
        Ok(Central { n_files, range })
    }
}

/// The offset of the last record: the signature whose comment reaches to the end of the file.
fn find_end(archive: &[u8]) -> Option<usize> {
    let last = archive.len().checked_sub(END_BYTES)?;
    (last.saturating_sub(MAX_COMMENT_BYTES)..=last).rev().find(|&at| {
        u32_at(archive, at) == Some(END)
            && u16_at(archive, at + 20).is_some_and(|comment| usize::from(comment) == last - at)
    })
}

/// The offset of the 64-bit record, if there is one before the last record.
fn locate_end_64(archive: &[u8], end: usize) -> Option<usize> {
    let locator = end.checked_sub(LOCATOR_64_BYTES).filter(|&at| u32_at(archive, at) == Some(LOCATOR_64))?;
    let at = usize::try_from(u64_at(archive, locator + 8)?).ok().filter(|&at| at < locator)?;
    (u32_at(archive, at)? == END_64).then_some(at)
}

/// One file's entry in the central directory.
struct File<'a> {
    header: &'a [u8],
    name: &'a [u8],
    extra: &'a [u8],
}

impl<'a> File<'a> {
    /// The first entry of a directory, and the others.
    fn split_from(directory: &'a [u8]) -> Option<(File<'a>, &'a [u8])> {
        let (header, rest) = directory.split_at_checked(CENTRAL_HEADER_BYTES)?;
        if u32_at(header, 0)? != CENTRAL_HEADER {
            return None;
        }
        let (name, rest) = rest.split_at_checked(u16_at(header, 28)?.into())?;
        let (extra, rest) = rest.split_at_checked(u16_at(header, 30)?.into())?;
        let (_comment, rest) = rest.split_at_checked(u16_at(header, 32)?.into())?;
        Some((File { header, name, extra }, rest))
    }

    fn name(&self) -> Result<&'a str, String> {
        std::str::from_utf8(self.name).map_err(|_| "the name of one of its files is no UTF-8".to_owned())
    }

    /// Where the file's bytes are, before `end`.
    fn locate(&self, archive: &[u8], end: usize) -> Result<Range<usize>, String> {
        let name = shown(self.name()?);
        let field = |at| u16_at(self.header, at).unwrap_or_default();
        let (flags, method) = (field(8), field(10));
        if flags & 1 != 0 {
            return Err(format!("{name} in it is encrypted"));
        }
        if method != 0 {
            return Err(format!("{name} in it is compressed (method {method}), which torch never does"));
        }
        let cut = || format!("the entry of {name} is cut short");
        let (stored, size, offset) = self.sizes().ok_or_else(cut)?;
        if stored != size {
            return Err(format!("{name} is said to have {size} bytes, and {stored} as they are stored"));
        }
        let bytes = self.bytes_behind_local_header(archive, offset, size).filter(|bytes| bytes.end <= end);
        bytes.ok_or_else(|| format!("{name} is said to be at {offset}, {size} bytes long, where it is not"))
    }

    /// Bytes in the archive, bytes of the file, and the offset of its local header: those that do not fit in 32 bits
    /// are in the extra field, in the order of size, stored size, offset.
    fn sizes(&self) -> Option<(u64, u64, u64)> {
        let mut extra = self.extra_64();
        let mut wide = |at: usize| match u64::from(u32_at(self.header, at)?) {
            IN_EXTRA => {
                let (number, rest) = extra.split_first_chunk::<8>()?;
                extra = rest;
                Some(u64::from_le_bytes(*number))
            }
            number => Some(number),
        };
        let (size, stored) = (wide(24)?, wide(20)?);
        Some((stored, size, wide(42)?))
    }

    fn extra_64(&self) -> &'a [u8] {
        let mut rest = self.extra;
        while let (Some(kind), Some(length)) = (u16_at(rest, 0), u16_at(rest, 2)) {
            let Some((field, after)) = rest[4..].split_at_checked(length.into()) else { break };
            if kind == EXTRA_64 {
                return field;
            }
            rest = after;
        }
        &[]
    }

    /// The local header has the name once more, and padding of a length of its own.
    fn bytes_behind_local_header(&self, archive: &[u8], offset: u64, size: u64) -> Option<Range<usize>> {
        let local = archive.get(usize::try_from(offset).ok()?..)?;
        if u32_at(local, 0)? != LOCAL_HEADER {
            return None;
        }
        let (name_len, extra_len) = (usize::from(u16_at(local, 26)?), usize::from(u16_at(local, 28)?));
        let name = local.get(LOCAL_HEADER_BYTES..LOCAL_HEADER_BYTES + name_len)?;
        let start = offset.checked_add((LOCAL_HEADER_BYTES + name_len + extra_len) as u64)?;
        range_of(start, size).filter(|_| name == self.name)
    }
}

fn range_of(start: u64, length: u64) -> Option<Range<usize>> {
    let end = start.checked_add(length)?;
    Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|number| u16::from_le_bytes(*number))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|number| u32::from_le_bytes(*number))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|number| u64::from_le_bytes(*number))
}
