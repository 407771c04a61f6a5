//! Tensors that are not row-major: a transposed matrix, say, which is a view of another's numbers.

use crate::error::{Error, Result};

/// Strides of a row-major tensor, in numbers.
fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i].saturating_mul(shape[i]);
    }
    strides
}

/// Whether a tensor lies as a row-major one does. Strides of dimensions of one index are never used.
pub(super) fn is_row_major(shape: &[usize], strides: &[usize]) -> bool {
    shape.contains(&0)
        || row_major(shape).iter().zip(strides).zip(shape).all(|((a, b), &size)| a == b || size == 1)
}

/// Numbers from the first of a tensor to its last, both included; `None` where that is no `usize`.
pub(super) fn reach(shape: &[usize], strides: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape
        .iter()
        .zip(strides)
        .try_fold(1usize, |reach, (&size, &stride)| reach.checked_add((size - 1).checked_mul(stride)?))
}

/// The numbers of a tensor, row-major. `stored` has [`reach`] numbers of `size` bytes.
///
/// # Errors
/// [`Error::Exhausted`] when they do not fit in memory.
pub(super) fn gather(stored: &[u8], size: usize, shape: &[usize], strides: &[usize]) -> Result<Vec<u8>> {
    let n = shape.iter().product::<usize>();
    let mut gathered = Vec::new();
    gathered
        .try_reserve_exact(n * size)
        .map_err(|_| Error::Exhausted(format!("no memory for a transposed tensor of {} bytes", n * size)))?;
    let mut index = vec![0; shape.len()];
    let mut at = 0;
    for _ in 0..n {
        gathered.extend_from_slice(&stored[at * size..(at + 1) * size]);
        for dimension in (0..shape.len()).rev() {
            index[dimension] += 1;
            at += strides[dimension];
            if index[dimension] < shape[dimension] {
                break;
            }
            at -= shape[dimension] * strides[dimension];
            index[dimension] = 0;
        }
    }
    Ok(gathered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transposed_matrix_is_gathered() {
        let (shape, strides) = ([3, 2], [1, 3]);
        assert!(!is_row_major(&shape, &strides) && is_row_major(&[2, 3], &[3, 1]));
        assert_eq!(reach(&shape, &strides), Some(6));
        let stored: Vec<u8> = (0..6).flat_map(|i| [i, 100 + i]).collect();
        assert_eq!(
            gather(&stored, 2, &shape, &strides),
            Ok(vec![0, 100, 3, 103, 1, 101, 4, 104, 2, 102, 5, 105])
        );
        assert_eq!(gather(&stored, 2, &[], &[]), Ok(vec![0, 100]));
    }

    #[test]
    fn every_second_row_of_a_matrix_is_gathered() {
        assert_eq!(gather(&[0, 1, 2, 3, 4, 5, 6, 7], 1, &[2, 2], &[4, 1]), Ok(vec![0, 1, 4, 5]));
    }

    #[test]
    fn strides_of_what_has_no_second_index_do_not_matter() {
        assert!(is_row_major(&[1, 5], &[77, 1]) && is_row_major(&[5, 0], &[3, 9]) && is_row_major(&[], &[]));
        assert!(!is_row_major(&[2], &[2]) && !is_row_major(&[2, 2], &[0, 1]));
        assert_eq!(
            (reach(&[5, 0], &[3, 9]), reach(&[], &[]), reach(&[2, 3], &[0, 0])),
            (Some(0), Some(1), Some(1))
        );
    }

    #[test]
    fn what_reaches_beyond_all_numbers_has_no_reach() {
        assert_eq!(reach(&[usize::MAX, 2], &[usize::MAX, 1]), None);
        assert_eq!(reach(&[2, 2], &[usize::MAX - 1, 2]), None);
    }
}
