use std::collections::BTreeSet;

use clap::{CommandFactory as _, Parser as _};

use super::{Cli, Command, ENVIRONMENT, Exit, Variable, parse_listen};

fn serve_command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command.find_subcommand("serve").expect("serve").clone()
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_variable_is_a_flag_or_is_listed_as_ignored() {
    let serve = serve_command();
    let by_variable =
        |name: &str| serve.get_arguments().find(|arg| arg.get_env().is_some_and(|env| env == name));
    let help = serve.get_after_long_help().expect("notes").to_string();
    for (name, variable) in ENVIRONMENT {
        match variable {
            Variable::Flag(flag) => {
                let arg = by_variable(name).unwrap_or_else(|| panic!("{name} is read by no flag"));
                assert_eq!(arg.get_long(), Some(*flag), "{name}");
            }
            Variable::Ignored(reason) => {
                assert!(by_variable(name).is_none(), "{name} is read although it is listed as ignored");
                assert!(help.contains(&format!("{name}: {reason}")), "{name} is missing in the help");
            }
        }
    }
}

#[test]
fn the_table_holds_what_the_launcher_documents() {
    let documented = "RANK WORLD_SIZE MASTER_ADDR MASTER_PORT ATTENTION PREFIX_CACHING PREFILL_CHUNKING \
         CUDA_MEMORY_FRACTION TGI_WIGGLE_ROOM CUDA_GRAPHS REQUEST_LOGPROBS LORA_ADAPTERS WATERMARK_GAMMA \
         WATERMARK_DELTA ROPE_SCALING ROPE_FACTOR MAX_TOTAL_TOKENS MAX_BATCH_SIZE HF_TOKEN HF_API_TOKEN HF_HOME \
         HUGGINGFACE_HUB_CACHE HF_HUB_OFFLINE WEIGHTS_CACHE_OVERRIDE HF_HUB_ENABLE_HF_TRANSFER \
         SAFETENSORS_FAST_GPU TORCH_NCCL_AVOID_RECORD_STREAMS USE_FLASH_ATTENTION DISABLE_CUSTOM_KERNELS \
         EXLLAMA_VERSION DISABLE_EXLLAMA DEBUG LOG_LEVEL";
    let documented: BTreeSet<&str> = documented.split_whitespace().collect();
    let table: BTreeSet<&str> = ENVIRONMENT.iter().map(|(name, _)| *name).collect();
    assert_eq!(table, documented);
    assert_eq!(table.len(), ENVIRONMENT.len(), "a variable is listed twice");
}

#[test]
fn what_the_launcher_writes_is_understood() {
    let line = "text-generation-server serve some/model --uds-path /run/tgi --logger-level WARNING --json-output \
         --trust-remote-code --sharded --quantize awq --speculate 2 --dtype bfloat16 --kv-cache-dtype fp8_e5m2 \
         --revision main --otlp-endpoint http://collector:4317 --otlp-service-name shard --max-input-tokens 512";
    let Command::Serve(args) = Cli::try_parse_from(line.split_whitespace()).expect("parses").command else {
        panic!("not serve");
    };
    assert_eq!(args.model.as_deref(), Some("some/model"));
    assert!(args.shard.sharded && args.log.json_output);
    assert_eq!(args.shard.speculate, Some(2));
    assert_eq!(args.shard.max_input_tokens, Some(512));

    let line = "text-generation-server download-weights some/model --extension .safetensors --auto-convert \
         --logger-level INFO --json-output --trust-remote-code --merge-lora --revision main";
    let Command::DownloadWeights(args) =
        Cli::try_parse_from(line.split_whitespace()).expect("parses").command
    else {
        panic!("not download-weights");
    };
    assert!(crate::config::download(*args).is_ok(), "the launcher always asks to merge adapters");
    let line = "text-generation-server serve m --no-sharded --no-json-output --no-trust-remote-code";
    assert!(Cli::try_parse_from(line.split_whitespace()).is_ok());
}

#[test]
fn a_port_alone_means_loopback() {
    for (text, expected) in [
        ("50051", "127.0.0.1:50051"),
        (":50051", "127.0.0.1:50051"),
        ("localhost:1", "127.0.0.1:1"),
        ("0.0.0.0:80", "0.0.0.0:80"),
        ("[::1]:80", "[::1]:80"),
    ] {
        assert_eq!(parse_listen(text).map(|addr| addr.to_string()), Ok(expected.to_owned()), "{text}");
    }
    for text in ["", "host", "70000", "unix:///tmp/x"] {
        assert!(parse_listen(text).is_err(), "{text}");
    }
}

#[test]
fn exit_codes_differ_and_are_documented() {
    let codes: BTreeSet<u8> = Exit::ALL.iter().map(|(exit, _)| exit.code()).collect();
    assert_eq!(codes.len(), Exit::ALL.len());
    let help = serve_command().get_after_long_help().expect("notes").to_string();
    for (exit, text) in Exit::ALL {
        assert!(help.contains(&format!("{}  {text}", exit.code())));
    }
}
