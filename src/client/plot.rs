//! Latency over load, drawn as SVG.

use std::fmt::Write as _;

use super::report::{Distribution, Level, Report};

/// Of one panel, in pixels.
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 230.0;
/// Around the axes of a panel: left, right, top, bottom.
const MARGIN: [f64; 4] = [58.0, 14.0, 34.0, 44.0];
const MEDIAN: &str = "#2563eb";
const TAIL: &str = "#dc2626";
const STYLE: &str = "text{font:11px system-ui,sans-serif;fill:#374151}.title{font-size:13px;font-weight:600;\
     fill:#111827}.grid{stroke:#e5e7eb}.axis{stroke:#9ca3af}polyline{fill:none;stroke-width:2;stroke-linejoin:round}";

/// A line of a panel: its name, its colour, its points.
struct Series {
    name: &'static str,
    color: &'static str,
    points: Vec<(f64, f64)>,
}

/// How a load becomes a place on the horizontal axis.
enum Axis {
    Linear {
        end: f64,
    },
    /// Loads that double from one to the next stand side by side.
    Logarithmic {
        from: f64,
        to: f64,
    },
}

/// Time to first token, time per output token and throughput over the report's loads.
pub fn svg(report: &Report) -> String {
    let loads: Vec<f64> = report.loads.iter().map(load_of).collect();
    let axis = Axis::of(&loads);
    let is_open = report.loads.iter().any(|load| load.rate.is_some());
    let label = if is_open { "requests per second" } else { "requests in flight" };
    let latency = |of: fn(&Level) -> Option<Distribution>| {
        let points = |value: fn(&Distribution) -> f64| {
            let levels = report.loads.iter().filter_map(|load| Some((load_of(load), of(load)?)));
            levels.map(|(x, distribution)| (x, value(&distribution))).collect()
        };
        vec![
            Series { name: "p50", color: MEDIAN, points: points(|distribution| distribution.p50) },
            Series { name: "p99", color: TAIL, points: points(|distribution| distribution.p99) },
        ]
    };
    let throughput = report.loads.iter().map(|load| (load_of(load), load.output_tokens_per_s)).collect();
    let panels = [
        ("Time to first token, ms", latency(|load| load.time_to_first_token_ms)),
        ("Time per output token, ms", latency(|load| load.time_per_output_token_ms)),
        ("Output tokens per second", vec![Series { name: "", color: MEDIAN, points: throughput }]),
    ];
    let (width, height) = (WIDTH * panels.len() as f64, HEIGHT + 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\">\n<style>{STYLE}</style>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for (index, (title, series)) in panels.iter().enumerate() {
        panel(&mut svg, WIDTH * index as f64, title, label, &axis, &loads, series);
    }
    let caption = format!(
        "{}, {}, {} tokens in, {} out",
        report.device, report.dtype, report.input_tokens, report.output_tokens
    );
    text(&mut svg, width / 2.0, height - 8.0, "middle", "", &caption);
    svg += "</svg>\n";
    svg
}

fn load_of(level: &Level) -> f64 {
    level.rate.or(level.in_flight.map(|n| n as f64)).unwrap_or(0.0)
}

impl Axis {
    fn of(loads: &[f64]) -> Axis {
        let from = loads.iter().copied().fold(f64::INFINITY, f64::min);
        let to = loads.iter().copied().fold(0.0, f64::max);
        if from > 0.0 && to / from >= 8.0 {
            Axis::Logarithmic { from, to }
        } else {
            Axis::Linear { end: to.max(1e-9) }
        }
    }

    /// From 0 to 1.
    fn place(&self, load: f64) -> f64 {
        match *self {
            Axis::Linear { end } => load / end,
            Axis::Logarithmic { from, to } => (load / from).ln() / (to / from).ln(),
        }
    }
}

/// Round numbers from 0 on, about five, of which the last is not below `most`.
fn ticks(most: f64) -> Vec<f64> {
    let most = if most > 0.0 { most } else { 1.0 };
    let power = 10f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| step * 5.0 >= most);
    let step = step.unwrap_or(10.0 * power);
    let n_steps = (most / step - 1e-9).ceil().max(1.0) as u32;
    (0..=n_steps).map(|n| f64::from(n) * step).collect()
}

fn panel(
    svg: &mut String,
    left: f64,
    title: &str,
    label: &str,
    axis: &Axis,
    loads: &[f64],
    series: &[Series],
) {
    let [margin_left, margin_right, margin_top, margin_bottom] = MARGIN;
    let (x0, x1) = (left + margin_left, left + WIDTH - margin_right);
    let (y0, y1) = (HEIGHT - margin_bottom, margin_top);
    let most = series.iter().flat_map(|series| &series.points).map(|point| point.1).fold(0.0, f64::max);
    let ticks = ticks(most);
    let end = ticks.last().copied().unwrap_or(1.0);
    let x = |load: f64| x0 + 10.0 + (x1 - x0 - 20.0) * axis.place(load);
    let y = |value: f64| y0 + (y1 - y0) * value / end;
    text(svg, x0, margin_top - 14.0, "start", "title", title);
    for tick in &ticks {
        line(svg, "grid", [x0, y(*tick), x1, y(*tick)]);
        text(svg, x0 - 6.0, y(*tick) + 4.0, "end", "", &number(*tick));
    }
    line(svg, "axis", [x0, y0, x1, y0]);
    let mut last = f64::NEG_INFINITY;
    for load in loads {
        line(svg, "axis", [x(*load), y0, x(*load), y0 + 4.0]);
        // Labels that would touch are left out.
        if x(*load) - last >= 22.0 {
            text(svg, x(*load), y0 + 16.0, "middle", "", &number(*load));
            last = x(*load);
        }
    }
    text(svg, x0 + 10.0, y0 + 33.0, "start", "", label);
    for (index, Series { name, color, points }) in series.iter().enumerate() {
        let path: Vec<String> =
            points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "<polyline stroke=\"{color}\" points=\"{}\"/>", path.join(" "));
        for point in points {
            let _ = writeln!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{color}\"/>",
                x(point.0),
                y(point.1)
            );
        }
        if !name.is_empty() {
            let (at, middle) = (x1 - 28.0 - 44.0 * (series.len() - 1 - index) as f64, y0 + 29.0);
            let _ = writeln!(svg, "<circle cx=\"{at:.1}\" cy=\"{middle:.1}\" r=\"4\" fill=\"{color}\"/>");
            text(svg, at + 8.0, middle + 4.0, "start", "", name);
        }
    }
}

fn line(svg: &mut String, class: &str, [x1, y1, x2, y2]: [f64; 4]) {
    let _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, class: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
    );
}

/// Without digits that say nothing.
fn number(value: f64) -> String {
    let (value, unit) = if value >= 1000.0 { (value / 1000.0, "k") } else { (value, "") };
    let text = format!("{value:.3}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_the_top() {
        assert_eq!(ticks(5.0), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(ticks(730.0), [0.0, 200.0, 400.0, 600.0, 800.0]);
        assert_eq!(ticks(0.0).last(), Some(&1.0));
        for most in [1e-4, 0.3, 9.99, 10.0, 10.01, 123_456.0] {
            let ticks = ticks(most);
            assert!((2..=6).contains(&ticks.len()), "{most}: {ticks:?}");
            assert!(ticks.last().expect("ticks") + 1e-12 >= most, "{most}: {ticks:?}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.5, 12.0, 800.0, 1500.0, 120_000.0].map(number);
        assert_eq!(shown, ["0", "0.5", "12", "800", "1.5k", "120k"]);
    }

    #[test]
    fn loads_that_double_stand_side_by_side() {
        let axis = Axis::of(&[1.0, 4.0, 16.0]);
        assert_eq!([1.0, 4.0, 16.0].map(|load| axis.place(load)), [0.0, 0.5, 1.0]);
        assert_eq!(Axis::of(&[2.0, 4.0]).place(2.0), 0.5);
    }
}
