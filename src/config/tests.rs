use std::path::Path;

use clap::Parser as _;

use super::*;
use crate::cli::{Cli, Command};

fn shard(flags: &str) -> Result<ShardConfig, Refusal> {
    let line = format!("kvshard serve a/model {flags}");
    let command = Cli::try_parse_from(line.split_whitespace()).expect("well-formed").command;
    let Command::Serve(args) = command else { panic!("not serve") };
    serve(*args).map(|(config, _)| config.shard)
}

#[test]
fn what_is_not_there_is_refused_with_its_flag() {
    for flags in [
        "--device cuda",
        "--quantize gptq",
        "--speculate 3",
        "--lora-adapters mine",
        "--kv-cache-dtype fp8_e4m3fn",
        "--cuda-memory-fraction 0",
        "--cuda-memory-fraction NaN",
        "--num-shard 0",
        "--num-shard 1000000",
        "--max-lanes 0",
        "--max-batch-prefill-tokens 0",
        "--rope-factor 0.5",
        "--rope-factor inf",
        "--watermark-gamma 1",
        "--watermark-delta NaN",
        "--step-timeout 0",
        "--step-timeout NaN",
        "--step-timeout 1e300",
        "--inject-fault fire@3",
        "--inject-fault hang@0",
        "--sharded --rank 2 --world-size 2",
        "--sharded --rank 0 --world-size 2 --num-shard 3",
        "--sharded",
    ] {
        let Err(Refusal(message)) = shard(flags) else { panic!("{flags} was accepted") };
        let flag = flags.split_whitespace().next().expect("a flag");
        assert!(message.contains(flag) || flag == "--sharded", "{flags}: {message}");
    }
    assert!(shard("--speculate 0 --kv-cache-dtype auto --device cpu").is_ok());
}

#[test]
fn ranks_count_with_sharded_only() {
    let role_of = |flags| shard(flags).map(|config| (config.role, config.world_size)).expect("accepted");
    assert_eq!(role_of("--rank 3 --world-size 4"), (Role::Leader, 1));
    assert_eq!(role_of("--sharded --rank 3 --world-size 4"), (Role::Follower { rank: 3 }, 4));
    assert_eq!(role_of("--sharded --rank 0 --world-size 4 --num-shard 4"), (Role::Leader, 4));
    assert_eq!(role_of("--num-shard 2"), (Role::Leader, 2));
}

#[test]
fn steps_run_ahead_unless_told_otherwise() {
    let run_ahead = |flags| shard(flags).expect("accepted").run_ahead;
    assert_eq!(
        (run_ahead(""), run_ahead("--run-ahead on"), run_ahead("--run-ahead off")),
        (true, true, false)
    );
}

#[test]
fn rope_scaling_follows_the_launcher() {
    let rope = |flags| shard(flags).expect("accepted").rope;
    assert_eq!(rope(""), None);
    assert_eq!(rope("--rope-factor 2"), Some(RopeOverride { kind: RopeScalingKind::Linear, factor: 2.0 }));
    assert_eq!(
        rope("--rope-scaling dynamic"),
        Some(RopeOverride { kind: RopeScalingKind::Dynamic, factor: 1.0 })
    );
}

#[test]
fn prefix_caching_needs_chunking() {
    let modes =
        |flags| shard(flags).map(|config| (config.chunking, config.prefix_caching)).expect("accepted");
    assert_eq!(modes(""), (true, true));
    assert_eq!(modes("--prefix-caching 0"), (true, false));
    assert_eq!(modes("--prefill-chunking false"), (false, false));
}

#[test]
fn the_pool_is_what_was_asked_for_or_what_fits() {
    let auto = shard("").expect("accepted");
    assert_eq!(auto.pool_slots(1 << 10, Some(1 << 40)), Ok(131_072));
    assert_eq!(auto.pool_slots(1 << 20, Some(16 << 30)), Ok(4096));
    assert_eq!(auto.pool_slots(1 << 20, None), Ok(131_072));
    assert!(auto.pool_slots(1 << 40, Some(1 << 30)).is_err());
    let asked = shard("--pool-tokens 4096").expect("accepted");
    assert_eq!(asked.pool_slots(1 << 20, Some(4 << 30)), Ok(4096));
    assert!(asked.pool_slots(1 << 20, Some(4 << 20)).is_err());
    assert!(asked.pool_slots(u64::MAX, Some(u64::MAX)).is_err());
}

#[test]
fn own_slots_never_take_the_whole_pool() {
    let auto = shard("").expect("accepted");
    for (pool, own) in [(131_072, 2048), (32_768, 1024), (1000, 500), (2, 1), (0, 0)] {
        assert_eq!(auto.own_slots_of(pool), own, "pool of {pool}");
    }
    assert_eq!(shard("--own-slots 5000").expect("accepted").own_slots_of(4096), 4095);
}

#[test]
fn sockets_are_absolute_and_numbered() {
    let command =
        Cli::try_parse_from(["kvshard", "serve", "m", "--uds-path", "here"]).expect("parses").command;
    let Command::Serve(args) = command else { panic!("not serve") };
    let (config, _) = serve(*args).expect("accepted");
    let path = config.socket.path_of(2);
    assert!(path.is_absolute() && path.ends_with("here-2"), "{path:?}");
    assert_eq!(SocketConfig::private(Path::new("/x")).path_of(0), Path::new("/x/shard-0"));
}

#[test]
fn log_levels_have_upper_case_names() {
    for (name, level) in
        [("INFO", LogLevel::Info), ("warning", LogLevel::Warning), ("CRITICAL", LogLevel::Error)]
    {
        assert_eq!(name.parse(), Ok(level));
    }
    assert!("loud".parse::<LogLevel>().is_err());
}

#[test]
fn a_token_is_not_printed() {
    let line = ["kvshard", "download-weights", "m", "--hf-token", "hf_secret"];
    let Command::DownloadWeights(args) = Cli::try_parse_from(line).expect("parses").command else {
        panic!("not download-weights")
    };
    let (config, _) = download(*args).expect("accepted");
    assert_eq!(config.source.token.as_deref(), Some("hf_secret"));
    assert!(!format!("{config:?}").contains("secret"));
}

fn bench_of(flags: &str) -> Result<BenchConfig, Refusal> {
    let line = format!("kvshard bench --url unix:///s {flags}");
    let command = Cli::try_parse_from(line.split_whitespace()).expect("well-formed").command;
    let Command::Bench(args) = command else { panic!("not bench") };
    bench(*args).map(|(config, _)| config)
}

#[test]
fn loads_come_in_order_with_enough_requests() {
    let loads = |flags| bench_of(flags).expect("accepted").loads;
    let closed = |in_flight, n_requests| Load::Closed { in_flight, n_requests };
    assert_eq!(loads(""), [closed(1, 16)]);
    assert_eq!(loads("--concurrency 8"), [closed(8, 32)]);
    assert_eq!(loads("--at-once --requests 256"), [closed(256, 256)]);
    assert_eq!(loads("--sweep 1,2,40 -n 99"), [closed(1, 99), closed(2, 99), closed(40, 99)]);
    assert_eq!(
        loads("--rate-sweep 0.1,20"),
        [Load::Open { rate: 0.1, n_requests: 16 }, Load::Open { rate: 20.0, n_requests: 600 }]
    );
    for flags in ["--concurrency 0", "--sweep 1,0", "--rate 0", "--rate NaN", "--rate-sweep 1,-2", "-n 0"] {
        assert!(bench_of(flags).is_err(), "{flags}");
    }
}

#[test]
fn lengths_are_written_as_they_are_read() {
    for text in ["1", "512", "uniform:128..1024", "normal:512,128.5", "lognormal:300,0.5"] {
        assert_eq!(text.parse::<Lengths>().map(|lengths| lengths.to_string()), Ok(text.to_owned()));
    }
    for text in [
        "",
        "0",
        "-1",
        "1.5",
        "2000000",
        "uniform:0..4",
        "uniform:5..4",
        "uniform:5",
        "normal:0,1",
        "normal:5,-1",
        "normal:5",
        "normal:NaN,1",
        "lognormal:5,inf",
        "poisson:5",
    ] {
        assert!(text.parse::<Lengths>().is_err(), "{text}");
    }
    assert_eq!([f64::NEG_INFINITY, 0.2, 7.4, f64::INFINITY].map(Lengths::clamp), [1, 1, 7, 1 << 20]);
}
