//! Mixtures of experts on the GPU: `kernels/experts.h`, line by line, and what it is called with.

use std::ffi::{c_int, c_void};

use cudarc::driver::sys::CUstream;

use super::device::{Buffer, launched};
use super::linear::{activation_code, limit};
use super::tensor::Tensor;
use super::weight::Weight;
use super::{Cuda, dtype_code};
use crate::backend::{Backend, ExpertParts, Product};
use crate::error::{Error, Result};
use crate::model::spec::{Experts, Groups, Router};

const KV_SOFTMAX_RENORMALISED: i32 = 0;
const KV_SOFTMAX: i32 = 1;
const KV_SIGMOID: i32 = 2;
const KV_SOFTMAX_OF_CHOSEN: i32 = 3;
const KV_MAX_EXPERTS: usize = 512;
const KV_MAX_CHOSEN: usize = 32;
const KV_MAX_GROUPS: usize = 128;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct RouterOf {
    kind: i32,
    factor: f32,
    groups: i32,
    groups_used: i32,
    weight: *const c_void,
    bias: *const c_void,
    choice_bias: *const f32,
}

#[repr(C)]
struct ExpertsOf {
    router: RouterOf,
    gate_up: *const c_void,
    gate_up_bias: *const c_void,
    down: *const c_void,
    down_bias: *const c_void,
    n_experts: i32,
    n_chosen: i32,
    hidden: i32,
    width: i32,
    activation: i32,
    limit: f32,
    x: *const c_void,
    x_stride: i64,
    out: *mut c_void,
    out_stride: i64,
    rows: i32,
    max_rows: i32,
    workspace: *mut c_void,
    dtype: i32,
}

unsafe extern "C" {
    fn kv_experts_workspace_bytes(
        n_experts: i32,
        n_chosen: i32,
        hidden: i32,
        width: i32,
        max_rows: i32,
    ) -> i64;
    fn kv_experts(params: *const ExpertsOf, stream: CUstream) -> c_int;
}

/// A router and its experts.
pub struct ExpertsWeight {
    spec: Experts,
    router: Weight,
    choice_bias: Option<Buffer>,
    /// Of all experts, gates before what they multiply.
    gate_up: Weight,
    down: Weight,
    hidden: usize,
    /// Neurons of an expert on this rank.
    width: usize,
}

/// Scratch for so many rows.
pub struct ExpertsRoom {
    workspace: Buffer,
    rows: usize,
}

/// Whether the kernels serve such experts.
///
/// # Errors
/// [`Error::Unsupported`] with the numbers.
pub fn supports(spec: &Experts) -> Result<()> {
    let Experts { n_experts, n_chosen, router, .. } = *spec;
    if n_experts > KV_MAX_EXPERTS || n_chosen > KV_MAX_CHOSEN {
        return Err(Error::Unsupported(format!(
            "{n_chosen} of {n_experts} experts for each token: the GPU takes {KV_MAX_CHOSEN} of {KV_MAX_EXPERTS} at most"
        )));
    }
    let groups = groups(router).n;
    if groups > KV_MAX_GROUPS {
        return Err(Error::Unsupported(format!(
            "{groups} groups of experts: the GPU takes {KV_MAX_GROUPS} at most"
        )));
    }
    Ok(())
}

fn groups(router: Router) -> Groups {
    match router {
        Router::Softmax { groups, .. } | Router::Sigmoid { groups, .. } => groups,
        Router::SoftmaxRenormalised | Router::SoftmaxOfChosen => Groups { n: 1, n_used: 1 },
    }
}

impl Cuda {
    /// Takes a router and its experts to the device.
    pub(super) fn new_experts(
        &self,
        spec: &Experts,
        hidden: usize,
        parts: &ExpertParts,
    ) -> Result<ExpertsWeight> {
        supports(spec)?;
        let wrong = |what: String| Err(Error::Checkpoint(what));
        let width = parts.experts.first().map_or(0, |[gate, ..]| gate.weight.rows.len());
        let (routed, n) = (parts.router.weight.rows.len(), parts.experts.len());
        if (routed, n) != (spec.n_experts, spec.n_experts) || spec.n_chosen > n {
            return wrong(format!("a router of {routed} rows for {n} experts, {} chosen", spec.n_chosen));
        }
        for [gate, up, down] in &parts.experts {
            let rows = [gate, up, down].map(|part| part.weight.rows.len());
            if rows != [width, width, hidden] {
                return wrong(format!("an expert of {rows:?} rows, not {width}, {width} and {hidden}"));
            }
        }
        if let Some(bias) = parts.choice_bias.as_ref().filter(|bias| bias.n_elements() != n) {
            return wrong(format!("{} biases of the choice for {n} experts", bias.n_elements()));
        }
        let gate_up: Vec<_> =
            parts.experts.iter().flat_map(|[gate, up, _]| [gate.clone(), up.clone()]).collect();
        let down: Vec<_> = parts.experts.iter().map(|[.., down]| down.clone()).collect();
        Ok(ExpertsWeight {
            spec: *spec,
            router: self.weight(std::slice::from_ref(&parts.router), 1.0)?,
            choice_bias: parts.choice_bias.as_ref().map(|bias| self.stored_vector(bias)).transpose()?,
            gate_up: self.weight(&gate_up, 1.0)?,
            down: self.weight(&down, 1.0)?,
            hidden,
            width,
        })
    }

    /// Scratch for so many rows.
    pub(super) fn new_experts_room(
        &self,
        spec: &Experts,
        hidden: usize,
        width: usize,
        rows: usize,
    ) -> Result<ExpertsRoom> {
        let [n_experts, n_chosen, hidden, width, max_rows] =
            [spec.n_experts, spec.n_chosen, hidden, width, rows].map(|size| size as i32);
        // SAFETY: a question about sizes.
        let n_bytes = unsafe { kv_experts_workspace_bytes(n_experts, n_chosen, hidden, width, max_rows) };
        Ok(ExpertsRoom { workspace: self.device.alloc(n_bytes as usize)?, rows })
    }

    /// `out = Σ w_e · expert_e(x)`.
    pub(super) fn run_experts(
        &self,
        experts: &ExpertsWeight,
        rows: usize,
        x: &Tensor,
        room: &ExpertsRoom,
        out: &Tensor,
    ) -> Result<()> {
        let ExpertsWeight { spec, router, gate_up, down, .. } = experts;
        let (kind, factor) = match spec.router {
            Router::SoftmaxRenormalised => (KV_SOFTMAX_RENORMALISED, 1.0),
            Router::Softmax { factor, .. } => (KV_SOFTMAX, factor),
            Router::Sigmoid { factor, .. } => (KV_SIGMOID, factor),
            Router::SoftmaxOfChosen => (KV_SOFTMAX_OF_CHOSEN, 1.0),
        };
        let Groups { n: groups, n_used: groups_used } = groups(spec.router);
        let gate = Product::Gated(spec.activation);
        let choice_bias = experts.choice_bias.as_ref().map_or(std::ptr::null(), |bias| bias.ptr::<f32>());
        let params = ExpertsOf {
            router: RouterOf {
                kind,
                factor,
                groups: groups as i32,
                groups_used: groups_used as i32,
                weight: router.numbers.ptr(),
                bias: router.bias_ptr(),
                choice_bias,
            },
            gate_up: gate_up.numbers.ptr(),
            gate_up_bias: gate_up.bias_ptr(),
            down: down.numbers.ptr(),
            down_bias: down.bias_ptr(),
            n_experts: spec.n_experts as i32,
            n_chosen: spec.n_chosen as i32,
            hidden: experts.hidden as i32,
            width: experts.width as i32,
            activation: activation_code(gate),
            limit: limit(gate),
            x: x.ptr(),
            x_stride: x.stride as i64,
            out: out.ptr(),
            out_stride: out.stride as i64,
            rows: rows as i32,
            max_rows: room.rows as i32,
            workspace: room.workspace.ptr(),
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: weights and room are of these sizes; both tensors have so many rows of the hidden width.
        launched("experts", unsafe { kv_experts(&params, self.device.stream()) })
    }
}
