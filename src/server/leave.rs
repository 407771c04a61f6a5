//! The way out for a process in which something has failed.

use std::process::ExitCode;

/// Ends the process with a code. One rank may be waiting on its GPU for another that has failed, and an ordinary exit
/// would have the driver wait for it: a build with GPUs leaves at once.
#[cfg(feature = "cuda")]
pub fn leave(code: u8) -> ExitCode {
    use std::io::Write as _;
    // Whoever reads it may be gone.
    let _ = std::io::stdout().flush();
    crate::backend::cuda::exit_now(code)
}

/// Ends the process with a code.
#[cfg(not(feature = "cuda"))]
pub fn leave(code: u8) -> ExitCode {
    ExitCode::from(code)
}
