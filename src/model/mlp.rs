//! The feed-forward branch of a layer.

use super::names::{LayerRole, Role};
use super::spec::{self, Activation, DecoderSpec};
use super::upload::Upload;
use super::workspace::Workspace;
use crate::backend::{Backend, Product};
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

    /// Adds the branch to the residual stream.
    pub fn forward(&self, backend: &B, rows: usize, ws: &mut Workspace<B>) -> Result<()> {
        backend.norm(&self.norm, rows, &ws.residual, &mut ws.normed)?;
        let activation = self.activation;
        backend.linear_gate(&self.gate_up, activation, rows, &ws.normed, &mut ws.gate_up, &mut ws.gated)?;
        backend.linear_add(&self.down, rows, &ws.gated, &mut ws.branch, &mut ws.residual)
    }

    /// The layers, and what becomes of their products.
    pub fn products(&self) -> [(&B::Weight, Product); 2] {
        [(&self.gate_up, Product::Gated(self.activation)), (&self.down, Product::Added)]
    }
}
