//! The recipe for inputs of up to 32 pixels gives DeiT's pixels, which `tools/golden_transforms.py` wrote, and the same pixels for
//! every source.

use crate::drawn;
use crate::golden::{SAME, difference, golden};
use crate::transforms::{bytes_of, largest, operation};
use incubate::config::Config;
use incubate::data::image::normalise::Normalise;
use incubate::data::image::pixels::Pixels;
use incubate::data::image::randaugment::Canvas;
use incubate::data::image::recipe::Recipe;
use incubate::data::source::samples::Stored;
use incubate::random::Random;
use safetensors::SafeTensors;

#[test]
fn a_small_image_is_cropped_flipped_and_augmented_as_deit_does_in_colour_and_in_gray() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let mut canvas = Canvas::new([124, 116, 104, 0]);
    let mut gray_canvas = Canvas::new([124, 124, 124, 0]);
    let mut cases = 0;
    for name in golden.names() {
        let Some((mode, rest)) = name.strip_prefix("small.").and_then(|rest| rest.split_once('.')) else { continue };
        let (draw, operation_name) = rest.split_once('.').unwrap();
        let numbers: Vec<isize> = draw.split(' ').map(|number| number.parse().unwrap()).collect();
        let image = golden.tensor(&format!("small.{mode}")).unwrap();
        let (size, channels) = (image.shape()[0], image.data().len() / image.shape()[0].pow(2));
        let pixel = |bytes: &[u8]| [bytes[0], bytes[channels / 2], bytes[channels - 1], 255];
        let rgbx = image.data().chunks(channels).map(pixel).collect();
        let canvas = if channels == 1 { &mut gray_canvas } else { &mut canvas };
        canvas.begin(size).copy_part(&Pixels { width: size, height: size, rgbx }, (numbers[0], numbers[1]));
        canvas.flipped = numbers[2] == 1;
        canvas.apply(operation(operation_name));
        let mut planes = vec![0.0; channels * size * size];
        let normalise = Normalise::new(&[0.0, 0.0, 0.0][..channels], &[1.0, 1.0, 1.0][..channels]);
        normalise.apply(&canvas.pixels, canvas.table.as_deref(), canvas.flipped, &mut planes);
        let d = difference(&bytes_of(&planes, channels), golden.tensor(name).unwrap().data());
        assert!(d <= SAME, "{name}: {d}");
        cases += 1;
    }
    assert_eq!(cases, 48);
}

/// A training recipe for images of `size` pixels, with no augmentation except that of `sets`.
fn small_recipe(size: usize, channels: usize, sets: &[&str]) -> Recipe {
    let numbers = |number: &str| format!("[{}]", vec![number; channels].join(", "));
    let model = [format!("model.image_size={size}"), "model.patch_size=1".into(), format!("model.channels={channels}")];
    let data = [format!("data.mean={}", numbers("0")), format!("data.std={}", numbers("1"))];
    let plain = ["crop_padding=0", "auto_augment=\"\"", "color_jitter=0", "flip=0", "erase=0"];
    let plain = plain.map(|set| format!("data.{set}"));
    let all = [&model[..], &data, &plain, &sets.iter().map(|set| set.to_string()).collect::<Vec<_>>()].concat();
    Recipe::new(&Config::parse("", &all).unwrap())
}

/// A gray image of 8 × 8 pixels with the bytes 1 to 64, after the transforms of training.
fn trained(sets: &[&str], key: u64) -> Vec<f32> {
    let recipe = small_recipe(8, 1, sets);
    let image: Vec<u8> = (1..=64).collect();
    let mut out = vec![f32::NAN; 64];
    let stored = Stored::Planes { channels: 1, size: 8 };
    recipe.train(&mut recipe.workbench().unwrap(), &image, stored, &mut Random::new(&[key]), &mut out).unwrap();
    out
}

fn bytes(numbers: &[f32]) -> Vec<i32> {
    numbers.iter().map(|number| (number * 255.0).round() as i32).collect()
}

#[test]
fn a_padded_crop_shifts_the_image_by_at_most_the_padding_over_black() {
    let mut shifts = std::collections::HashSet::new();
    for key in 0..500 {
        let out = bytes(&trained(&["data.crop_padding=2"], key));
        // Pixel (3, 3) stays inside for every shift of up to 2; its value tells the shift.
        let value = out[3 * 8 + 3] - 1;
        let (down, right) = (value / 8 - 3, value % 8 - 3);
        assert!(down.abs() <= 2 && right.abs() <= 2);
        for row in 0..8 {
            for column in 0..8 {
                let (r, c) = (row + down, column + right);
                let expected = if (0..8).contains(&r) && (0..8).contains(&c) { r * 8 + c + 1 } else { 0 };
                assert_eq!(out[(row * 8 + column) as usize], expected);
            }
        }
        shifts.insert((down, right));
    }
    assert_eq!(shifts.len(), 25, "every shift occurs");
}

#[test]
fn a_flip_mirrors_each_row_and_erasing_replaces_one_rectangle() {
    assert_eq!(bytes(&trained(&["data.flip=1"], 0))[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
    let original = trained(&[], 0);
    for key in 0..300 {
        let out = trained(&["data.erase=1"], key);
        let changed: Vec<usize> = (0..64).filter(|&i| out[i] != original[i]).collect();
        let (top, bottom) = (changed[0] / 8, changed[changed.len() - 1] / 8);
        let left = changed.iter().map(|i| i % 8).min().unwrap();
        let right = changed.iter().map(|i| i % 8).max().unwrap();
        assert_eq!(changed.len(), (bottom - top + 1) * (right - left + 1), "the change is a filled rectangle");
        assert!((1..=28).contains(&changed.len()), "{} pixels", changed.len());
    }
}

#[test]
fn planes_rows_and_a_file_of_one_image_give_the_same_training_pixels() {
    for size in [32, 40] {
        let recipe =
            small_recipe(size, 3, &["data.auto_augment=rand-m9-mstd0.5-inc1", "data.crop_padding=4", "data.erase=0.5"]);
        let rgb = drawn::rgb(1, 2, size, size);
        let planes: Vec<u8> = (0..3).flat_map(|channel| rgb.iter().skip(channel).step_by(3)).copied().collect();
        let file = drawn::png(1, 2, size, size);
        let forms = [
            (&planes, Stored::Planes { channels: 3, size }),
            (&rgb, Stored::Raw { height: size, width: size }),
            (&file, Stored::Encoded),
        ];
        let mut bench = recipe.workbench().unwrap();
        let mut first_of_each_key = Vec::new();
        for key in 0..30 {
            let mut all = forms.map(|(bytes, stored)| {
                let mut out = vec![f32::NAN; 3 * size * size];
                recipe.train(&mut bench, bytes, stored, &mut Random::new(&[key]), &mut out).unwrap();
                out
            });
            assert!(all[0] == all[1] && all[0] == all[2], "{size} pixels, key {key}");
            first_of_each_key.push(std::mem::take(&mut all[0]));
        }
        assert!(first_of_each_key.windows(2).all(|two| two[0] != two[1]), "each key gives another augmentation");
    }
}

#[test]
fn an_image_of_another_size_is_resized_before_its_padded_crop_and_evaluated_whole() {
    let recipe = small_recipe(32, 3, &["data.reduced_decode=false"]);
    let mut bench = recipe.workbench().unwrap();
    for side in [32, 20, 90] {
        let rgb = drawn::rgb(1, 2, side, side);
        let stored = Stored::Raw { height: side, width: side };
        let mut planes = [vec![0.0; 3 * 32 * 32], vec![0.0; 3 * 32 * 32]];
        recipe.train(&mut bench, &rgb, stored, &mut Random::new(&[1]), &mut planes[0]).unwrap();
        recipe.evaluate(&mut bench, &rgb, stored, &mut planes[1]).unwrap();
        let [trained, evaluated] = planes.map(|planes| bytes_of(&planes, 3));
        // Training resamples columns first and evaluation rows first, so the bytes may differ by 1.
        assert!(largest(&trained, &evaluated) <= 1, "{side}");
        assert!(side != 32 || trained == rgb, "an image of the input's size stays as it is");
    }
}
