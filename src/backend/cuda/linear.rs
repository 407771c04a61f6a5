//! Linear layers: our own kernels where few rows make the reading of the weights the limit, cuBLASLt for the rest.
//!
//! Which of them is best for a shape and a number of rows is measured at start. A number of rows that was not measured
//! takes what was best for the next larger one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys as driver;

use super::device::{Buffer, Device, launched};
use super::ffi;
use super::tensor::{Numbers, Tensor};
use super::weight::Weight;
use crate::backend::Product;
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::spec::Activation;

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms of cuBLASLt that are tried, for products that are bound by the weights and for those bound by arithmetic,
/// where its first guesses are further off.
const N_CANDIDATES: usize = 8;
const N_LARGE_CANDIDATES: usize = 12;
/// Rows from which arithmetic is the bound.
const LARGE_ROWS: usize = 512;
/// Ways that are measured a second time.
const N_FINALISTS: usize = 6;
/// Layers of a chain, whose weights no cache holds together.
const N_CHAINED: usize = 4;
/// Passes over a chain that are measured together: a few milliseconds, after as many unmeasured ones, so that clocks and
/// power are those of sustained work.
const N_CHAIN_PASSES: usize = 6;
/// How often every product of a chain may change its way.
const N_ROUNDS: usize = 2;
/// By how much a way must shorten the chain to be taken: less is noise.
const WORTHWHILE: f32 = 0.998;
/// Bytes of weights over which a measurement rotates, so that they come from memory as they do in a step: more than
/// twice the largest cache.
const ROTATED_BYTES: usize = 256 << 20;

/// Products of rows with weights on one GPU.
pub struct Linear {
    device: Device,
    dtype: DType,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    own_workspace: Buffer,
    choices: RefCell<BTreeMap<Key, BTreeMap<usize, Choice>>>,
}

/// What a choice depends on, beside the number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    outputs: usize,
    inputs: usize,
    /// 0 stored, 1 logits, 2 added, 3 gated.
    product: u8,
    has_bias: bool,
}

/// How a product is made.
#[derive(Debug, Clone, Copy)]
enum Choice {
    Own { variant: i32 },
    Library(sys::cublasLtMatmulAlgo_t),
}

/// One product.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// The layer.
    pub weight: &'a Weight,
    /// What becomes of it.
    pub product: Product,
    /// Rows in use.
    pub rows: usize,
    /// `[rows, inputs]`.
    pub x: &'a Tensor,
    /// `[rows, outputs]`, or half as wide for a gate.
    pub out: &'a Tensor,
    /// `[rows, outputs]` for a gate that is made in two steps.
    pub scratch: Option<&'a Tensor>,
}

impl Call<'_> {
    fn key(&self) -> Key {
        let product = match self.product {
            Product::Stored => 0,
            Product::Logits => 1,
            Product::Added => 2,
            Product::Gated(_) => 3,
        };
        let Weight { outputs, stride, .. } = *self.weight;
        Key { outputs, inputs: stride, product, has_bias: self.weight.bias.is_some() }
    }
}

fn library(what: &str) -> impl Fn(CublasError) -> Error + '_ {
    move |error| Error::DeviceLost(format!("cuBLASLt: {what} failed: {:?}", error.0))
}

impl Linear {
    /// Opens cuBLASLt.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where its library is not found.
    pub fn new(device: &Device, dtype: DType) -> Result<Linear> {
        let Some(handle) = super::device::silently(result::create_handle) else {
            return Err(Error::Unsupported(
                "libcublasLt.so.13 is not found: install CUDA's libraries, or name their folder in LD_LIBRARY_PATH"
                    .into(),
            ));
        };
        // SAFETY: a question about sizes.
        let own_bytes = unsafe { ffi::kv_linear_workspace_bytes() };
        Ok(Linear {
            dtype,
            handle: handle.map_err(library("opening"))?,
            workspace: device.alloc(WORKSPACE_BYTES)?,
            own_workspace: device.alloc(own_bytes as usize)?,
            choices: RefCell::default(),
            device: device.clone(),
        })
    }

    /// Queues a product, the way that is best for it.
    pub fn run(&self, call: &Call<'_>) -> Result<()> {
        if call.rows == 0 {
            return Ok(());
        }
        let known = {
            let choices = self.choices.borrow();
            let of_shape = choices.get(&call.key());
            of_shape.and_then(|rows| rows.range(call.rows..).next()).map(|(_, choice)| *choice)
        };
        if let Some(choice) = known
            && self.run_by(call, &choice)?
        {
            return Ok(());
        }
        // A shape or number of rows that nobody measured: what the library thinks best, remembered.
        for algorithm in self.candidates(call, N_CANDIDATES)? {
            let choice = Choice::Library(algorithm);
            if self.run_by(call, &choice)? {
                self.choices.borrow_mut().entry(call.key()).or_default().insert(call.rows, choice);
                return Ok(());
            }
        }
        let Weight { outputs, stride, .. } = *call.weight;
        Err(Error::Unsupported(format!("cuBLASLt has no product of {} × {stride} with {outputs}", call.rows)))
    }

    /// Measures every way of making a layer's products, given in their order, and keeps the best. Each product has the
    /// weights of several layers.
    ///
    /// What is best alone may be in the way of its neighbours: a kernel of ours begins to read its weights while the one
    /// before it still runs. So few rows are measured as a step runs them: in a recorded chain of layers, of which one
    /// product after the other takes the way that shortens the chain most.
    pub fn tune(&self, products: &[(Call<'_>, &[&Weight])]) -> Result<()> {
        let mut finalists = Vec::new();
        for (call, weights) in products {
            finalists.push(self.finalists(call, weights)?);
        }
        let mut best: Vec<Option<Choice>> = finalists.iter().map(|ways| ways.first().copied()).collect();
        let is_chain = products.len() > 1 && products.iter().all(|(call, _)| call.rows < LARGE_ROWS);
        if is_chain && best.iter().all(Option::is_some) {
            let mut chosen: Vec<Choice> = best.iter().flatten().copied().collect();
            let mut least = self.time_chain(products, &chosen)?;
            for (number, ways) in (0..N_ROUNDS).flat_map(|_| finalists.iter().enumerate()) {
                for way in ways {
                    let before = std::mem::replace(&mut chosen[number], *way);
                    let time = self.time_chain(products, &chosen)?;
                    if time < WORTHWHILE * least { least = time } else { chosen[number] = before }
                }
            }
            best = chosen.into_iter().map(Some).collect();
        }
        for ((call, _), choice) in products.iter().zip(best) {
            if let Some(choice) = choice {
                self.choices.borrow_mut().entry(call.key()).or_default().insert(call.rows, choice);
            }
        }
        Ok(())
    }

    /// The best ways of making a product alone, best first.
    fn finalists(&self, call: &Call<'_>, weights: &[&Weight]) -> Result<Vec<Choice>> {
        let n_bytes: usize = call.weight.outputs * call.weight.stride * 2;
        // What is bound by arithmetic is the same wherever its weights lie.
        let rotated = if call.rows < LARGE_ROWS { ROTATED_BYTES } else { n_bytes };
        let n = rotated.div_ceil(n_bytes.max(1)).clamp(1, weights.len().max(1));
        let weights = weights.get(..n).unwrap_or(&[]);
        let own = (0..self.n_own_variants(call)).map(|variant| Choice::Own { variant });
        let n_candidates = if call.rows < LARGE_ROWS { N_CANDIDATES } else { N_LARGE_CANDIDATES };
        let library = self.candidates(call, n_candidates)?.into_iter().map(Choice::Library);
        let mut timed = Vec::new();
        for choice in own.chain(library) {
            timed.extend(self.time(call, weights, &choice, 1)?.map(|time| (time, choice)));
        }
        timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        timed.truncate(N_FINALISTS);
        let n_passes = if call.rows <= 2 * LARGE_ROWS { 8 } else { 3 };
        for (time, choice) in &mut timed {
            *time = self.time(call, weights, choice, n_passes)?.unwrap_or(f32::INFINITY);
        }
        timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        Ok(timed.into_iter().map(|(_, choice)| choice).collect())
    }

    /// Passes over the weights, one after the other: microseconds a product, or `None` if it cannot be made so.
    fn time(
        &self,
        call: &Call<'_>,
        weights: &[&Weight],
        choice: &Choice,
        n_passes: usize,
    ) -> Result<Option<f32>> {
        let pass = || -> Result<bool> {
            for weight in weights {
                if !self.run_by(&Call { weight, ..*call }, choice)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if !pass()? {
            return Ok(None);
        }
        let time = self.elapsed(|| (0..n_passes).try_for_each(|_| pass().map(drop)))?;
        Ok(Some(time / (n_passes * weights.len()) as f32))
    }

    /// Some layers' products in their order, recorded. Between them a step has small kernels, for which a norm stands in;
    /// only what a gate makes is taken by the next product at once. In microseconds.
    fn time_chain(&self, products: &[(Call<'_>, &[&Weight])], choices: &[Choice]) -> Result<f32> {
        let n_layers = products.iter().map(|(_, weights)| weights.len()).min().unwrap_or(0).min(N_CHAINED);
        let chain = super::graph::capture(&self.device, || {
            for layer in 0..n_layers {
                let mut is_gated = false;
                for ((call, weights), choice) in products.iter().zip(choices) {
                    let call = Call { weight: weights[layer], ..*call };
                    if !is_gated {
                        self.predecessor(&call)?;
                    }
                    self.run_by(&call, choice)?;
                    is_gated = matches!(call.product, Product::Gated(_));
                }
            }
            Ok(())
        })?;
        let passes = || (0..N_CHAIN_PASSES).try_for_each(|_| chain.launch());
        passes()?;
        Ok(self.elapsed(passes)? / N_CHAIN_PASSES as f32)
    }

    /// A norm of the product's own inputs, in place: any weights will do.
    fn predecessor(&self, call: &Call<'_>) -> Result<()> {
        let params = ffi::NormRows {
            x: call.x.ptr(),
            x_stride: call.x.stride as i64,
            weight: call.weight.numbers.ptr(),
            out: call.x.ptr(),
            out_stride: call.x.stride as i64,
            rows: call.rows as i32,
            width: call.x.width as i32,
            // The numbers keep their scale over any number of passes.
            eps: 1.0,
            dtype: super::dtype_code(self.dtype),
        };
        // SAFETY: a block reads its row whole before it writes it, and a weight has a row of that width.
        launched("norm", unsafe { ffi::kv_norm(&params, self.device.stream()) })
    }

    /// Microseconds that the GPU takes for what `work` queues.
    fn elapsed(&self, work: impl FnOnce() -> Result<()>) -> Result<f32> {
        let stream = self.device.cuda_stream();
        let flags = Some(driver::CUevent_flags::CU_EVENT_DEFAULT);
        let failed = super::device::failed;
        let before = stream.record_event(flags).map_err(failed("recording an event"))?;
        work()?;
        let after = stream.record_event(flags).map_err(failed("recording an event"))?;
        after.synchronize().map_err(failed("measuring a product"))?;
        Ok(before.elapsed_ms(&after).map_err(failed("measuring a product"))? * 1e3)
    }

    fn n_own_variants(&self, call: &Call<'_>) -> i32 {
        let Weight { outputs, stride, .. } = *call.weight;
        // SAFETY: a question about sizes.
        unsafe {
            ffi::kv_linear_variants(
                call.rows as i32,
                outputs as i32,
                stride as i32,
                epilogue(call.product),
                super::dtype_code(self.dtype),
            )
        }
    }

    /// Whether the product could be made in this way.
    fn run_by(&self, call: &Call<'_>, choice: &Choice) -> Result<bool> {
        match choice {
            Choice::Own { variant } if *variant < self.n_own_variants(call) => {
                self.own(call, *variant)?;
                Ok(true)
            }
            Choice::Own { .. } => Ok(false),
            Choice::Library(algorithm) => self.by_library(call, algorithm),
        }
    }

    fn own(&self, call: &Call<'_>, variant: i32) -> Result<()> {
        let Call { weight, product, rows, x, out, .. } = *call;
        let params = ffi::Linear {
            weight: weight.numbers.ptr(),
            bias: weight.bias_ptr(),
            x: x.ptr(),
            x_stride: x.stride as i64,
            out: out.ptr(),
            out_stride: out.stride as i64,
            rows: rows as i32,
            outputs: weight.outputs as i32,
            inputs: weight.stride as i32,
            epilogue: epilogue(product),
            activation: activation_code(product),
            out_f32: i32::from(out.numbers == Numbers::Single),
            variant,
            workspace: self.own_workspace.ptr(),
            dtype: super::dtype_code(self.dtype),
        };
        // SAFETY: tensors and weights are as large as the parameters say; see `Tensor` and `Weight`.
        launched("linear", unsafe { ffi::kv_linear(&params, self.device.stream()) })
    }

    fn by_library(&self, call: &Call<'_>, algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<bool> {
        let (out, gated) = match (call.product, call.scratch) {
            (Product::Gated(_), Some(scratch)) => (scratch, true),
            (Product::Gated(_), None) => return Ok(false),
            _ => (call.out, false),
        };
        let matmul = Matmul::new(self, call, out)?;
        let (alpha, beta) = (1f32, if call.product == Product::Added { 1f32 } else { 0.0 });
        // SAFETY: the descriptors describe the tensors; the workspace has as many bytes as is said.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                matmul.operation,
                ptr::from_ref(&alpha).cast(),
                call.weight.numbers.ptr::<c_void>(),
                matmul.weight,
                call.x.ptr::<c_void>(),
                matmul.x,
                ptr::from_ref(&beta).cast(),
                out.ptr::<c_void>(),
                matmul.out,
                out.ptr::<c_void>(),
                matmul.out,
                algorithm,
                self.workspace.ptr(),
                WORKSPACE_BYTES,
                self.device.stream().cast(),
            )
        };
        match status {
            sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => {}
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
            | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE => {
                return Ok(false);
            }
            other => return Err(library("a product")(CublasError(other))),
        }
        if gated {
            self.gate(call, out)?;
        }
        Ok(true)
    }

    fn gate(&self, call: &Call<'_>, gate_up: &Tensor) -> Result<()> {
        let params = ffi::Gate {
            gate_up: gate_up.ptr(),
            stride: gate_up.stride as i64,
            out: call.out.ptr(),
            out_stride: call.out.stride as i64,
            rows: call.rows as i32,
            width: call.out.width as i32,
            activation: activation_code(call.product),
            dtype: super::dtype_code(self.dtype),
        };
        // SAFETY: the tensors are as large as the parameters say.
        launched("gate", unsafe { ffi::kv_gate(&params, self.device.stream()) })
    }

    /// What the library thinks best for a product, best first.
    fn candidates(&self, call: &Call<'_>, n: usize) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        let out = match (call.product, call.scratch) {
            (Product::Gated(_), Some(scratch)) => scratch,
            (Product::Gated(_), None) => return Ok(Vec::new()),
            _ => call.out,
        };
        let matmul = Matmul::new(self, call, out)?;
        let preference = result::create_matmul_pref().map_err(library("a preference"))?;
        let limit = WORKSPACE_BYTES as u64;
        // Sums stay in f32 also where an algorithm cuts them.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32
            | sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let mut found: Vec<MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>> =
            (0..n).map(|_| MaybeUninit::zeroed()).collect();
        let mut n_found = 0;
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        };
        // SAFETY: attributes are of the sizes that the library documents; `found` has room for `n` answers.
        let status = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                ptr::from_ref(&limit).cast(),
                size_of::<u64>(),
            )
            .and_then(|()| {
                result::set_matmul_pref_attribute(
                    preference,
                    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                    ptr::from_ref(&schemes).cast(),
                    size_of::<u32>(),
                )
            })
            .map(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.handle,
                    matmul.operation,
                    matmul.weight,
                    matmul.x,
                    matmul.out,
                    matmul.out,
                    preference,
                    n as i32,
                    found.as_mut_ptr().cast(),
                    &mut n_found,
                )
            })
        };
        // SAFETY: created above, destroyed once.
        unsafe { result::destroy_matmul_pref(preference) }.map_err(library("a preference"))?;
        if status.map_err(library("a preference"))? != sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
            return Ok(Vec::new());
        }
        // SAFETY: the library has filled so many.
        let found = found[..n_found as usize].iter().map(|one| unsafe { one.assume_init_ref() });
        let usable = found.filter(|one| one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        Ok(usable.map(|one| one.algo).collect())
    }

    fn number_type(&self) -> sys::cudaDataType_t {
        match self.dtype {
            DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
            DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        }
    }
}

impl Drop for Linear {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed here only. There is nobody to tell of an error.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn epilogue(product: Product) -> i32 {
    match product {
        Product::Stored | Product::Logits => ffi::KV_STORE,
        Product::Added => ffi::KV_ADD,
        Product::Gated(_) => ffi::KV_GATE,
    }
}

fn activation_code(product: Product) -> i32 {
    match product {
        Product::Gated(Activation::Silu) | Product::Stored | Product::Logits | Product::Added => ffi::KV_SILU,
    }
}

/// The library's description of a product. Its matrices are column-major, so ours are transposed there:
/// `outᵀ = (weightᵀ)ᵀ · xᵀ`.
struct Matmul {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Matmul {
    fn new(linear: &Linear, call: &Call<'_>, out: &Tensor) -> Result<Matmul> {
        let single = sys::cudaDataType_t::CUDA_R_32F;
        let numbers = linear.number_type();
        let out_numbers = if out.numbers == Numbers::Single { single } else { numbers };
        let Weight { outputs, stride, .. } = *call.weight;
        let layout = |kind, rows: usize, columns: usize, stride: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, stride as i64)
                .map_err(library("a layout"))
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let matmul = Matmul {
            operation: result::create_matmul_desc(compute, single).map_err(library("a description"))?,
            weight: layout(numbers, stride, outputs, stride)?,
            x: layout(numbers, stride, call.rows, call.x.stride)?,
            out: layout(out_numbers, outputs, call.rows, out.stride)?,
        };
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_TRANSA,
        };
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: values are of the sizes that the library documents.
            unsafe { result::set_matmul_desc_attribute(matmul.operation, attribute, value, size) }
                .map_err(library("a description"))
        };
        let transposed = 1i32;
        set(CUBLASLT_MATMUL_DESC_TRANSA, ptr::from_ref(&transposed).cast(), size_of::<i32>())?;
        if call.weight.bias.is_some() {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            let bias: *const c_void = call.weight.bias_ptr();
            set(CUBLASLT_MATMUL_DESC_EPILOGUE, ptr::from_ref(&epilogue).cast(), size_of::<i32>())?;
            set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, ptr::from_ref(&bias).cast(), size_of::<*const c_void>())?;
        }
        Ok(matmul)
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed here only. There is nobody to tell of an error.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            for layout in [self.weight, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
