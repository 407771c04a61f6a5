//! The feed-forward branch of a layer: one MLP.

use super::branch::Output;
use super::names::{LayerRole, MlpRole};
use super::spec::{Activation, Bias, DecoderSpec};
use super::upload::Upload;
use super::workspace::{MlpWidth, Workspace};
use crate::backend::{Backend, Product};
use crate::error::{Error, Result};

/// A rank's neurons of one MLP.
pub struct Mlp<B: Backend> {
    /// On this rank.
    pub width: MlpWidth,
    activation: Activation,
    /// Gate and up, one below the other, or up alone.
    first: B::Weight,
    down: Output<B>,
}

/// An MLP as its spec has it.
#[derive(Debug, Clone, Copy)]
pub struct MlpShape {
    /// Of the gates, or of the neurons where there are none.
    pub activation: Activation,
    /// Of all projections.
    pub bias: Bias,
    /// Whether there are gates.
    pub gated: bool,
}

impl<B: Backend> Mlp<B> {
    /// Takes the tensors to the device; `role` is the MLP's place in its layer.
    pub fn load(
        upload: &Upload<B>,
        spec: &DecoderSpec,
        layer: usize,
        MlpShape { activation, bias, gated }: MlpShape,
        role: fn(MlpRole) -> LayerRole,
    ) -> Result<Mlp<B>> {
        use MlpRole::*;
        let projection = |weight, of| upload.cut_outputs(layer, spec.hidden, (role(weight), role(of)), bias);
        let parts = if gated {
            vec![projection(Gate, GateBias)?, projection(Up, UpBias)?]
        } else {
            vec![projection(Up, UpBias)?]
        };
        let neurons = parts[0].weight.rows.len();
        if let Some(other) = parts.iter().map(|part| part.weight.rows.len()).find(|&rows| rows != neurons) {
            return Err(Error::Checkpoint(format!(
                "layer {layer}: {neurons} rows of gates, {other} of the other factor"
            )));
        }
        let down = upload.cut_inputs(layer, neurons, (role(Down), role(DownBias)), bias)?;
        Ok(Mlp {
            width: MlpWidth { neurons, gated },
            activation,
            first: upload.backend.weight(&parts, 1.0)?,
            down: Output::load(upload, spec, layer, down, LayerRole::MlpPostNorm)?,
        })
    }

    /// Adds the branch to the residual stream; reads [`Workspace::normed_for_mlp`], or
    /// [`Workspace::normed`] where there is none.
    pub fn add(&self, backend: &B, rows: usize, ws: &mut Workspace<B>) -> Result<()> {
        let room = ws.mlps.room(self.width)?;
        let x = ws.normed_for_mlp.as_ref().unwrap_or(&ws.normed);
        match &mut room.gate_up {
            Some(gate_up) => {
                backend.linear_gate(&self.first, self.activation, rows, x, gate_up, &mut room.neurons)?;
            }
            None => backend.linear_activate(&self.first, self.activation, rows, x, &mut room.neurons)?,
        }
        self.down.add(backend, rows, &room.neurons, &mut ws.branch, &mut ws.residual)
    }

    /// The layers by name, and what becomes of their products.
    pub fn products(&self) -> Vec<(&'static str, &B::Weight, Product)> {
        let first = match self.width.gated {
            true => ("gate up", &self.first, Product::Gated(self.activation)),
            false => ("up", &self.first, Product::Activated(self.activation)),
        };
        let (down, product) = self.down.product();
        vec![first, ("down", down, product)]
    }
}
