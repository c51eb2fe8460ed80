//! Equality of the large-image recipe with the real timm and Pillow, through what `tools/golden_transforms.py` wrote.

use incubate::config::Config;
use incubate::data::image::decode::{Decoder, jpeg};
use incubate::data::image::mix::Mix;
use incubate::data::image::normalise::Normalise;
use incubate::data::image::pixels::{Pixels, Region};
use incubate::data::image::randaugment::{Canvas, Operation, Policy};
use incubate::data::image::recipe::Recipe;
use incubate::data::image::resize::{Order, Resample};
use incubate::data::image::{crop, erase};
use incubate::data::source::folder::Folder;
use incubate::data::source::samples::{Samples, Stored};
use incubate::random::Random;
use safetensors::SafeTensors;
use serde_json::Value;

const SIZE: usize = 40;
/// The mean absolute difference where both do the same arithmetic, but for the last bit of a few sums.
const SAME: f64 = 0.02;

fn golden(name: &str) -> Vec<u8> {
    let folder = std::env::var("INCUBATE_GOLDEN").unwrap_or(format!("{}/tests/golden", env!("CARGO_MANIFEST_DIR")));
    std::fs::read(format!("{folder}/{name}")).unwrap()
}

/// Mean absolute difference of bytes.
fn difference(ours: &[u8], golden: &[u8]) -> f64 {
    assert_eq!(ours.len(), golden.len());
    ours.iter().zip(golden).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / ours.len() as f64
}

fn largest(ours: &[u8], golden: &[u8]) -> u8 {
    ours.iter().zip(golden).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

fn rgb(pixels: &Pixels) -> Vec<u8> {
    pixels.rgbx.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect()
}

/// Numbers in planes as interleaved bytes.
fn bytes_of(planes: &[f32], scale: f32) -> Vec<u8> {
    let plane = planes.len() / 3;
    (0..plane).flat_map(|i| [0, 1, 2].map(|c| (planes[c * plane + i] * scale).round() as u8)).collect()
}

fn operation(name: &str) -> Operation {
    let (kind, argument) = name.split_once(' ').unwrap_or((name, "0"));
    let x: f64 = argument.parse().unwrap();
    match kind {
        "AutoContrast" => Operation::AutoContrast,
        "Equalize" => Operation::Equalize,
        "Invert" => Operation::Invert,
        "Posterize" => Operation::Posterize(x as u32),
        "Solarize" => Operation::Solarize(x as u32),
        "SolarizeAdd" => Operation::SolarizeAdd(x as u32),
        "Color" => Operation::Color(x),
        "Contrast" => Operation::Contrast(x),
        "Brightness" => Operation::Brightness(x),
        "Sharpness" => Operation::Sharpness(x),
        "Rotate" => Operation::Rotate(x),
        "ShearX" => Operation::ShearX(x),
        "ShearY" => Operation::ShearY(x),
        "TranslateXRel" => Operation::TranslateX(x),
        "TranslateYRel" => Operation::TranslateY(x),
        other => panic!("{other} is in the golden file alone"),
    }
}

/// Draws an image of `SIZE` × `SIZE` onto the canvas.
fn show(canvas: &mut Canvas, image: &[u8]) {
    let pixels = canvas.begin(SIZE);
    pixels.rgbx.iter_mut().zip(image.as_chunks::<3>().0).for_each(|(to, &[r, g, b])| *to = [r, g, b, 0]);
}

/// What the canvas shows once everything noted is done.
fn shown(canvas: &Canvas) -> Vec<u8> {
    let mut planes = vec![0.0; 3 * SIZE * SIZE];
    let normalise = Normalise::new(&[0.0; 3], &[1.0; 3]);
    normalise.apply(&canvas.pixels, canvas.table.as_deref(), canvas.flipped, &mut planes);
    bytes_of(&planes, 255.0)
}

#[test]
fn every_operation_does_what_pillow_does() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let image = golden.tensor("image").unwrap();
    let mut canvas = Canvas::new([124, 116, 104, 0]);
    let mut kinds = std::collections::BTreeSet::new();
    for name in golden.names() {
        let Some(operation_name) = name.strip_prefix("operation.") else { continue };
        kinds.insert(operation_name.split(' ').next().unwrap().to_string());
        show(&mut canvas, image.data());
        canvas.apply(operation(operation_name));
        let d = difference(&shown(&canvas), golden.tensor(name).unwrap().data());
        assert!(d <= SAME, "{operation_name}: {d}");
    }
    assert_eq!(kinds.len(), 15);
}

#[test]
fn operations_that_are_put_off_give_what_they_give_one_by_one() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let image = golden.tensor("image").unwrap().data();
    let all: Vec<Operation> =
        golden.names().iter().filter_map(|name| name.strip_prefix("operation.")).map(operation).collect();
    let (mut together, mut single) = (Canvas::new([9, 8, 7, 0]), Canvas::new([9, 8, 7, 0]));
    for flipped in [false, true] {
        for (&first, &second) in all.iter().flat_map(|a| all.iter().map(move |b| (a, b))) {
            show(&mut together, image);
            together.flipped = flipped;
            together.apply(first);
            together.apply(second);
            show(&mut single, image);
            single.flipped = flipped;
            for operation in [first, second] {
                let so_far = shown(&single);
                show(&mut single, &so_far);
                single.apply(operation);
            }
            let d = difference(&shown(&together), &shown(&single));
            assert!(d == 0.0, "{first:?}, then {second:?}, flipped {flipped}: {d}");
        }
    }
}

#[test]
fn a_crop_is_resized_as_pillow_does_and_the_evaluation_is_timms() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let large = golden.tensor("large").unwrap();
    let (height, width) = (large.shape()[0], large.shape()[1]);
    let stored = Stored::Raw { height, width };
    let (mut decoder, mut resample, mut out) = (Decoder::new().unwrap(), Resample::default(), Pixels::default());
    let mut cases = 0;
    for name in golden.names() {
        let reference = golden.tensor(name).unwrap();
        if let Some(numbers) = name.strip_prefix("crop.") {
            let numbers: Vec<usize> = numbers.split(' ').map(|n| n.parse().unwrap()).collect();
            let region = Region { left: numbers[0], top: numbers[1], width: numbers[2], height: numbers[3] };
            decoder.open(large.data(), stored).unwrap();
            let view = decoder.view(large.data(), region, 1).unwrap();
            out.resize(SIZE, SIZE);
            // The reference is of Pillow 13, which takes the columns first where they are reduced much more.
            let (its, other) = match numbers[3] > 2 * numbers[2] {
                true => (Order::ColumnsFirst, Order::RowsFirst),
                false => (Order::RowsFirst, Order::ColumnsFirst),
            };
            for (order, mean) in [(its, 0.01), (other, 0.5)] {
                resample.resample(&view, region.area(), region, order, &mut out).unwrap();
                let (d, worst) = (difference(&rgb(&out), reference.data()), largest(&rgb(&out), reference.data()));
                assert!(d <= mean && worst <= 1, "{name}, {order:?}: {d}, at most {worst}");
            }
            cases += 1;
        } else if let Some(numbers) = name.strip_prefix("evaluation.") {
            let numbers: Vec<usize> = numbers.split(' ').map(|n| n.parse().unwrap()).collect();
            let size = format!("model.image_size={}", numbers[0]);
            let sets = [&size, "data.mean=[0,0,0]", "data.std=[1,1,1]"].map(str::to_string);
            let recipe = Recipe::new(&Config::parse("", &sets).unwrap());
            let turned = numbers[1] == height;
            let rotated: Vec<u8>;
            let (image, stored) = if turned {
                // A quarter turn counter-clockwise.
                let pixel = |row: usize, column: usize| &large.data()[3 * (column * width + width - 1 - row)..][..3];
                rotated = (0..width).flat_map(|r| (0..height).flat_map(move |c| pixel(r, c))).copied().collect();
                (&rotated[..], Stored::Raw { height: width, width: height })
            } else {
                (large.data(), stored)
            };
            let mut planes = vec![0.0; 3 * numbers[0] * numbers[0]];
            recipe.evaluate(&mut recipe.workbench().unwrap(), image, stored, &mut planes).unwrap();
            let d = difference(&bytes_of(&planes, 255.0), reference.data());
            assert!(d <= 0.5, "{name}: {d}");
            cases += 1;
        }
    }
    assert_eq!(cases, 7);
}

#[test]
fn every_kind_of_file_is_decoded_as_pillow_converts_it_to_rgb() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let mut decoder = Decoder::new().unwrap();
    let mut kinds = 0;
    for name in golden.names() {
        let Some(kind) = name.strip_prefix("file.") else { continue };
        let bytes = golden.tensor(name).unwrap().data();
        let reference = golden.tensor(&format!("decoded.{kind}")).unwrap();
        let (height, width) = decoder.open(bytes, Stored::Encoded).unwrap();
        assert_eq!([height, width], reference.shape()[..2], "{kind}");
        let view = decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1).unwrap();
        let ours: Vec<u8> = view.bytes.chunks(view.channels).flat_map(|p| [p[0], p[1], p[2]]).collect();
        let d = difference(&ours, reference.data());
        // 4:2:0 and 4:2:2 with another release of libjpeg-turbo than Pillow's may round chroma otherwise.
        assert!(d <= SAME, "{kind}: {d}");
        kinds += 1;
    }
    assert_eq!(kinds, 17);
}

#[test]
fn an_erased_rectangle_and_jittered_colours_are_timms() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let image = golden.tensor("image").unwrap().data();
    let mut canvas = Canvas::new([0; 4]);
    let (mut erased, mut jittered) = (0, 0);
    for name in golden.names() {
        let reference = golden.tensor(name).unwrap();
        if let Some(place) = name.strip_prefix("erased.") {
            let numbers: Vec<usize> = place.split(' ').map(|n| n.parse().unwrap()).collect();
            let region = Region { left: numbers[0], top: numbers[1], width: numbers[2], height: numbers[3] };
            let after: Vec<f32> =
                reference.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            let mut ours: Vec<f32> = (0..3 * SIZE * SIZE)
                .map(|i| f32::from(image[i % (SIZE * SIZE) * 3 + i / (SIZE * SIZE)]) / 255.0)
                .collect();
            // The same noise, plane after plane and row after row.
            let mut noise = (0..3).flat_map(|plane| {
                let rows = region.top..region.top + region.height;
                rows.flat_map(move |row| {
                    (0..region.width).map(move |column| (plane * SIZE + row) * SIZE + region.left + column)
                })
            });
            erase::fill(&mut ours, SIZE, region, |row| row.fill_with(|| after[noise.next().unwrap()]));
            assert!(noise.next().is_none() && ours.iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-6));
            erased += 1;
        } else if let Some(operations) = name.strip_prefix("jitter.") {
            show(&mut canvas, image);
            operations.split(", ").for_each(|name| canvas.apply(operation(name)));
            let d = difference(&shown(&canvas), reference.data());
            assert!(d <= SAME, "{name}: {d}");
            jittered += 1;
        }
    }
    assert_eq!((erased, jittered), (1, 2));
}

#[test]
fn a_photograph_is_evaluated_as_timm_does_at_every_size_of_the_configs() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let photo = golden.tensor("photo.jpg").unwrap();
    for size in [224, 384, 392] {
        let reference = golden.tensor(&format!("photo.evaluation {size}")).unwrap();
        let image_size = format!("model.image_size={size}");
        let sets = [&image_size, "model.patch_size=8", "data.mean=[0,0,0]", "data.std=[1,1,1]"];
        let recipe = Recipe::new(&Config::parse("", &sets.map(str::to_string)).unwrap());
        let mut planes = vec![0.0; 3 * size * size];
        recipe.evaluate(&mut recipe.workbench().unwrap(), photo.data(), Stored::Encoded, &mut planes).unwrap();
        let bytes = bytes_of(&planes, 255.0);
        let kept = (0..size).step_by(7).flat_map(|row| (0..size).step_by(7).map(move |column| row * size + column));
        let ours: Vec<u8> = kept.flat_map(|pixel| bytes[3 * pixel..3 * pixel + 3].to_vec()).collect();
        let (d, worst) = (difference(&ours, reference.data()), largest(&ours, reference.data()));
        assert!(d <= 0.1 && worst <= 1, "{size}: {d}, at most {worst}");
    }
}

/// Means of each channel over 4 × 4 pixels of a square RGB image.
fn means_of_blocks(rgb: &[u8], size: usize) -> Vec<f64> {
    let mut sums = vec![0.0; size / 4 * (size / 4) * 3];
    for (at, byte) in rgb.iter().enumerate() {
        let (row, column, channel) = (at / 3 / size, at / 3 % size, at % 3);
        sums[(row / 4 * (size / 4) + column / 4) * 3 + channel] += f64::from(*byte) / 16.0;
    }
    sums
}

#[test]
fn decoding_at_a_reduced_size_shows_nearly_what_decoding_in_full_does() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let photo = golden.tensor("photo.jpg").unwrap().data();
    let recipe = |reduced: bool| {
        let reduced = format!("data.reduced_decode={reduced}");
        let sets = [&reduced, "model.image_size=112", "data.auto_augment=\"\"", "data.color_jitter=0", "data.erase=0"];
        let one = ["data.mean=[0,0,0]", "data.std=[1,1,1]", "data.crop_scale=[0.4,1.0]"];
        Recipe::new(
            &Config::parse("", &sets.iter().copied().chain(one).map(str::to_string).collect::<Vec<_>>()).unwrap(),
        )
    };
    let (reduced, full) = (recipe(true), recipe(false));
    let (mut one, mut other) = (reduced.workbench().unwrap(), full.workbench().unwrap());
    let mut differing = 0;
    for key in 0..40 {
        let mut planes = [vec![0.0; 3 * 112 * 112], vec![0.0; 3 * 112 * 112]];
        reduced.train(&mut one, photo, Stored::Encoded, &mut Random::new(&[key]), &mut planes[0]).unwrap();
        full.train(&mut other, photo, Stored::Encoded, &mut Random::new(&[key]), &mut planes[1]).unwrap();
        let [ours, theirs] = planes.map(|planes| bytes_of(&planes, 255.0));
        // The DCT's own averaging is another low-pass filter than the bicubic one, which lets more of stripes pass that are
        // as fine as the pixels: in two of these crops by 1.7 and 3.2.
        let d = difference(&ours, &theirs);
        assert!(d <= 4.0, "{key}: {d}");
        // Of the rest nothing is lost or misplaced: a quarter of a pixel would make more than 3 here.
        let (a, b) = (means_of_blocks(&ours, 112), means_of_blocks(&theirs, 112));
        let d = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64;
        assert!(d <= 0.5, "{key}: {d} between means of 4 × 4 pixels");
        differing += usize::from(ours != theirs);
    }
    assert!(differing > 20, "{differing} of 40 were decoded at a reduced size");
}

#[test]
fn a_jpeg_that_is_called_png_is_read() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (name, kind) in [("1.png", "420.jpg"), ("2.jpg", "rgb.png")] {
        std::fs::write(folder.path().join(name), golden.tensor(&format!("file.{kind}")).unwrap().data()).unwrap();
    }
    let files = Folder::flat(folder.path()).unwrap();
    let (mut decoder, mut bytes) = (Decoder::new().unwrap(), Vec::new());
    for index in 0..2 {
        let stored = files.read(index, &mut bytes).unwrap();
        assert_eq!(decoder.open(&bytes, stored).unwrap(), (45, 61));
    }
}

#[test]
fn a_jpeg_is_refused_if_its_end_is_missing_even_below_the_part_that_is_wanted() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let photo = golden.tensor("photo.jpg").unwrap().data();
    let mut decoder = Decoder::new().unwrap();
    let mut top = |bytes: &[u8]| {
        let (_, width) = decoder.open(bytes, Stored::Encoded)?;
        decoder.view(bytes, Region { left: 0, top: 0, width, height: 32 }, 1).map(|view| view.height)
    };
    assert_eq!(top(photo).unwrap(), 34);
    for keep in [photo.len() - 1, photo.len() - 2, photo.len() / 2] {
        let error = top(&photo[..keep]).unwrap_err().to_string();
        assert!(error.contains("not a whole JPEG"), "{keep}: {error}");
    }
    // Bytes that are missing within are filled with gray, as by Pillow; so is what follows an end that comes too early.
    let mut early = photo[..photo.len() / 2].to_vec();
    early.extend([0xFF, 0xD9]);
    assert_eq!(top(&early).unwrap(), 34);
    let (height, width) = decoder.open(&early, Stored::Encoded).unwrap();
    decoder.view(&early, Region { left: 0, top: 0, width, height }, 1).unwrap();
}

#[test]
fn a_progressive_jpeg_of_hundreds_of_scans_is_refused_soon() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let bytes = golden.tensor("file.progressive.jpg").unwrap().data();
    // The last scan, again and again.
    let scan = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).unwrap();
    let (head, last) = (&bytes[..scan], &bytes[scan..bytes.len() - 2]);
    let many = [head, &last.repeat(300), &[0xFF, 0xD9]].concat();
    let mut decoder = Decoder::new().unwrap();
    let (height, width) = decoder.open(&many, Stored::Encoded).unwrap();
    let error = decoder.view(&many, Region { left: 0, top: 0, width, height }, 1).unwrap_err().to_string();
    assert!(error.contains("scan"), "{error}");
}

#[test]
fn a_part_of_a_jpeg_has_the_pixels_of_the_whole() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let (mut one, mut other) = (Decoder::new().unwrap(), Decoder::new().unwrap());
    for kind in ["420.jpg", "444.jpg", "422.jpg", "progressive.jpg", "gray.jpg", "cmyk.jpg"] {
        let bytes = golden.tensor(&format!("file.{kind}")).unwrap().data();
        let (height, width) = one.open(bytes, Stored::Encoded).unwrap();
        other.open(bytes, Stored::Encoded).unwrap();
        for shrunk in [1, 2, 4] {
            let whole = one.view(bytes, Region { left: 0, top: 0, width, height }, shrunk).unwrap();
            let mut random = Random::new(&[1]);
            for _ in 0..50 {
                let region = crop::random(&mut random, height, width, [0.05, 0.9], [0.5, 2.0]);
                let part = other.view(bytes, region, shrunk).unwrap();
                for row in region.top / shrunk..(region.top + region.height) / shrunk {
                    for column in region.left / shrunk..(region.left + region.width) / shrunk {
                        let at = |v: &incubate::data::image::pixels::View| {
                            let start = 4 * ((row - v.top) * v.width + column - v.left);
                            v.bytes[start..start + 3].to_vec()
                        };
                        assert_eq!(at(&part), at(&whole), "{kind} 1/{shrunk} {region:?} row {row} column {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn damaged_empty_and_monstrous_files_are_refused() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let bytes = |kind: &str| golden.tensor(&format!("file.{kind}")).unwrap().data().to_vec();
    let fault = |bytes: &[u8]| {
        let mut decoder = Decoder::new().unwrap();
        let decoded = decoder.open(bytes, Stored::Encoded).and_then(|(height, width)| {
            decoder.view(bytes, Region { left: 0, top: 0, width, height }, 1).map(|view| view.width)
        });
        decoded.unwrap_err().to_string()
    };
    let (jpeg, png) = (bytes("420.jpg"), bytes("rgb.png"));
    assert!(fault(&[]).contains("empty"));
    assert!(fault(b"GIF89a").contains("neither a JPEG nor a PNG"));
    assert!(fault(&jpeg[..jpeg.len() / 2]).contains("not a whole JPEG"), "{}", fault(&jpeg[..jpeg.len() / 2]));
    assert!(fault(&png[..png.len() / 2]).contains("not a whole PNG"), "{}", fault(&png[..png.len() / 2]));
    // 60,000 × 60,000 in a few bytes: the size stands at a fixed place, in a PNG under a checksum.
    let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
    let mut bomb = jpeg.clone();
    bomb[frame + 5..frame + 9].copy_from_slice(&[0xEA, 0x60, 0xEA, 0x60]);
    assert!(fault(&bomb).contains("60000 × 60000"), "{}", fault(&bomb));
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
    let mut crc = flate2::Crc::new();
    crc.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    assert!(fault(&bomb).contains("60000 × 60000"), "{}", fault(&bomb));
}

#[test]
fn what_this_program_compresses_it_reads_again() {
    let file = golden("transforms.safetensors");
    let golden = SafeTensors::deserialize(&file).unwrap();
    let large = golden.tensor("large").unwrap();
    let (height, width) = (large.shape()[0], large.shape()[1]);
    let bytes = jpeg::encode(large.data(), height, width, 95).unwrap();
    let mut decoder = Decoder::new().unwrap();
    assert_eq!(decoder.open(&bytes, Stored::Encoded).unwrap(), (height, width));
    let view = decoder.view(&bytes, Region { left: 0, top: 0, width, height }, 1).unwrap();
    let ours: Vec<u8> = view.bytes.chunks(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    assert!(difference(&ours, large.data()) < 8.0);
}

/// χ² of two equally large samples; fails below p = 0.001 (Wilson and Hilferty's approximation of its quantile).
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

/// As numpy's histogram: equal bins, the last one closed.
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
        (0..draws).map(|_| crop::random(&mut random, 375, 500, [0.08, 1.0], [0.75, 4.0 / 3.0])).collect();
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

/// An operation's name and argument.
fn parts(operation: Operation) -> (&'static str, Option<f64>) {
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
        let name_of = |operation: &Option<Operation>| operation.map_or("none", |operation| parts(operation).0);
        ours.push(drawn.iter().filter(|operation| name_of(operation) == plain).count() as u64);
        theirs.push(count.as_u64().unwrap());
        let key = format!("argument of {plain}");
        if let Some(reference) = golden.get(&key) {
            // As many of ours as there are of theirs, for samples of the same size.
            let values = drawn.iter().flatten().map(|o| parts(*o)).filter(|p| p.0 == plain).filter_map(|p| p.1);
            let wanted = counts(reference).iter().sum::<u64>() as usize;
            let mut taken: Vec<f64> = values.take(wanted).collect();
            while taken.len() < wanted {
                let operation = policy.draw(&mut random).map(parts);
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
        // CutMix's λ is corrected to the pasted area in both.
        let reference = &golden[format!("{name} lambda")];
        agree(name, &histogram(reference, draws.iter().map(|mix| mix.lambda)), &counts(reference));
    }
}
