use proptest::prelude::*;

use super::*;

const TENSOR: &[u8] =
    b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nHalfStorage\nU\x017U\x03cpuK\x06tQ\
    K\x01K\x02K\x02\x86K\x02K\x01\x86\x89}tR";

fn pickle(parts: &[&[u8]]) -> Vec<u8> {
    [b"\x80\x02", parts.concat().as_slice(), b"."].concat()
}

fn told(parts: &[&[u8]]) -> String {
    read_tensors(&pickle(parts)).unwrap_err()
}

#[test]
fn a_table_of_tensors_is_read_in_its_order() {
    let view = View {
        storage: Storage { key: "7", dtype: Dtype::F16, n_elements: 6 },
        offset: 1,
        shape: vec![2, 2],
        strides: vec![2, 1],
    };
    let both: &[&[u8]] = &[b"ccollections\nOrderedDict\n)R(U\x01b", TENSOR, b"U\x01a", TENSOR, b"u"];
    let named = |pickle: &[u8]| {
        let named = read_tensors(pickle).unwrap().into_iter();
        named.map(|(name, view)| (name.to_owned(), view.shape)).collect::<Vec<_>>()
    };
    let expected = vec![("b".to_owned(), vec![2, 2]), ("a".to_owned(), vec![2, 2])];
    assert_eq!(named(&pickle(both)), expected);
    assert_eq!(read_tensors(&pickle(both)).unwrap()[0].1, view);
    let nested: &[&[u8]] = &[b"}U\x0astate_dict", &both.concat(), b"s"];
    assert_eq!(named(&pickle(nested)), expected);
    // A parameter, whose name is remembered and recalled.
    let parameter: &[&[u8]] =
        &[b"U\x01pq\x05}h\x05ctorch._utils\n_rebuild_parameter\n", TENSOR, b"\x88}\x87Rs"];
    assert_eq!(named(&pickle(parameter)), [("p".to_owned(), vec![2, 2])]);
}

#[test]
fn what_makes_no_tensor_is_told() {
    for (parts, words) in [
        (
            &[&b"cos\nsystem\nU\x02ls\x85R"[..]][..],
            "at byte 2 of its pickle, it asks for \"os.system\"; only",
        ),
        (&[b"c__builtin__\neval\n"], "it asks for \"__builtin__.eval\""),
        (&[b"ctorch\nQInt8Storage\n"], "it asks for \"torch.QInt8Storage\""),
        (
            &[b"ctorch._utils\n_rebuild_sparse_tensor\n"],
            "it asks for \"torch._utils._rebuild_sparse_tensor\"",
        ),
        (&[b"c\x1b[31mred\x00\nx\n"], "it asks for \"\\u{1b}[31mred\\0.x\""),
        (&[b"cno end"], "a name does not end"),
        (&[b"i"], "instruction 0x69 is not one that torch writes"),
        (&[b"\x81"], "instruction 0x81"),
        (&[b"\x80\x04"], "it is of protocol 4; torch writes protocol 2"),
        (&[b"h\x07"], "nothing was remembered as 7"),
        (&[b"q\x07"], "there is nothing to remember"),
        (&[b"t"], "there is no mark"),
        (&[b"K\x01(\x85"], "1 values are taken from a stack that has fewer"),
        (&[b"K\x02s"], "2 values are taken from a stack that has fewer"),
        (&[b"K\x01K\x02K\x03s"], "items are set of what is no dict"),
        (&[b"}(K\x01u"], "a key has no value"),
        (&[b"K\x01)R"], "a value is called that is no function"),
        (&[b"ccollections\nOrderedDict\nK\x01R"], "its arguments are no tuple"),
        (&[b"ccollections\nOrderedDict\nK\x01\x85R"], "OrderedDict has arguments that it cannot have"),
        (&[b"ctorch._utils\n_rebuild_tensor_v2\n)R"], "RebuildTensor has arguments"),
        (&[b"ctorch\nFloatStorage\n)R"], "StorageOf(F32) has arguments"),
        (&[b"K\x01Q"], "a storage is described by no tuple"),
        (&[b")Q"], "a storage is described otherwise than torch does"),
        (
            &[b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuJ\xff\xff\xff\xfftQ"],
            "a storage has -1 numbers",
        ),
        (&[b"U\x02\xff\xff"], "a text is no UTF-8"),
        (&[b"X\xff\xff\xff\xff"], "it is cut short: 4294967295 bytes are needed, 1 left"),
        (&[b"\x8a\x09\0\0\0\0\0\0\0\0\x01"], "a number has 9 bytes"),
        (&[b""], "1 values are taken from a stack"),
        (&[b"K\x01"], "it holds no table of tensors"),
        (&[b"}"], "it holds no tensors"),
        (&[b"}U\x01xK\x01s"], "it holds no tensors"),
        (&[b"}(U\x01x", TENSOR, b"U\x01x", TENSOR, b"u"], "it holds tensor \"x\" twice"),
    ] {
        let told = told(parts);
        assert!(told.contains(words), "{told:?} for {words:?}");
    }
    assert!(read_tensors(b"").unwrap_err().contains("it is cut short"));
}

#[test]
fn numbers_come_in_every_length() {
    let long = |bytes: &[u8]| {
        let program = [&[bytes.len() as u8], bytes].concat();
        Program { bytes: &program, at: 0 }.long()
    };
    assert_eq!(long(&[]), Ok(0));
    assert_eq!(long(&[0xFF]), Ok(-1));
    assert_eq!(long(&[0x80, 0]), Ok(128));
    assert_eq!(long(&(1i64 << 40).to_le_bytes()), Ok(1 << 40));
    assert_eq!(long(&i64::MIN.to_le_bytes()), Ok(i64::MIN));
}

/// A table in itself, tuples of tuples, and tables that are built for ever: none is followed, and each is bounded.
#[test]
fn cycles_and_depth_do_no_harm() {
    let mut own = b"}q\x01U\x04selfh\x01sU\x0astate_dicth\x01s".to_vec();
    assert_eq!(told(&[&own]), "it holds no tensors");
    own.extend(b"U\x01x");
    assert!(read_tensors(&pickle(&[&own, TENSOR, b"s"])).is_ok());
    let deep = vec![0x85; 1 << 19];
    assert_eq!(told(&[b"K\x01", &deep]), "it holds no table of tensors");
    let endless = vec![b'N'; MAX_VALUES + 1];
    assert!(told(&[&endless]).contains("it makes more than 2097152 values"));
    let tuples = [b"q\x01h\x01".as_slice(), b"\x85"].concat().repeat(MAX_VALUES / 2);
    assert!(told(&[b"N", &tuples]).contains("it makes more than"));
    let remembered: Vec<u8> =
        (0..=MAX_VALUES as u32).flat_map(|key| [&b"r"[..], &key.to_le_bytes()].concat()).collect();
    assert!(told(&[b"N", &remembered]).contains("it makes more than"));
    let marks = vec![b'('; MAX_VALUES + 1];
    assert!(told(&[&marks, b"N"]).contains("it makes more than"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any sequence of known instructions, with arguments that are small enough to fit together sometimes.
    #[test]
    fn no_program_does_harm(
        instructions in prop::collection::vec(
            prop_oneof![
                prop::sample::select(b".(N])}tusaeRbQ\x85\x86\x87\x88\x89".to_vec()).prop_map(|byte| vec![byte]),
                (prop::sample::select(b"Kqh".to_vec()), 0..4u8).prop_map(|(byte, argument)| vec![byte, argument]),
                Just(b"U\x07storage".to_vec()),
                Just(b"ccollections\nOrderedDict\n".to_vec()),
                Just(b"ctorch\nFloatStorage\n".to_vec()),
                Just(TENSOR.to_vec()),
                any::<u8>().prop_map(|byte| vec![byte]),
            ],
            0..60,
        ),
    ) {
        let program = instructions.concat();
        if let Ok(named) = read_tensors(&program) {
            prop_assert!(named.iter().all(|(_, view)| view.shape.len() == view.strides.len()));
        }
    }
}
