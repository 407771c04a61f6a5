//! The same program under the name by which TGI's launcher starts a shard.

fn main() -> std::process::ExitCode {
    kvshard::commands::main()
}
