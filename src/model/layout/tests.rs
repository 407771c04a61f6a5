use super::*;

/// The tensor's number of every number of a role, row after row.
fn numbers(place: Place, role: &[usize], per_head: bool, expert: usize) -> Vec<Vec<usize>> {
    let view = place.view(role, per_head, expert).unwrap();
    let stored: usize = place.stored_shape(role).iter().product();
    let number = |row, column| view.first + row * view.row_stride + column * view.column_stride;
    let numbers: Vec<Vec<usize>> =
        view.rows.iter().map(|row| view.columns.iter().map(|column| number(row, column)).collect()).collect();
    assert!(numbers.iter().flatten().all(|&number| number < stored), "{numbers:?} of {stored}");
    numbers
}

/// The first column, for layouts that move rows.
fn first_of_rows(place: Place, role: &[usize]) -> Vec<usize> {
    let columns = role.get(1).copied().unwrap_or(1);
    let numbers = numbers(place, role, false, 0);
    assert!(numbers.iter().all(|row| row.len() == columns));
    numbers.into_iter().map(|row| row[0] / columns).collect()
}

const ANY: Place = Place::of(&["any"]);

#[test]
fn a_tensor_of_its_own_is_read_as_it_stands() {
    assert_eq!(ANY.stored_shape(&[2, 3]), [2, 3]);
    assert_eq!(numbers(ANY, &[2, 3], false, 0), [[0, 1, 2], [3, 4, 5]]);
    assert_eq!(numbers(ANY, &[3], false, 0), [[0], [1], [2]]);
}

/// `[q｜k｜v]` of 4, 2 and 2 rows.
#[test]
fn blocks_side_by_side() {
    let part = |which| ANY.block(1, &[4, 2, 2], which);
    assert_eq!(part(1).stored_shape(&[2, 5]), [8, 5]);
    assert_eq!(part(1).stored_shape(&[2]), [8]);
    assert_eq!(first_of_rows(part(0), &[4, 5]), [0, 1, 2, 3]);
    assert_eq!(first_of_rows(part(1), &[2, 5]), [4, 5]);
    assert_eq!(first_of_rows(part(2), &[2]), [6, 7]);
}

/// BLOOM's `(head, {q, k, v}, d)` of 3 heads of 2, and Falcon's `[2 q｜k｜v]` of 2 groups with heads of 2.
#[test]
fn blocks_in_each_group() {
    let of_head = |which| ANY.block(3, &[2, 2, 2], which);
    assert_eq!(of_head(0).stored_shape(&[6, 4]), [18, 4]);
    assert_eq!(first_of_rows(of_head(0), &[6, 4]), [0, 1, 6, 7, 12, 13]);
    assert_eq!(first_of_rows(of_head(2), &[6, 4]), [4, 5, 10, 11, 16, 17]);
    let of_group = |which| ANY.block(2, &[4, 2, 2], which);
    assert_eq!(first_of_rows(of_group(0), &[8, 3]), [0, 1, 2, 3, 8, 9, 10, 11]);
    assert_eq!(first_of_rows(of_group(1), &[4, 3]), [4, 5, 12, 13]);
}

/// GPT-OSS: `[experts, in, 2 · width]`, even columns gates, odd ones the other factor.
#[test]
fn experts_in_one_transposed_tensor() {
    let (experts, hidden, width) = (3, 4, 2);
    let part = |which| ANY.stacked(experts).transposed().block(width, &[1, 1], which);
    assert_eq!(part(0).stored_shape(&[width, hidden]), [experts, hidden, 2 * width]);
    for (expert, which) in [(0, 0), (1, 0), (2, 1)] {
        let number = |output: usize, input: usize| {
            expert * hidden * 2 * width + input * 2 * width + 2 * output + which
        };
        let expected: Vec<Vec<usize>> =
            (0..width).map(|output| (0..hidden).map(|input| number(output, input)).collect()).collect();
        assert_eq!(numbers(part(which), &[width, hidden], false, expert), expected);
    }
    let bias = ANY.stacked(experts).block(width, &[1, 1], 1);
    assert_eq!(bias.stored_shape(&[width]), [experts, 2 * width]);
    assert_eq!(numbers(bias, &[width], false, 2), [[9], [11]]);
    let down = ANY.stacked(experts).transposed();
    assert_eq!(down.stored_shape(&[hidden, width]), [experts, width, hidden]);
    assert_eq!(numbers(down, &[hidden, width], false, 1)[3], [11, 15]);
}

/// Row `2i` of the turning part goes to `i`, row `2i + 1` to `i + width/2`, in every head.
#[test]
fn pairs_become_halves() {
    let place = ANY.pairs(Pairs { head: 6, first: 0, width: 4 });
    assert_eq!(first_of_rows(place, &[12, 3]), [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]);
    assert_eq!(first_of_rows(place, &[6]), [0, 2, 1, 3, 4, 5]);
    // The last part of a head turns; of the latent's projection the last rows alone.
    let last = ANY.pairs(Pairs { head: 6, first: 2, width: 4 });
    assert_eq!(first_of_rows(last, &[6, 1]), [0, 1, 2, 4, 3, 5]);
    // Inside fused blocks: ChatGLM2's keys after 2 heads of queries.
    let keys = ANY.block(1, &[8, 4, 4], 1).pairs(Pairs { head: 4, first: 0, width: 4 });
    assert_eq!(first_of_rows(keys, &[4, 2]), [8, 10, 9, 11]);
    let per_head = ANY.pairs(Pairs { head: 4, first: 0, width: 4 });
    assert_eq!(numbers(per_head, &[2, 4], true, 0), [[0, 2, 1, 3], [4, 6, 5, 7]]);
}

#[test]
fn a_tensor_for_each_row_has_one_dimension() {
    assert_eq!(ANY.by_head().stored_shape(&[4, 6]), [6]);
    assert_eq!(numbers(Place::of(&["any"]), &[2, 2], true, 0), [[0, 1], [2, 3]]);
}

#[test]
fn what_does_not_make_up_the_role_is_a_fault_of_ours() {
    let wrong = |place: Place, role: &[usize]| place.view(role, false, 0).unwrap_err().to_string();
    assert!(wrong(ANY.block(1, &[4, 2], 0), &[3, 1]).contains("blocks of 4 rows for a role of 3 (any)"));
    assert!(wrong(ANY.block(1, &[4, 2], 7), &[4, 1]).contains("blocks of 0 rows"));
    let pairs = ANY.pairs(Pairs { head: 4, first: 0, width: 4 });
    assert!(wrong(pairs, &[6, 1]).contains("in 6 rows (any)"));
}
