//! `incubate evaluate`: evaluates an artefact on the test images, or another program's results on COCO or ADE20K.

use super::args::{Downstream, EvaluateArgs};
use super::load::devices;
use super::{print, print_either, weights_or_final};
use crate::downstream::{ade20k, coco};
use crate::pipeline;
use crate::task::{ClassFigures, Figure};
use crate::train::evaluate::{Evaluation, IMAGES};
use crate::usage;
use anyhow::{Context, Result};
use std::path::PathBuf;

/// Executes the command.
pub fn evaluate(args: &EvaluateArgs) -> Result<()> {
    match &args.downstream {
        Some(downstream) => evaluate_downstream(downstream),
        None => evaluate_artefact(args),
    }
}

fn evaluate_artefact(args: &EvaluateArgs) -> Result<()> {
    let config = args.overrides.load(args.config.as_ref().context("clap requires the config")?)?;
    let weights = weights_or_final(&config, &args.weights);
    let device = devices(&config)?.device(0);
    let (task, evaluation) = pipeline::evaluate::evaluate(&config, &weights, device, args.outputs.as_deref())?;
    if args.json {
        return print(&(serde_json::to_string(&evaluation)? + "\n"));
    }
    let Evaluation { metrics, classes } = evaluation;
    let mut text = format!("{} on {} images\n", task.text(&metrics), metrics[IMAGES]);
    if !classes.is_empty() {
        text += &class_table(&classes);
    }
    print(&text)
}

/// The figures of each class as a table for people.
fn class_table(classes: &[ClassFigures]) -> String {
    let longest = classes.iter().map(|class| class.name.chars().count()).max().unwrap_or(0).max(5);
    let names = classes.iter().take(1).flat_map(|class| class.figures.named());
    let head = names.map(|(name, figure)| format!(" {name:>0$}", width(name, figure)));
    let mut text = format!("{:<longest$}{}\n", "class", head.collect::<String>());
    for ClassFigures { name, figures, .. } in classes {
        let cells = figures.named().map(|(name, figure)| {
            let value = match figure {
                Figure::Percent(value) => value.map_or("-".into(), |value| format!("{value:.2}")),
                Figure::Count(count) => count.to_string(),
            };
            format!(" {value:>0$}", width(name, figure))
        });
        text += &format!("{name:<longest$}{}\n", cells.concat());
    }
    text
}

/// The width of a column in characters.
fn width(name: &str, figure: Figure) -> usize {
    match figure {
        Figure::Percent(_) => name.len().max(6),
        Figure::Count(_) => 12,
    }
}

fn evaluate_downstream(results: &Downstream) -> Result<()> {
    let draw = |file: &Option<PathBuf>, picture: &dyn Fn() -> String| match file {
        Some(file) => std::fs::write(file, picture()).map_err(|e| usage!("{}: {e}", file.display())),
        None => Ok(()),
    };
    match results {
        Downstream::Coco { annotations, results, iou, plot, json } => {
            let report = coco::evaluate(annotations, results, iou == "segm")?;
            draw(plot, &|| report.plot())?;
            print_either(*json, &report, || report.text())
        }
        Downstream::Ade20k { labels, predictions, zero_based, plot, json } => {
            let report = ade20k::evaluate(labels, predictions, *zero_based)?;
            draw(plot, &|| report.plot())?;
            print_either(*json, &report, || report.text())
        }
    }
}
