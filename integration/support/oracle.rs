//! The plain oracle: a Llama-shaped decoder in f64 that recomputes every prefix from scratch, without pool, batch,
//! cache or backend. It shares no arithmetic with the library; `golden.rs` checks it against the stored results.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use serde_json::Value;

/// A small f32 checkpoint, whole in memory.
pub struct Oracle {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    n_layers: usize,
    heads: usize,
    kv_heads: usize,
    eps: f64,
    rope_theta: f64,
}

impl Oracle {
    /// Reads a fixture of the old dialect: unscaled rope, no window, stored in f32.
    pub fn open(folder: &Path) -> Oracle {
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        let file = fs::read(folder.join("model.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&file).unwrap();
        let tensors = stored.iter().map(|(name, view)| {
            assert_eq!(view.dtype(), safetensors::Dtype::F32, "{name}");
            let numbers = view.data().chunks_exact(4);
            let numbers = numbers.map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())));
            (name.to_string(), (view.shape().to_vec(), numbers.collect()))
        });
        let number = |key: &str| config[key].as_u64().unwrap() as usize;
        Oracle {
            tensors: tensors.collect(),
            n_layers: number("num_hidden_layers"),
            heads: number("num_attention_heads"),
            kv_heads: number("num_key_value_heads"),
            eps: config["rms_norm_eps"].as_f64().unwrap(),
            rope_theta: config["rope_theta"].as_f64().unwrap(),
        }
    }

    /// `[tokens][vocab]` the logits of every position.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let (shape, embedding) = &self.tensors["model.embed_tokens.weight"];
        let hidden = shape[1];
        let mut x: Vec<Vec<f64>> =
            tokens.iter().map(|&id| embedding[id as usize * hidden..][..hidden].to_vec()).collect();
        for layer in 0..self.n_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = self.norm(&x, &name("input_layernorm.weight"));
            let attended = self.attend(&normed, &name("self_attn"));
            add(&mut x, &attended);
            let normed = self.norm(&x, &name("post_attention_layernorm.weight"));
            let gate = self.linear(&normed, &name("mlp.gate_proj"));
            let up = self.linear(&normed, &name("mlp.up_proj"));
            let silu = |value: f64| value / (1.0 + (-value).exp());
            let gated: Vec<Vec<f64>> = (gate.iter().zip(&up))
                .map(|(gate, up)| gate.iter().zip(up).map(|(&gate, &up)| silu(gate) * up).collect())
                .collect();
            let down = self.linear(&gated, &name("mlp.down_proj"));
            add(&mut x, &down);
        }
        let normed = self.norm(&x, "model.norm.weight");
        let head = if self.tensors.contains_key("lm_head.weight") { "lm_head" } else { "model.embed_tokens" };
        self.linear(&normed, head)
    }

    /// Checks that each of `output` is, after the tokens before it, an arg-max within `tolerance`.
    pub fn assert_greedy(&self, prompt: &[u32], output: &[u32], tolerance: f64, what: &str) {
        let tokens: Vec<u32> = prompt.iter().chain(output).copied().collect();
        let logits = self.logits(&tokens[..tokens.len() - 1]);
        for (index, &id) in output.iter().enumerate() {
            let row = &logits[prompt.len() - 1 + index];
            let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!(
                row[id as usize] >= best - tolerance,
                "{what}: token {index} of {} is {id} with logit {}, the best is {best}\nprompt {prompt:?}\noutput {output:?}",
                output.len(),
                row[id as usize],
            );
        }
    }

    fn norm(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let (_, weight) = &self.tensors[name];
        let normed = x.iter().map(|row| {
            let mean = row.iter().map(|value| value * value).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + self.eps).sqrt();
            row.iter().zip(weight).map(|(value, weight)| value * scale * weight).collect()
        });
        normed.collect()
    }

    fn linear(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let (shape, weight) = &self.tensors[&format!("{name}.weight")];
        let bias = self.tensors.get(&format!("{name}.bias")).map(|(_, bias)| bias);
        let output = |row: &Vec<f64>, out: usize| {
            let dot: f64 =
                row.iter().zip(&weight[out * shape[1]..]).map(|(value, weight)| value * weight).sum();
            dot + bias.map_or(0.0, |bias| bias[out])
        };
        x.iter().map(|row| (0..shape[0]).map(|out| output(row, out)).collect()).collect()
    }

    fn attend(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let mut query = self.linear(x, &format!("{name}.q_proj"));
        let mut key = self.linear(x, &format!("{name}.k_proj"));
        let value = self.linear(x, &format!("{name}.v_proj"));
        let head_dim = query[0].len() / self.heads;
        for (position, (query, key)) in query.iter_mut().zip(&mut key).enumerate() {
            query
                .chunks_mut(head_dim)
                .chain(key.chunks_mut(head_dim))
                .for_each(|head| self.rotate(head, position));
        }
        let mut output = vec![vec![0.0; self.heads * head_dim]; x.len()];
        for (position, output) in output.iter_mut().enumerate() {
            for head in 0..self.heads {
                let of_query = head * head_dim..(head + 1) * head_dim;
                let kv_head = head / (self.heads / self.kv_heads);
                let of_kv = kv_head * head_dim..(kv_head + 1) * head_dim;
                let dot = |key: &Vec<f64>| -> f64 {
                    query[position][of_query.clone()]
                        .iter()
                        .zip(&key[of_kv.clone()])
                        .map(|(q, k)| q * k)
                        .sum()
                };
                let scores: Vec<f64> =
                    key[..=position].iter().map(|key| dot(key) / (head_dim as f64).sqrt()).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (weight, value) in weights.iter().zip(&value) {
                    for (sum, value) in output[of_query.clone()].iter_mut().zip(&value[of_kv.clone()]) {
                        *sum += weight / total * value;
                    }
                }
            }
        }
        self.linear(&output, &format!("{name}.o_proj"))
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        for pair in 0..half {
            let angle = position as f64 * self.rope_theta.powf(-(pair as f64) / half as f64);
            let (sin, cos) = angle.sin_cos();
            let (a, b) = (head[pair], head[pair + half]);
            head[pair] = a * cos - b * sin;
            head[pair + half] = b * cos + a * sin;
        }
    }
}

fn add(x: &mut [Vec<f64>], branch: &[Vec<f64>]) {
    for (row, branch) in x.iter_mut().zip(branch) {
        row.iter_mut().zip(branch).for_each(|(value, branch)| *value += branch);
    }
}
