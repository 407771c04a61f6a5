//! Linear layers: our own kernels where few rows make the reading of the weights the limit, cuBLASLt for the rest.
//!
//! Which of them is best for a shape and a number of rows is measured at start (see `tune.rs`). A number of rows that was
//! not measured takes what was best for the next larger one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

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
/// Errors of a launch after which the device is as it was: there is no such kernel on it, or it has no room for one.
const REFUSALS: [i32; 5] = [
    1,   // cudaErrorInvalidValue
    9,   // cudaErrorInvalidConfiguration
    98,  // cudaErrorInvalidDeviceFunction
    701, // cudaErrorLaunchOutOfResources
    801, // cudaErrorNotSupported
];
/// Algorithms of cuBLASLt that are tried where nothing was measured.
const N_UNMEASURED: usize = 8;

/// Products of rows with weights on one GPU.
pub struct Linear {
    pub(super) device: Device,
    pub(super) dtype: DType,
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
    /// 0 stored, 1 logits, 2 added, 3 gated, 4 activated.
    product: u8,
    has_bias: bool,
}

/// How a product is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Choice {
    Own { variant: i32 },
    Library(sys::cublasLtMatmulAlgo_t),
}

impl PartialEq for Choice {
    fn eq(&self, other: &Choice) -> bool {
        match (self, other) {
            (Choice::Own { variant }, Choice::Own { variant: other }) => variant == other,
            (Choice::Library(algorithm), Choice::Library(other)) => algorithm.data == other.data,
            _ => false,
        }
    }
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
            Product::Activated(_) => 4,
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
        // SAFETY: opens a library by its usual names. Asked first, since cudarc panics where it is missing.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Unsupported(
                "libcublasLt.so.13 is not found: install CUDA's libraries, or name their folder in LD_LIBRARY_PATH"
                    .into(),
            ));
        }
        // SAFETY: a question about sizes.
        let own_bytes = unsafe { ffi::kv_linear_workspace_bytes() };
        Ok(Linear {
            dtype,
            handle: result::create_handle().map_err(library("opening"))?,
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
        for algorithm in self.candidates(call, N_UNMEASURED)? {
            let choice = Choice::Library(algorithm);
            if self.run_by(call, &choice)? {
                self.choose(call, choice);
                return Ok(());
            }
        }
        let Weight { outputs, stride, .. } = *call.weight;
        Err(Error::Unsupported(format!("cuBLASLt has no product of {} × {stride} with {outputs}", call.rows)))
    }

    /// From now on, so many rows and fewer take this way.
    pub(super) fn choose(&self, call: &Call<'_>, choice: Choice) {
        self.choices.borrow_mut().entry(call.key()).or_default().insert(call.rows, choice);
    }

    /// Tilings of our own kernel for such a product.
    pub(super) fn n_own_variants(&self, call: &Call<'_>) -> i32 {
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
    pub(super) fn run_by(&self, call: &Call<'_>, choice: &Choice) -> Result<bool> {
        match choice {
            Choice::Own { variant } if *variant < self.n_own_variants(call) => self.own(call, *variant),
            Choice::Own { .. } => Ok(false),
            Choice::Library(algorithm) => self.by_library(call, algorithm),
        }
    }

    fn own(&self, call: &Call<'_>, variant: i32) -> Result<bool> {
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
            scale: weight.scale,
            limit: limit(product),
            out_f32: i32::from(out.numbers == Numbers::Single),
            variant,
            workspace: self.own_workspace.ptr(),
            dtype: super::dtype_code(self.dtype),
        };
        // SAFETY: tensors and weights are as large as the parameters say; see `Tensor` and `Weight`.
        let status = unsafe { ffi::kv_linear(&params, self.device.stream()) };
        if REFUSALS.contains(&status) {
            return Ok(false);
        }
        launched("linear", status).map(|()| true)
    }

    fn by_library(&self, call: &Call<'_>, algorithm: &sys::cublasLtMatmulAlgo_t) -> Result<bool> {
        let (out, gated) = match (call.product, call.scratch) {
            (Product::Gated(_), Some(scratch)) => (scratch, true),
            (Product::Gated(_), None) => return Ok(false),
            _ => (call.out, false),
        };
        let matmul = Matmul::new(self, call, out)?;
        let (alpha, beta) = (call.weight.scale, if call.product == Product::Added { 1f32 } else { 0.0 });
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
        } else if matches!(call.product, Product::Activated(_)) && !is_library_gelu(call.product) {
            self.activate(call)?;
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
            limit: limit(call.product),
            dtype: super::dtype_code(self.dtype),
        };
        // SAFETY: the tensors are as large as the parameters say.
        launched("gate", unsafe { ffi::kv_gate(&params, self.device.stream()) })
    }

    fn activate(&self, call: &Call<'_>) -> Result<()> {
        let params = ffi::Activate {
            x: call.out.ptr(),
            stride: call.out.stride as i64,
            rows: call.rows as i32,
            width: call.weight.outputs as i32,
            activation: activation_code(call.product),
            dtype: super::dtype_code(self.dtype),
        };
        // SAFETY: as above.
        launched("activate", unsafe { ffi::kv_activate(&params, self.device.stream()) })
    }

    /// What the library thinks best for a product, best first.
    pub(super) fn candidates(&self, call: &Call<'_>, n: usize) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
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
        Product::Activated(_) => ffi::KV_ACTIVATE,
    }
}

/// The non-linearity as the kernels know it; any where there is none.
pub(super) fn activation_code(product: Product) -> i32 {
    let (Product::Gated(activation) | Product::Activated(activation)) = product else { return ffi::KV_SILU };
    match activation {
        Activation::Silu => ffi::KV_SILU,
        Activation::GeluTanh => ffi::KV_GELU_TANH,
        Activation::Gelu => ffi::KV_GELU,
        Activation::ClampedSwiglu { .. } => ffi::KV_CLAMPED_SWIGLU,
    }
}

/// Whether the library takes the non-linearity with the product: it has the tanh form.
fn is_library_gelu(product: Product) -> bool {
    product == Product::Activated(Activation::GeluTanh)
}

/// The bound of gates that have one.
pub(super) fn limit(product: Product) -> f32 {
    match product {
        Product::Gated(Activation::ClampedSwiglu { limit }) => limit,
        _ => 0.0,
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
            CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
            CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_TRANSA,
        };
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: values are of the sizes that the library documents.
            unsafe { result::set_matmul_desc_attribute(matmul.operation, attribute, value, size) }
                .map_err(library("a description"))
        };
        let transposed = 1i32;
        set(CUBLASLT_MATMUL_DESC_TRANSA, ptr::from_ref(&transposed).cast(), size_of::<i32>())?;
        use sys::cublasLtEpilogue_t::{
            CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_GELU,
            CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        let epilogue = match (is_library_gelu(call.product), call.weight.bias.is_some()) {
            (false, false) => CUBLASLT_EPILOGUE_DEFAULT,
            (false, true) => CUBLASLT_EPILOGUE_BIAS,
            (true, false) => CUBLASLT_EPILOGUE_GELU,
            (true, true) => CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        set(CUBLASLT_MATMUL_DESC_EPILOGUE, ptr::from_ref(&epilogue).cast(), size_of::<i32>())?;
        if call.weight.bias.is_some() {
            let bias: *const c_void = call.weight.bias_ptr();
            set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, ptr::from_ref(&bias).cast(), size_of::<*const c_void>())?;
            // Unsaid, a bias is taken for numbers of the output's type, which logits are not.
            set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, ptr::from_ref(&numbers).cast(), size_of_val(&numbers))?;
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
