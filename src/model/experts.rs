//! The feed-forward branch of a layer: a mixture of experts.

use super::mlp::{Mlp, MlpShape};
use super::names::{LayerRole, MlpRole, Role};
use super::spec::{self, Bias, DecoderSpec, Router};
use super::upload::Upload;
use super::workspace::{ExpertsWidth, Workspace};
use crate::backend::{Backend, ExpertParts, LinearPart};
use crate::error::{Error, Result};

/// A rank's neurons of every expert of one layer.
pub struct Experts<B: Backend> {
    /// On this rank.
    pub width: ExpertsWidth,
    multiplier: f32,
    routed: B::Experts,
    /// What every token passes.
    shared: Option<Mlp<B>>,
}

impl<B: Backend> Experts<B> {
    /// Takes the layer's tensors to the device.
    pub fn load(
        upload: &Upload<B>,
        spec: &DecoderSpec,
        experts: &spec::Experts,
        layer: usize,
    ) -> Result<Experts<B>> {
        use LayerRole::{ChoiceBias, Expert, RouterBias, SharedExpert};
        let role = |role| Role::Layer(layer, role);
        let router_bias = (experts.router == Router::SoftmaxOfChosen).then_some(role(RouterBias));
        let has_choice_bias = matches!(experts.router, Router::Sigmoid { .. });
        let parts = ExpertParts {
            router: upload.linear_part(spec.hidden, role(LayerRole::Router), router_bias)?,
            choice_bias: has_choice_bias.then(|| upload.part(role(ChoiceBias))).transpose()?,
            experts: (0..experts.n_experts)
                .map(|number| expert(upload, spec, layer, |role| Expert(number, role), experts.bias))
                .collect::<Result<_>>()?,
        };
        let neurons = parts.experts.first().map_or(0, |[gate, ..]| gate.weight.rows.len());
        if parts
            .experts
            .iter()
            .flat_map(|[gate, up, _]| [gate, up])
            .any(|part| part.weight.rows.len() != neurons)
        {
            return Err(Error::Checkpoint(format!("layer {layer}: experts of different widths")));
        }
        let shape = MlpShape { activation: experts.activation, bias: Bias::Absent, gated: true };
        let shared = (experts.shared_width > 0)
            .then(|| Mlp::load(upload, spec, layer, shape, SharedExpert))
            .transpose()?;
        Ok(Experts {
            width: ExpertsWidth { experts: *experts, neurons },
            multiplier: spec.branch_multiplier,
            routed: upload.backend.experts_weight(experts, spec.hidden, &parts)?,
            shared,
        })
    }

    /// Adds the branch to the residual stream; reads what an MLP reads.
    pub fn add(&self, backend: &B, rows: usize, ws: &mut Workspace<B>) -> Result<()> {
        let room = ws.experts.as_mut().ok_or_else(|| Error::Bug("experts without room".into()))?;
        let x = ws.normed_for_mlp.as_ref().unwrap_or(&ws.normed);
        backend.experts(&self.routed, rows, x, room, &mut ws.branch)?;
        backend.reduce_add(self.multiplier, rows, &mut ws.branch, &mut ws.residual)?;
        match &self.shared {
            Some(shared) => shared.add(backend, rows, ws),
            None => Ok(()),
        }
    }

    /// The MLP that every token passes, where there is one.
    pub fn shared(&self) -> Option<&Mlp<B>> {
        self.shared.as_ref()
    }
}

/// One expert's gate, up and down.
fn expert<B: Backend>(
    upload: &Upload<B>,
    spec: &DecoderSpec,
    layer: usize,
    role: impl Fn(MlpRole) -> LayerRole,
    bias: Bias,
) -> Result<[LinearPart; 3]> {
    use MlpRole::*;
    let gate = upload.cut_outputs(layer, spec.hidden, (role(Gate), role(GateBias)), bias)?;
    let up = upload.cut_outputs(layer, spec.hidden, (role(Up), role(UpBias)), bias)?;
    let down = upload.cut_inputs(layer, gate.weight.rows.len(), (role(Down), role(DownBias)), bias)?;
    Ok([gate, up, down])
}
