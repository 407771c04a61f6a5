//! See the library: this is its command line.

fn main() -> std::process::ExitCode {
    kvshard::commands::main()
}
