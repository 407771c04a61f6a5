//! Activations on the GPU.

use super::device::Buffer;
use super::world::Joint;
use crate::error::{Error, Result};

/// What a tensor's numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// The backend's 16-bit dtype.
    Half,
    /// f32.
    Single,
}

impl Numbers {
    /// Bytes of one.
    pub fn size_bytes(self) -> usize {
        match self {
            Numbers::Half => 2,
            Numbers::Single => 4,
        }
    }
}

/// `[rows, width]`, row-major. Rows begin at multiples of 16 bytes; what lies between them is zero, so that a product may
/// run over it.
pub struct Tensor {
    buffer: Buffer,
    /// Those of all ranks, once they are shared.
    joint: Option<Joint>,
    /// Rows that there is room for.
    pub rows: usize,
    /// Numbers in a row.
    pub width: usize,
    /// Numbers from row to row.
    pub stride: usize,
    /// What they are.
    pub numbers: Numbers,
}

impl Tensor {
    /// Over a buffer of zeros with room for it.
    pub fn new(buffer: Buffer, rows: usize, width: usize, numbers: Numbers) -> Tensor {
        Tensor { buffer, joint: None, rows, width, stride: padded(width), numbers }
    }

    /// The address of the first number.
    pub fn ptr<T>(&self) -> *mut T {
        self.buffer.ptr()
    }

    /// Takes note of where the other ranks' tensors of this kind lie.
    pub fn share(&mut self, joint: Joint) {
        self.joint = Some(joint);
    }

    /// Every rank's tensor of this kind.
    ///
    /// # Errors
    /// [`Error::Bug`] for a tensor that was not shared.
    pub fn joint(&self) -> Result<Joint> {
        self.joint.ok_or_else(|| Error::Bug("a tensor that no other rank can see".into()))
    }

    /// The memory.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

/// Numbers from row to row, of rows of so many: eight 16-bit numbers are 16 bytes.
pub fn padded(width: usize) -> usize {
    width.next_multiple_of(8)
}
