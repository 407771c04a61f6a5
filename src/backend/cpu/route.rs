//! Which experts a token's logits choose, and what they weigh.

use crate::model::spec::{Experts, Groups, Router};

/// The chosen experts of one token with their weights, by ascending number.
pub fn route(spec: &Experts, logits: &[f32], choice_bias: &[f32]) -> Vec<(usize, f32)> {
    let mut chosen = match spec.router {
        Router::SoftmaxRenormalised => {
            let scores = softmax(logits);
            let chosen = best(&scores, spec.n_chosen);
            let sum: f32 = chosen.iter().map(|&expert| scores[expert]).sum();
            weighed(chosen, |expert| scores[expert] / sum)
        }
        Router::Softmax { factor, groups } => {
            let scores = softmax(logits);
            let best_of_group = |group: &[f32]| best(group, 1).iter().map(|&i| group[i]).sum();
            let choice = of_best_groups(&scores, groups, best_of_group);
            weighed(best(&choice, spec.n_chosen), |expert| scores[expert] * factor)
        }
        Router::Sigmoid { factor, groups } => {
            let scores: Vec<f32> = logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
            let choice: Vec<f32> = scores.iter().zip(choice_bias).map(|(score, bias)| score + bias).collect();
            let two_best = |group: &[f32]| best(group, 2).iter().map(|&i| group[i]).sum();
            let chosen = best(&of_best_groups(&choice, groups, two_best), spec.n_chosen);
            let sum: f32 = chosen.iter().map(|&expert| scores[expert]).sum();
            weighed(chosen, |expert| scores[expert] / (sum + 1e-20) * factor)
        }
        Router::SoftmaxOfChosen => {
            let chosen = best(logits, spec.n_chosen);
            let weights = softmax(&chosen.iter().map(|&expert| logits[expert]).collect::<Vec<_>>());
            chosen.into_iter().zip(weights).collect()
        }
    };
    chosen.sort_unstable_by_key(|&(expert, _)| expert);
    chosen
}

fn weighed(chosen: Vec<usize>, weight: impl Fn(usize) -> f32) -> Vec<(usize, f32)> {
    chosen.into_iter().map(|expert| (expert, weight(expert))).collect()
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let terms: Vec<f32> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f32 = terms.iter().sum();
    terms.into_iter().map(|term| term / sum).collect()
}

/// The numbers of the `n` largest scores, the largest first, ties by the lower number.
fn best(scores: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(n);
    order
}

/// The scores of experts in the best groups; others can never be chosen.
fn of_best_groups(scores: &[f32], groups: Groups, judge: impl Fn(&[f32]) -> f32) -> Vec<f32> {
    let size = scores.len() / groups.n;
    let judged: Vec<f32> = scores.chunks(size).map(judge).collect();
    let used = best(&judged, groups.n_used);
    let kept = |(expert, &score)| if used.contains(&(expert / size)) { score } else { f32::NEG_INFINITY };
    scores.iter().enumerate().map(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::{Activation, Bias};

    fn spec(router: Router, n_experts: usize, n_chosen: usize) -> Experts {
        let (activation, bias) = (Activation::Silu, Bias::Absent);
        Experts { n_experts, n_chosen, width: 1, activation, bias, router, shared_width: 0 }
    }

    fn assert_routes(spec: &Experts, logits: &[f32], bias: &[f32], expected: &[(usize, f64)]) {
        let got = route(spec, logits, bias);
        assert_eq!(got.len(), expected.len(), "{got:?}");
        for ((expert, weight), (expected_expert, expected_weight)) in got.iter().zip(expected) {
            assert_eq!(expert, expected_expert, "{got:?}");
            assert!((f64::from(*weight) - expected_weight).abs() < 1e-6, "{got:?}, not {expected:?}");
        }
    }

    fn ln(weights: &[f64]) -> Vec<f32> {
        weights.iter().map(|weight| weight.ln() as f32).collect()
    }

    #[test]
    fn renormalised_weights_sum_to_one() {
        let spec = spec(Router::SoftmaxRenormalised, 4, 2);
        assert_routes(&spec, &ln(&[1.0, 4.0, 2.0, 3.0]), &[], &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
        // Ties go to the lower number.
        assert_routes(&spec, &[0.5; 4], &[], &[(0, 0.5), (1, 0.5)]);
    }

    #[test]
    fn groups_are_judged_by_their_best() {
        let groups = Groups { n: 3, n_used: 2 };
        let spec = spec(Router::Softmax { factor: 16.0, groups }, 6, 3);
        // The second group has the largest sum and the smallest maximum.
        let logits = ln(&[1.0, 7.0, 5.0, 5.0, 6.0, 2.0]);
        let weight = |x: f64| 16.0 * x / 26.0;
        assert_routes(&spec, &logits, &[], &[(1, weight(7.0)), (4, weight(6.0)), (5, weight(2.0))]);
    }

    #[test]
    fn the_bias_chooses_and_does_not_weigh() {
        let groups = Groups { n: 2, n_used: 1 };
        let spec = spec(Router::Sigmoid { factor: 2.5, groups }, 4, 2);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        // By the sigmoids alone the first group would win.
        let (logits, bias) = ([1.0, 0.5, 0.0, -1.0], [0.0, 0.0, 0.4, 0.3]);
        let (a, b) = (sigmoid(0.0), sigmoid(-1.0));
        assert_routes(&spec, &logits, &bias, &[(2, 2.5 * a / (a + b)), (3, 2.5 * b / (a + b))]);
        let (a, b) = (sigmoid(1.0), sigmoid(0.5));
        assert_routes(&spec, &logits, &[0.0; 4], &[(0, 2.5 * a / (a + b)), (1, 2.5 * b / (a + b))]);
    }

    #[test]
    fn the_chosen_alone_share_the_softmax() {
        let spec = spec(Router::SoftmaxOfChosen, 3, 2);
        assert_routes(&spec, &ln(&[3.0, 1.0, 2.0]), &[], &[(0, 0.6), (2, 0.4)]);
    }

    #[test]
    fn no_numbers_choose_all_the_same() {
        for router in [Router::SoftmaxRenormalised, Router::SoftmaxOfChosen] {
            assert_eq!(route(&spec(router, 4, 2), &[f32::NAN; 4], &[]).len(), 2);
        }
    }
}
