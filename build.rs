//! Compiles `proto/` into Rust and a descriptor set, with a protobuf compiler written in Rust: no protoc. With the
//! feature `cuda`, compiles `kernels/` too.

use std::{env, error::Error, fs, path::PathBuf, process::ExitCode};

use prost::Message as _;

#[path = "build/kernels.rs"]
mod kernels;

fn main() -> ExitCode {
    match generate() {
        Ok(()) => ExitCode::SUCCESS,
        // As it was written: what a compiler says of a kernel has many lines.
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn generate() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let descriptors =
        protox::compile(["generate/v2/generate.proto", "generate/v3/generate.proto"], ["proto"])?;
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels::build(&out)?;
    }
    Ok(())
}
