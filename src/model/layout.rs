//! Where in stored tensors a role lies: fused blocks, experts in one tensor, transposed matrices, turned neighbours.

use super::runs::Runs;
use crate::error::{Error, Result};

/// Where a family's checkpoints keep a role.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Names of the tensor, the usual one first. In them `{layer}`, `{expert}` and `{head}` stand for numbers.
    pub names: &'static [&'static str],
    /// Which rows of the tensor, where it holds others too.
    block: Option<Block>,
    stack: Stack,
    orientation: Orientation,
    pairs: Option<Pairs>,
}

/// One of several blocks of rows that are fused in each of some equal groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    groups: usize,
    /// Rows of a group.
    group: usize,
    /// Where in a group the block begins.
    first: usize,
    /// Rows of the block in a group.
    count: usize,
}

/// Whether a tensor holds more than one matrix, or a matrix is held by more than one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// Neither.
    One,
    /// The matrices of all experts, one after the other.
    OfExperts(usize),
    /// A tensor for each row, `{head}` in its name.
    ByHead,
}

/// Which way round a linear weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Orientation {
    /// `[out, in]`.
    OutIn,
    /// `[in, out]`.
    InOut,
}

/// Heads of which a part turns in neighbouring pairs `(2i, 2i + 1)`. Scores depend on products of queries and keys
/// alone, so both may be loaded with `2i` moved to `i` and `2i + 1` to `i + width/2`, and turned by halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pairs {
    /// Width of a head.
    pub head: usize,
    /// Where in a head the turning part begins.
    pub first: usize,
    /// Width of the turning part.
    pub width: usize,
}

impl Pairs {
    /// The stored place of each of `n` numbers of whole heads.
    fn order(self, n: usize) -> impl Iterator<Item = usize> {
        let Pairs { head, first, width } = self;
        (0..n).map(move |i| {
            let within = i % head;
            let from = match within.checked_sub(first) {
                Some(turned) if turned < width / 2 => first + 2 * turned,
                Some(turned) if turned < width => first + 2 * (turned - width / 2) + 1,
                _ => within,
            };
            i - within + from
        })
    }
}

impl Place {
    /// A tensor of the role's own shape.
    pub const fn of(names: &'static [&'static str]) -> Place {
        Place { names, block: None, stack: Stack::One, orientation: Orientation::OutIn, pairs: None }
    }

    /// Nowhere: the family has no such role.
    pub const fn nowhere() -> Place {
        Place::of(&[])
    }

    /// Block `which` of those with `sizes` rows each, side by side in each of `groups`: `[q｜k｜v]` is one group of
    /// three blocks, BLOOM's rows are a group for each head, GPT-OSS's even and odd rows are groups of two rows.
    pub fn block(self, groups: usize, sizes: &[usize], which: usize) -> Place {
        let group = sizes.iter().sum();
        let first = sizes.iter().take(which).sum();
        let count = sizes.get(which).copied().unwrap_or(0);
        Place { block: Some(Block { groups, group, first, count }), ..self }
    }

    /// A tensor that holds the matrices of all `n` experts.
    pub const fn stacked(self, n: usize) -> Place {
        Place { stack: Stack::OfExperts(n), ..self }
    }

    /// A tensor for each row, `{head}` in its name.
    pub const fn by_head(self) -> Place {
        Place { stack: Stack::ByHead, ..self }
    }

    /// A linear weight stored as `[in, out]`.
    pub const fn transposed(self) -> Place {
        Place { orientation: Orientation::InOut, ..self }
    }

    /// Heads that turn in neighbouring pairs. Where the role is a matrix of a norm for each head, its columns are meant,
    /// elsewhere the rows.
    pub const fn pairs(self, pairs: Pairs) -> Place {
        Place { pairs: Some(pairs), ..self }
    }

    /// How the tensors are to be read.
    pub fn stack(&self) -> Stack {
        self.stack
    }

    /// The shape of the stored tensor that holds a role of this shape.
    pub fn stored_shape(&self, role: &[usize]) -> Vec<usize> {
        let mut shape = role.to_vec();
        if let (Some(block), Some(rows)) = (self.block, shape.first_mut()) {
            *rows = block.groups * block.group;
        }
        if self.orientation == Orientation::InOut {
            shape.reverse();
        }
        match self.stack {
            Stack::One => {}
            Stack::OfExperts(n) => shape.insert(0, n),
            Stack::ByHead => drop(shape.remove(0)),
        }
        shape
    }

    /// Where a role of this shape lies in its tensor: `per_head` says that it is a matrix of a norm for each head,
    /// `expert` is its number among those stacked.
    ///
    /// # Errors
    /// [`Error::Bug`] when the blocks do not make up the role, or no whole heads.
    pub fn view(&self, role: &[usize], per_head: bool, expert: usize) -> Result<View> {
        let n_rows = role.first().copied().unwrap_or(1);
        let n_columns = role.get(1).copied().unwrap_or(1);
        let (mut rows, all_rows) = match self.block {
            None => (Runs::range(0..n_rows), n_rows),
            Some(Block { groups, group, first, count }) => {
                (Runs::equal(first, groups, group, count), groups * group)
            }
        };
        if rows.len() != n_rows {
            let text = format!("blocks of {} rows for a role of {n_rows} ({})", rows.len(), self.usual());
            return Err(Error::Bug(text));
        }
        let mut columns = Runs::range(0..n_columns);
        if let Some(pairs) = self.pairs {
            let axis = if per_head { &mut columns } else { &mut rows };
            if pairs.head == 0
                || !axis.len().is_multiple_of(pairs.head)
                || pairs.first + pairs.width > pairs.head
            {
                let text = format!("{pairs:?} in {} rows ({})", axis.len(), self.usual());
                return Err(Error::Bug(text));
            }
            let stored: Vec<usize> = axis.iter().collect();
            *axis = pairs.order(stored.len()).map(|i| stored[i]).collect();
        }
        let (row_stride, column_stride) = match self.orientation {
            Orientation::OutIn => (n_columns, 1),
            Orientation::InOut => (1, all_rows),
        };
        let first = match self.stack {
            Stack::OfExperts(_) => expert * all_rows * n_columns,
            Stack::One | Stack::ByHead => 0,
        };
        Ok(View { first, rows, row_stride, columns, column_stride })
    }

    /// The usual name, as a pattern.
    fn usual(&self) -> &'static str {
        self.names.first().copied().unwrap_or("nameless")
    }
}

/// A matrix inside a stored tensor: number `(i, j)` is the tensor's number
/// `first + rows[i] · row_stride + columns[j] · column_stride`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Of the stored matrix's first row and column.
    pub first: usize,
    /// Stored rows.
    pub rows: Runs,
    /// Numbers from a stored row to the next.
    pub row_stride: usize,
    /// Stored columns.
    pub columns: Runs,
    /// Numbers from a stored column to the next.
    pub column_stride: usize,
}

#[cfg(test)]
mod tests;
