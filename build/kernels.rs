//! nvcc over `kernels/*.cu`: each file on its own, in parallel, and only if its content, a header, the compiler or the
//! architectures changed.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::error::Error;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Names the architectures, separated by commas: compute capabilities (`80`, `90a`), and `ptx` for code that the driver
/// compiles for newer ones.
const ARCHITECTURES: &str = "KVSHARD_CUDA_ARCHS";
const DEFAULT_ARCHITECTURES: &str = "80,90a,ptx";
/// A folder that keeps compiled kernels between builds, by content.
const CACHE: &str = "KVSHARD_KERNEL_CACHE";

/// Compiles the kernels and tells cargo to link them.
pub fn build(out: &Path) -> Result<(), Box<dyn Error>> {
    for variable in [ARCHITECTURES, CACHE, "CUDA_HOME", "NVCC", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let nvcc = Nvcc::find()?;
    let (mut sources, mut headers) = (Vec::new(), Vec::new());
    for entry in fs::read_dir("kernels")? {
        let path = entry?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh" | "h") => headers.push(path),
            _ => {}
        }
    }
    sources.sort();
    headers.sort();
    let mut shared = DefaultHasher::new();
    nvcc.version.hash(&mut shared);
    nvcc.flags.hash(&mut shared);
    for header in &headers {
        fs::read(header)?.hash(&mut shared);
    }
    let cache = env::var_os(CACHE).map_or_else(|| out.join("kernels"), PathBuf::from);
    fs::create_dir_all(&cache)?;
    let jobs = sources.iter().map(|source| {
        let mut content = shared.clone();
        fs::read(source)?.hash(&mut content);
        let stem = source.file_stem().ok_or("a kernel without a name")?.to_string_lossy();
        Ok((source.as_path(), cache.join(format!("{stem}-{:016x}.o", content.finish()))))
    });
    let jobs: Vec<(&Path, PathBuf)> = jobs.collect::<Result<_, Box<dyn Error>>>()?;
    compile_all(&nvcc, &jobs)?;
    archive(&jobs, &out.join("libkvshard_kernels.a"))?;
    println!("cargo:rustc-link-search=native={}", out.display());
    println!("cargo:rustc-link-lib=static=kvshard_kernels");
    println!("cargo:rustc-link-search=native={}", nvcc.libraries.display());
    println!("cargo:rustc-link-lib=static=cudart_static");
    for library in ["stdc++", "rt", "dl", "pthread"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    Ok(())
}

/// The compiler, and how it is called.
struct Nvcc {
    program: PathBuf,
    version: String,
    flags: Vec<String>,
    /// Where `libcudart_static.a` lies.
    libraries: PathBuf,
}

impl Nvcc {
    fn find() -> Result<Nvcc, Box<dyn Error>> {
        // An empty variable counts as none.
        let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = path("CUDA_HOME");
        let program = path("NVCC").or_else(|| home.as_ref().map(|home| home.join("bin/nvcc")));
        let program = program.or_else(on_path).unwrap_or_else(|| PathBuf::from("nvcc"));
        let version = version(&program).map_err(|why| {
            format!(
                "{} does not run ({why}): the feature `cuda` needs nvcc 12.8 or newer on the PATH or in CUDA_HOME; \
                 the README says how to get it without the whole toolkit",
                program.display()
            )
        })?;
        let root = match home {
            Some(home) => home,
            None => {
                let program = fs::canonicalize(&program)
                    .map_err(|error| format!("{}: {error}: set CUDA_HOME", program.display()))?;
                program.ancestors().nth(2).ok_or("nvcc lies in no toolkit")?.to_path_buf()
            }
        };
        let folders = ["lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"];
        let folders = folders.map(|folder| root.join(folder));
        let libraries = folders.into_iter().find(|folder| folder.join("libcudart_static.a").is_file());
        let libraries =
            libraries.ok_or_else(|| format!("libcudart_static.a is not below {}", root.display()))?;
        let mut flags: Vec<String> =
            ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
                .map(str::to_owned)
                .to_vec();
        let architectures = env::var(ARCHITECTURES).unwrap_or_else(|_| DEFAULT_ARCHITECTURES.to_owned());
        for architecture in architectures.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            flags.push("-gencode".to_owned());
            flags.push(match architecture {
                "ptx" => "arch=compute_90,code=compute_90".to_owned(),
                capability => format!("arch=compute_{capability},code=sm_{capability}"),
            });
        }
        Ok(Nvcc { program, version, flags, libraries })
    }

    fn compile(&self, source: &Path, object: &Path) -> Result<(), String> {
        // Under another name first: a build that is broken off leaves no half of an object, and builds that share the
        // cache don't meet in one.
        let unfinished = object.with_extension(format!("{}.o", process::id()));
        let compiled = Command::new(&self.program)
            .args(&self.flags)
            .arg("-c")
            .arg(source)
            .arg("-o")
            .arg(&unfinished)
            .output()
            .map_err(|error| format!("{}: {error}", self.program.display()))?;
        if !compiled.status.success() {
            let errors = String::from_utf8_lossy(&compiled.stderr);
            return Err(format!("{} does not compile:\n{errors}", source.display()));
        }
        fs::rename(&unfinished, object).map_err(|error| format!("{}: {error}", object.display()))
    }
}

fn on_path() -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// What `nvcc --version` says.
fn version(nvcc: &Path) -> Result<String, String> {
    let asked = Command::new(nvcc).arg("--version").output().map_err(|error| error.to_string())?;
    match asked.status.success() {
        true => Ok(String::from_utf8_lossy(&asked.stdout).into_owned()),
        false => Err(format!("{}: {}", asked.status, String::from_utf8_lossy(&asked.stderr).trim())),
    }
}

/// Compiles what is not there yet, a file a core.
fn compile_all(nvcc: &Nvcc, jobs: &[(&Path, PathBuf)]) -> Result<(), Box<dyn Error>> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let work = || {
        while let Some((source, object)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if object.is_file() {
                continue;
            }
            if let Err(error) = nvcc.compile(source, object) {
                *failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
                return;
            }
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(work);
        }
    });
    match failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

fn archive(jobs: &[(&Path, PathBuf)], library: &Path) -> Result<(), Box<dyn Error>> {
    // `ar` adds to an archive that is there.
    if library.is_file() {
        fs::remove_file(library)?;
    }
    let program = env::var_os("AR").unwrap_or_else(|| "ar".into());
    let made =
        Command::new(program).arg("crs").arg(library).args(jobs.iter().map(|(_, object)| object)).status()?;
    if !made.success() {
        return Err("ar failed".into());
    }
    Ok(())
}
