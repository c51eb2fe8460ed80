//! `incubate predict`: shows what a model sees in images.

use super::args::PredictArgs;
use super::load::devices;
use super::print_either;
use crate::pipeline::predict;
use crate::pipeline::seen::Prediction;
use crate::run::table::{DETECT, FINETUNE, Row, SEGMENT};
use anyhow::Result;
use std::fmt::Write;

/// How many classes are printed for each image.
const NAMED: usize = 5;

pub fn predict(args: &PredictArgs) -> Result<()> {
    let config = args.config.load()?;
    let file = |row: &Row| config.run.dir.join(row.writes);
    let written = || [&SEGMENT, &DETECT].map(file).into_iter().find(|file| file.exists());
    let weights = args.weights.clone().or_else(written).unwrap_or_else(|| file(&FINETUNE));
    let into = args.into.clone().unwrap_or_else(|| config.run.dir.join("predictions"));
    let device = devices(&config)?.device(0);
    let predictions = predict::predict(&config, &weights, device, &args.images, &into)?;
    print_either(args.json, &predictions, || predictions.iter().map(text).collect())
}

fn text(prediction: &Prediction) -> String {
    let mut text = format!("{}\n", prediction.image.display());
    for share in prediction.classes.iter().take(NAMED) {
        let _ = writeln!(text, "  {:>5.1} %  {}", share.percent, share.name);
    }
    let more = prediction.classes.len().saturating_sub(NAMED);
    if more > 0 {
        let _ = writeln!(text, "           and {more} more");
    }
    text + &format!("  picture: {}\n", prediction.picture.display())
}
