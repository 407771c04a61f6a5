//! Mixtures of experts.

use super::*;
use crate::backend::ExpertParts;
use crate::model::spec::{Activation, Bias, Experts, Groups, Router};

const HIDDEN: usize = 24;
const PADDING: usize = 2;

const EXPERTS: Experts = Experts {
    n_experts: 8,
    n_chosen: 2,
    width: 16,
    activation: Activation::Silu,
    bias: Bias::Absent,
    router: Router::SoftmaxRenormalised,
    shared_width: 0,
};

/// The numbers of a layer of experts.
struct Layer {
    spec: Experts,
    hidden: usize,
    /// `[experts, hidden]`, and `[experts]` that are added.
    router: (Vec<f32>, Vec<f32>),
    /// `[experts]` for the choice.
    choice: Vec<f32>,
    /// Of each expert gate, up and down, and their biases.
    experts: Vec<[(Vec<f32>, Vec<f32>); 3]>,
}

impl Layer {
    fn new(spec: Experts, hidden: usize) -> Layer {
        let (n, width) = (spec.n_experts, spec.width);
        let scaled = |n: usize, seed, by: f32| numbers(n, seed).iter().map(|x| x * by).collect::<Vec<f32>>();
        let expert = |expert: usize| {
            let seed = 100 + 10 * expert as u32;
            let linear = |outputs: usize, inputs: usize, seed| {
                (scaled(outputs * inputs, seed, 0.25), scaled(outputs, seed + 1, 0.5))
            };
            [linear(width, hidden, seed), linear(width, hidden, seed + 2), linear(hidden, width, seed + 4)]
        };
        let router = (scaled(n * hidden, 1, 0.5), scaled(n, 2, 0.5));
        Layer { spec, hidden, router, choice: scaled(n, 3, 0.25), experts: (0..n).map(expert).collect() }
    }

    fn has_router_bias(&self) -> bool {
        self.spec.router == Router::SoftmaxOfChosen
    }

    fn biases(&self) -> bool {
        self.spec.bias == Bias::Present
    }

    /// The part of one of two ranks, or of the only one: neurons of each expert.
    fn parts(&self, dtype: DType, rank: usize, world: usize) -> ExpertParts {
        let (n, width, hidden) = (self.spec.n_experts, self.spec.width, self.hidden);
        let own = rank * width / world..(rank + 1) * width / world;
        let expert = |[gate, up, down]: &[(Vec<f32>, Vec<f32>); 3]| {
            let outputs = |(w, b): &(Vec<f32>, Vec<f32>)| {
                let bias = self.biases().then(|| stored(DType::F32, &[width], b).cut_rows(own.clone()));
                linear_part(stored(dtype, &[width, hidden], w).cut_rows(own.clone()), bias)
            };
            let bias = (self.biases() && rank == 0).then(|| stored(DType::F32, &[hidden], &down.1));
            let down = stored(dtype, &[hidden, width], &down.0).cut(0..hidden, own.clone());
            [outputs(gate), outputs(up), linear_part(down, bias)]
        };
        let bias = self.has_router_bias().then(|| stored(DType::F32, &[n], &self.router.1));
        ExpertParts {
            router: linear_part(stored(dtype, &[n, hidden], &self.router.0), bias),
            choice_bias: matches!(self.spec.router, Router::Sigmoid { .. })
                .then(|| stored(DType::F32, &[n], &self.choice)),
            experts: self.experts.iter().map(expert).collect(),
        }
    }

    /// What a row becomes, and how much the last expert that it chooses was better than the next.
    fn reference(&self, dtype: DType, x: &[f32]) -> (Vec<f64>, f64) {
        let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(&w, x)| rounded(dtype, w) * x).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let (w, b) = &self.router;
        let bias = |expert: usize| if self.has_router_bias() { f64::from(b[expert]) } else { 0.0 };
        let logits: Vec<f64> =
            w.chunks(self.hidden).enumerate().map(|(expert, w)| dot(w, &x) + bias(expert)).collect();
        let (chosen, margin) = self.route(&logits);
        let mut out = vec![0.0; self.hidden];
        for (expert, weight) in chosen {
            let [gate, up, down] = &self.experts[expert];
            let product = |(w, b): &(Vec<f32>, Vec<f32>), row: usize, x: &[f64]| {
                let bias = if self.biases() { f64::from(b[row]) } else { 0.0 };
                dot(&w[row * x.len()..][..x.len()], x) + bias
            };
            let neuron = |i| self.activated(product(gate, i, &x), product(up, i, &x));
            let neurons: Vec<f64> = (0..self.spec.width).map(neuron).collect();
            for (i, out) in out.iter_mut().enumerate() {
                *out += weight * product(down, i, &neurons);
            }
        }
        (out, margin)
    }

    fn activated(&self, gate: f64, up: f64) -> f64 {
        let silu = |x: f64, slope: f64| x / (1.0 + (-slope * x).exp());
        match self.spec.activation {
            Activation::ClampedSwiglu { limit } => {
                let limit = f64::from(limit);
                silu(gate.min(limit), 1.702) * (up.clamp(-limit, limit) + 1.0)
            }
            _ => silu(gate, 1.0) * up,
        }
    }

    /// The chosen with their weights, and the margin of the choice.
    fn route(&self, logits: &[f64]) -> (Vec<(usize, f64)>, f64) {
        let n_chosen = self.spec.n_chosen;
        let exponentials: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let softmax: Vec<f64> = logits.iter().map(|logit| logit.exp() / exponentials).collect();
        let sigmoid: Vec<f64> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
        let sum = |numbers: &[f64], chosen: &[usize]| chosen.iter().map(|&i| numbers[i]).sum::<f64>();
        let weigh = |(chosen, margin): (Vec<usize>, f64), weight: &dyn Fn(usize, &[usize]) -> f64| {
            (chosen.iter().map(|&expert| (expert, weight(expert, &chosen))).collect(), margin)
        };
        match self.spec.router {
            Router::SoftmaxRenormalised => {
                weigh(largest(&softmax, n_chosen), &|i, chosen| softmax[i] / sum(&softmax, chosen))
            }
            Router::SoftmaxOfChosen => weigh(largest(logits, n_chosen), &|i, chosen| {
                logits[i].exp() / chosen.iter().map(|&i| logits[i].exp()).sum::<f64>()
            }),
            Router::Softmax { factor, groups } => {
                let (choice, between) = in_best_groups(&softmax, groups, 1);
                let (chosen, margin) = largest(&choice, n_chosen);
                weigh((chosen, margin.min(between)), &|i, _| softmax[i] * f64::from(factor))
            }
            Router::Sigmoid { factor, groups } => {
                let biased: Vec<f64> =
                    sigmoid.iter().zip(&self.choice).map(|(score, &bias)| score + f64::from(bias)).collect();
                let (choice, between) = in_best_groups(&biased, groups, 2);
                let (chosen, margin) = largest(&choice, n_chosen);
                weigh((chosen, margin.min(between)), &|i, chosen| {
                    f64::from(factor) * sigmoid[i] / (sum(&sigmoid, chosen) + 1e-20)
                })
            }
        }
    }
}

/// The `n` largest, and the distance of the least of them from the next.
fn largest(scores: &[f64], n: usize) -> (Vec<usize>, f64) {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap());
    let margin = order.get(n).map_or(f64::INFINITY, |&next| scores[order[n - 1]] - scores[next]);
    order.truncate(n);
    (order, margin)
}

/// Scores in the groups with the largest sums of their `n_judged` best, and the margin of that choice.
fn in_best_groups(scores: &[f64], Groups { n, n_used }: Groups, n_judged: usize) -> (Vec<f64>, f64) {
    let size = scores.len() / n;
    let judge = |group: &[f64]| largest(group, n_judged).0.iter().map(|&i| group[i]).sum::<f64>();
    let (used, margin) = largest(&scores.chunks(size).map(judge).collect::<Vec<_>>(), n_used);
    let kept = |(i, &score)| if used.contains(&(i / size)) { score } else { f64::NEG_INFINITY };
    (scores.iter().enumerate().map(kept).collect(), margin)
}

/// Rows whose choice of experts no rounding can change, and what becomes of them.
fn clear_rows(layer: &Layer, dtype: DType, rows: usize, margin: f64) -> (Vec<f32>, Vec<f64>) {
    let (mut values, mut expected) = (Vec::new(), Vec::new());
    for seed in 1000.. {
        if values.len() == rows * layer.hidden {
            break;
        }
        let x = numbers(layer.hidden, seed);
        let (out, clear) = layer.reference(dtype, &x);
        if clear > margin {
            values.extend(x);
            expected.extend(out);
        }
    }
    (values, expected)
}

fn check<B: Probe>(backend: &B, layer: &Layer, dtype: DType, rows: usize) {
    let weight = backend.experts_weight(&layer.spec, layer.hidden, &layer.parts(dtype, 0, 1)).unwrap();
    let mut room = backend.experts_room(&layer.spec, layer.hidden, layer.spec.width, rows + PADDING).unwrap();
    let (values, expected) = clear_rows(layer, dtype, rows, 50.0 * B::TOLERANCE.min(1e-4));
    let tensor = || backend.tensor(rows + PADDING, layer.hidden).unwrap();
    let (mut x, mut out) = (tensor(), tensor());
    backend.fill(&mut x, &values);
    backend.fill(&mut out, &[]);
    backend.experts(&weight, rows, &x, &mut room, &mut out).unwrap();
    let what = format!("{:?} of {rows} rows, {dtype:?}", layer.spec);
    assert_close(&backend.read(&out), &expected, 8.0 * B::TOLERANCE, &what);
}

fn routers(n_experts: usize) -> Vec<Router> {
    let of = |groups| [Router::Softmax { factor: 3.0, groups }, Router::Sigmoid { factor: 2.5, groups }];
    let mut routers = vec![Router::SoftmaxRenormalised, Router::SoftmaxOfChosen];
    routers.extend(of(Groups { n: 1, n_used: 1 }));
    routers.extend(of(Groups { n: n_experts / 4, n_used: n_experts.div_ceil(8) }));
    routers
}

pub fn every_router_of_every_shape<B: Probe>(backend: &B) {
    for (n_experts, n_chosen, width, hidden) in
        [(4, 1, 8, 24), (8, 2, 16, 24), (8, 3, 24, 64), (64, 6, 16, 40)]
    {
        for router in routers(n_experts) {
            let layer = Layer::new(Experts { n_experts, n_chosen, width, router, ..EXPERTS }, hidden);
            for rows in [1, 2, 7, 40] {
                check(backend, &layer, DType::BF16, rows);
            }
            check(backend, &layer, DType::F32, 5);
        }
    }
}

/// So many rows that an expert's come in several blocks, some of them with a single row.
pub fn experts_of_many_rows<B: Probe>(backend: &B) {
    let layer = Layer::new(Experts { n_experts: 4, ..EXPERTS }, HIDDEN);
    for rows in [64, 129, 300] {
        check(backend, &layer, DType::BF16, rows);
    }
}

pub fn experts_with_biases_and_clamped_gates<B: Probe>(backend: &B) {
    for activation in [Activation::Silu, Activation::ClampedSwiglu { limit: 0.75 }] {
        for router in [Router::SoftmaxOfChosen, Router::SoftmaxRenormalised] {
            let layer = Layer::new(Experts { activation, router, bias: Bias::Present, ..EXPERTS }, HIDDEN);
            for rows in [1, 6, 33] {
                check(backend, &layer, DType::BF16, rows);
            }
        }
    }
}

pub fn ranks_share_the_neurons_of_experts<B: Probe>(backend: &B) {
    let layer = Layer::new(Experts { bias: Bias::Present, ..EXPERTS }, HIDDEN);
    let rows = 5;
    let (values, expected) = clear_rows(&layer, DType::BF16, rows, 50.0 * B::TOLERANCE.min(1e-4));
    let mut sums = vec![0f64; rows * HIDDEN];
    for rank in 0..2 {
        let parts = layer.parts(DType::BF16, rank, 2);
        let weight = backend.experts_weight(&layer.spec, HIDDEN, &parts).unwrap();
        let mut room = backend.experts_room(&layer.spec, HIDDEN, layer.spec.width / 2, rows).unwrap();
        let (mut x, mut out) = (backend.tensor(rows, HIDDEN).unwrap(), backend.tensor(rows, HIDDEN).unwrap());
        backend.fill(&mut x, &values);
        backend.experts(&weight, rows, &x, &mut room, &mut out).unwrap();
        sums.iter_mut().zip(backend.read(&out)).for_each(|(sum, part)| *sum += f64::from(part));
    }
    let sums: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
    assert_close(&sums, &expected, 8.0 * B::TOLERANCE, "two ranks");
}
