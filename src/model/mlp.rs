//! The feed-forward branch of a layer.

use super::names::{LayerRole, Role};
use super::spec::{self, Activation, DecoderSpec};
use super::upload::Upload;
use super::workspace::Workspace;
use crate::backend::Backend;
use crate::error::{Error, Result};

/// A rank's neurons of one layer.
pub struct Mlp<B: Backend> {
    /// On this rank.
    pub neurons: usize,
    activation: Activation,
    norm: B::Norm,
    /// Gate and up, one below the other.
    gate_up: B::Weight,
    down: B::Weight,
}

impl<B: Backend> Mlp<B> {
    /// Takes the layer's tensors to the device.
    pub fn load(upload: &Upload<B>, spec: &DecoderSpec, layer: usize) -> Result<Mlp<B>> {
        use LayerRole::*;
        let spec::Mlp::Gated { activation, bias, .. } = spec.mlp;
        let norm = upload.norm(spec.norm, spec.hidden, Role::Layer(layer, MlpNorm))?;
        let parts = [
            upload.cut_outputs(layer, spec.hidden, (Gate, GateBias), bias)?,
            upload.cut_outputs(layer, spec.hidden, (Up, UpBias), bias)?,
        ];
        let [neurons, up] = [0, 1].map(|part: usize| parts[part].weight.rows.len());
        if neurons != up {
            return Err(Error::Checkpoint(format!(
                "layer {layer}: {neurons} rows of gates, {up} of the other factor"
            )));
        }
        let gate_up = upload.backend.weight(&parts)?;
        let down = upload.cut_inputs(layer, neurons, (Down, DownBias), bias)?;
        Ok(Mlp { neurons, activation, norm, gate_up, down })
    }

    /// Adds the branch before it to the residual stream, and leaves its own in [`Workspace::branch`].
    pub fn forward(&self, backend: &B, rows: usize, ws: &mut Workspace<B>) -> Result<()> {
        backend.add_norm(&self.norm, rows, Some(&ws.branch), &mut ws.residual, &mut ws.normed)?;
        backend.linear(&self.gate_up, rows, &ws.normed, &mut ws.gate_up)?;
        backend.gate(self.activation, rows, &ws.gate_up, &mut ws.gated)?;
        backend.linear(&self.down, rows, &ws.gated, &mut ws.branch)?;
        backend.all_reduce(rows, &mut ws.branch)
    }
}
