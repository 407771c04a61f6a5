//! Any file of `torch.save` has tensors inside it, or is told in a sentence: `cargo fuzz run torch`.

#![no_main]

use kvshard::model::checkpoint::Checkpoint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(checkpoint) = Checkpoint::from_torch_bytes(file.to_vec()) else { return };
    for name in checkpoint.names() {
        if let Ok(Some(tensor)) = checkpoint.tensor(name) {
            let size = tensor.dtype.size_bytes();
            assert_eq!(tensor.bytes().len(), tensor.shape.iter().product::<usize>() * size);
            assert!(tensor.bytes().as_ptr().addr().is_multiple_of(size));
        }
    }
});
