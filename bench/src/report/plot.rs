//! Bar charts as SVG.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

/// A bar's value, with the range over the loop's placements.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// The bar's length.
    pub ns: f64,
    /// The fastest placement.
    pub low: f64,
    /// The slowest placement.
    pub high: f64,
}

impl Bar {
    /// A value without a range.
    pub fn exact(value: f64) -> Self {
        let (ns, low, high) = (value, value, value);
        Self { ns, low, high }
    }
}

/// Bars of one colour: a name for the legend, and a bar (or none) for each category.
#[derive(Debug)]
pub struct Series {
    /// The name in the legend.
    pub name: &'static str,
    /// The bars, in the order of the categories.
    pub bars: Vec<Option<Bar>>,
}

const WIDTH: u32 = 900;
const LABELS: i32 = 230;
const RIGHT: i32 = 70;
const TOP: i32 = 84;
const BOTTOM: i32 = 60;
const BAR: i32 = 13;
const GAP: i32 = 10;
const COLOURS: [RGBColor; 4] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xff, 0x7f, 0x0e),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x7f, 0x3c, 0x8d),
];
const GREY: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

/// The scale of the bars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From zero.
    Linear,
    /// Powers of ten, from 0.1.
    Log,
}

struct Axis {
    scale: Scale,
    max: f64,
}

impl Axis {
    fn new(scale: Scale, largest: f64) -> Self {
        let max = match scale {
            Scale::Linear => {
                let step = step(largest);
                (largest / step).ceil() * step
            }
            Scale::Log => 10f64.powf(largest.log10().ceil()),
        };
        Self { scale, max }
    }

    fn x(&self, value: f64) -> i32 {
        let width = f64::from(WIDTH as i32 - LABELS - RIGHT);
        let share = match self.scale {
            Scale::Linear => value / self.max,
            Scale::Log => ((value / 0.1).log10() / (self.max / 0.1).log10()).max(0.0),
        };
        LABELS + (share * width).round() as i32
    }

    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => {
                let step = step(self.max);
                (0..=(self.max / step).round() as i32)
                    .map(|i| f64::from(i) * step)
                    .collect()
            }
            Scale::Log => {
                let decades = (self.max / 0.1).log10().round() as i32;
                (0..=decades).map(|i| 0.1 * 10f64.powi(i)).collect()
            }
        }
    }
}

/// A step of 1, 2 or 5 that gives at most ten ticks.
fn step(max: f64) -> f64 {
    let decade = 10f64.powf((max / 10.0).log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * decade)
        .find(|step| max / step <= 10.0)
        .unwrap_or(10.0 * decade)
}

fn number(value: f64) -> String {
    if value >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// Draws a chart of horizontal bars.
pub fn bars(
    file: &Path,
    title: &str,
    axis_label: &str,
    scale: Scale,
    categories: &[&str],
    series: &[Series],
) -> Result<(), Box<dyn Error>> {
    let group = BAR * series.len() as i32 + GAP;
    let bottom = TOP + group * categories.len() as i32;
    let size = (WIDTH, (bottom + BOTTOM) as u32);
    let area: DrawingArea<SVGBackend<'_>, Shift> = SVGBackend::new(file, size).into_drawing_area();
    area.fill(&WHITE)?;

    let largest = series
        .iter()
        .flat_map(|s| s.bars.iter().flatten())
        .map(|bar| bar.high)
        .fold(1.0, f64::max);
    let axis = Axis::new(scale, largest);

    area.draw(&Text::new(title.to_owned(), (12, 12), ("sans-serif", 20)))?;
    // A lone series needs no legend.
    if series.len() > 1 {
        for (i, s) in series.iter().enumerate() {
            let x = LABELS + 160 * i as i32;
            area.draw(&Rectangle::new(
                [(x, 48), (x + 12, 60)],
                COLOURS[i].filled(),
            ))?;
            area.draw(&Text::new(s.name, (x + 18, 47), ("sans-serif", 14)))?;
        }
    }
    for tick in axis.ticks() {
        let x = axis.x(tick);
        area.draw(&PathElement::new([(x, TOP), (x, bottom)], GREY))?;
        let label = number(tick);
        let left = x - 4 * label.len() as i32;
        area.draw(&Text::new(label, (left, bottom + 8), ("sans-serif", 14)))?;
    }
    let middle = (LABELS + WIDTH as i32 - RIGHT) / 2 - 3 * axis_label.len() as i32;
    area.draw(&Text::new(
        axis_label.to_owned(),
        (middle, bottom + 32),
        ("sans-serif", 14),
    ))?;

    for (row, category) in categories.iter().enumerate() {
        let top = TOP + GAP / 2 + group * row as i32;
        let label = top + (group - GAP) / 2 - 8;
        area.draw(&Text::new(
            (*category).to_owned(),
            (12, label),
            ("sans-serif", 14),
        ))?;
        for (i, s) in series.iter().enumerate() {
            let Some(bar) = s.bars.get(row).copied().flatten() else {
                continue;
            };
            let y = top + BAR * i as i32;
            let end = axis.x(bar.ns);
            area.draw(&Rectangle::new(
                [(LABELS, y), (end, y + BAR - 2)],
                COLOURS[i].filled(),
            ))?;
            let (low, high) = (axis.x(bar.low), axis.x(bar.high));
            let centre = y + BAR / 2 - 1;
            area.draw(&PathElement::new([(low, centre), (high, centre)], BLACK))?;
            let at = high.max(end) + 5;
            area.draw(&Text::new(number(bar.ns), (at, y - 1), ("sans-serif", 12)))?;
        }
    }
    area.draw(&PathElement::new([(LABELS, TOP), (LABELS, bottom)], BLACK))?;
    area.present()?;
    Ok(())
}
