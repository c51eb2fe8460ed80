//! Random crops, operations and mixes are distributed as timm draws them (`tools/golden_transforms.py`).

use crate::golden::golden;
use incubate::config::Config;
use incubate::data::image::mix::Mix;
use incubate::data::image::pixels::Region;
use incubate::data::image::randaugment::{Operation, Policy};
use incubate::data::image::{crop, erase};
use incubate::random::Random;
use serde_json::Value;

/// Compares two equally large samples by χ². Fails if p < 0.001 (by Wilson and Hilferty's approximation of the quantile).
#[track_caller]
fn agree(what: &str, ours: &[u64], golden: &[u64]) {
    assert_eq!(ours.iter().sum::<u64>(), golden.iter().sum::<u64>(), "{what}");
    let pairs = ours.iter().zip(golden).map(|(&a, &b)| (a as f64, b as f64)).filter(|(a, b)| a + b > 0.0);
    let (bins, chi) = pairs.fold((0.0, 0.0), |(n, sum), (a, b)| (n + 1.0, sum + (a - b).powi(2) / (a + b)));
    let freedom = f64::max(bins - 1.0, 1.0);
    let critical = freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.09 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    assert!(chi < critical, "{what}: χ² {chi:.1} of {freedom} degrees, at most {critical:.1}\n{ours:?}\n{golden:?}");
}

fn counts(golden: &Value) -> Vec<u64> {
    golden["counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect()
}

/// Counts values in equal bins as numpy's histogram does: the last bin includes its upper bound.
fn histogram(golden: &Value, values: impl IntoIterator<Item = f64>) -> Vec<u64> {
    let (low, high) = (golden["low"].as_f64().unwrap(), golden["high"].as_f64().unwrap());
    let bins = counts(golden).len();
    let mut result = vec![0; bins];
    for value in values {
        assert!((low..=high).contains(&value), "{value} is not in {low}..{high}");
        result[((value - low) / (high - low) * bins as f64).min(bins as f64 - 1.0) as usize] += 1;
    }
    result
}

#[test]
fn crops_and_erased_rectangles_are_distributed_as_timms() {
    let golden: Value = serde_json::from_slice(&golden("transforms.json")).unwrap();
    let draws = golden["draws"].as_u64().unwrap();
    let mut random = Random::new(&[1]);
    let crops: Vec<Region> =
        (0..draws).map(|_| crop::random_resized(&mut random, 375, 500, [0.08, 1.0], [0.75, 4.0 / 3.0])).collect();
    let share = |r: &Region| (r.width * r.height) as f64 / (500.0 * 375.0);
    let check = |name: &str, values: Vec<f64>| {
        agree(name, &histogram(&golden[name], values), &counts(&golden[name]));
    };
    check("crop area", crops.iter().map(share).collect());
    check("crop ratio", crops.iter().map(|r| (r.width as f64 / r.height as f64).ln()).collect());
    check("crop left", crops.iter().map(|r| r.left as f64 / 500.0).collect());
    check("crop top", crops.iter().map(|r| r.top as f64 / 375.0).collect());
    let erased: Vec<Option<Region>> = (0..draws).map(|_| erase::rectangle(224, &mut random)).collect();
    let area = |r: &Option<Region>| r.map_or(0.0, |r| (r.width * r.height) as f64 / (224.0 * 224.0));
    check("erased area", erased.iter().map(area).collect());
    let ratio = |r: &Option<Region>| r.map_or(0.0, |r| (r.height as f64 / r.width as f64).ln());
    check("erased ratio", erased.iter().map(ratio).collect());
}

fn name_and_argument(operation: Operation) -> (&'static str, Option<f64>) {
    match operation {
        Operation::AutoContrast => ("AutoContrast", None),
        Operation::Equalize => ("Equalize", None),
        Operation::Invert => ("Invert", None),
        Operation::Posterize(bits) => ("Posterize", Some(bits.into())),
        Operation::Solarize(from) => ("Solarize", Some(from.into())),
        Operation::SolarizeAdd(add) => ("SolarizeAdd", Some(add.into())),
        Operation::Color(x) => ("Color", Some(x)),
        Operation::Contrast(x) => ("Contrast", Some(x)),
        Operation::Brightness(x) => ("Brightness", Some(x)),
        Operation::Sharpness(x) => ("Sharpness", Some(x)),
        Operation::Rotate(x) => ("Rotate", Some(x)),
        Operation::ShearX(x) => ("ShearX", Some(x)),
        Operation::ShearY(x) => ("ShearY", Some(x)),
        Operation::TranslateX(x) => ("TranslateX", Some(x)),
        Operation::TranslateY(x) => ("TranslateY", Some(x)),
    }
}

#[test]
fn operations_and_their_magnitudes_are_distributed_as_timms() {
    let golden: Value = serde_json::from_slice(&golden("transforms.json")).unwrap();
    let policy = Policy::parse("rand-m9-mstd0.5-inc1").unwrap().unwrap();
    let mut random = Random::new(&[2]);
    let drawn: Vec<Option<Operation>> =
        (0..golden["draws"].as_u64().unwrap()).map(|_| policy.draw(&mut random)).collect();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for (name, count) in golden["operations"].as_object().unwrap() {
        let plain = name.trim_end_matches("Increasing").trim_end_matches("Rel");
        let name_of =
            |operation: &Option<Operation>| operation.map_or("none", |operation| name_and_argument(operation).0);
        ours.push(drawn.iter().filter(|operation| name_of(operation) == plain).count() as u64);
        theirs.push(count.as_u64().unwrap());
        let key = format!("argument of {plain}");
        if let Some(reference) = golden.get(&key) {
            // The test needs samples of the same size, so draw as many values as the reference has.
            let values =
                drawn.iter().flatten().map(|o| name_and_argument(*o)).filter(|p| p.0 == plain).filter_map(|p| p.1);
            let wanted = counts(reference).iter().sum::<u64>() as usize;
            let mut taken: Vec<f64> = values.take(wanted).collect();
            while taken.len() < wanted {
                let operation = policy.draw(&mut random).map(name_and_argument);
                taken.extend(operation.filter(|p| p.0 == plain).and_then(|p| p.1));
            }
            agree(&key, &histogram(reference, taken), &counts(reference));
        }
    }
    agree("operations", &ours, &theirs);
}

#[test]
fn mixup_and_cutmix_are_distributed_as_timms() {
    let golden: Value = serde_json::from_slice(&golden("transforms.json")).unwrap();
    for (name, mixup, cutmix) in [("mixup", "0.8", "0"), ("cutmix", "0", "1"), ("both", "0.8", "1")] {
        let sets = [format!("data.mixup={mixup}"), format!("data.cutmix={cutmix}")];
        let data = Config::parse("", &sets).unwrap().data;
        let draws: Vec<Mix> =
            (0..golden["draws"].as_u64().unwrap()).map(|key| Mix::draw(&data, 224, &[3, key])).collect();
        let reference = &golden[format!("{name} cut")];
        let cuts = draws.iter().filter(|mix| mix.region.is_some()).count() as u64;
        let theirs = ["yes", "no"].map(|key| reference[key].as_u64().unwrap());
        agree(name, &[cuts, draws.len() as u64 - cuts], &theirs);
        // Both programs correct CutMix's λ to the area that is pasted.
        let reference = &golden[format!("{name} lambda")];
        agree(name, &histogram(reference, draws.iter().map(|mix| mix.lambda)), &counts(reference));
    }
}
