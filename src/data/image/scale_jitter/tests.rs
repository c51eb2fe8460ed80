use super::*;
use crate::data::source::samples::Stored;
use hotcoco::mask;
use safetensors::SafeTensors;
use serde::Deserialize;

/// The height and width of the image, as in `tools/golden_coco_data.py`.
const SIZE: [usize; 2] = [120, 160];

#[derive(Deserialize)]
struct Golden {
    side: usize,
    cases: Vec<Case>,
    objects: Vec<Vec<Vec<f64>>>,
    fitted: Vec<[usize; 5]>,
}

#[derive(Deserialize)]
struct Case {
    flipped: bool,
    scale: f64,
    share: f64,
    placed: Vec<Option<Placed>>,
}

/// The part of an object within a crop. shapely computed the part of the polygon, its box and its area.
#[derive(Deserialize)]
struct Placed {
    bbox: [f64; 4],
    area: f64,
    /// The mask of the part of the polygon, as run lengths of COCO.
    cut: String,
    /// The mask of the whole object, which was flipped, resized and cropped like an image, as run lengths of COCO.
    moved: String,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../../tests/golden/coco_data.json")).unwrap()
}

fn jitter(sets: &[&str]) -> ScaleJitter {
    let own = ["detection.format=shapes", "detection.train_images=1", "detection.test_images=1"];
    let own = own.iter().chain(&["detection.crop=64", "detection.window=0"]);
    let sets: Vec<String> = own.chain(sets).map(|set| set.to_string()).collect();
    ScaleJitter::new(&Config::parse("", &sets).unwrap())
}

fn picture() -> Vec<u8> {
    let pixel = |y: usize, x: usize| (1..4).map(move |c| ((5 * x + 3 * c * y + x * y / 7) % 256) as u8);
    (0..SIZE[0]).flat_map(|y| (0..SIZE[1]).flat_map(move |x| pixel(y, x))).collect()
}

fn scene(objects: &[Vec<Vec<f64>>]) -> Scene {
    let object = |(class, polygons): (usize, &Vec<Vec<f64>>)| Object {
        class,
        bbox: [0.0; 4],
        area: 0.0,
        is_crowd: false,
        outline: Outline::Polygons(polygons.clone()),
    };
    Scene { image: 3, size: SIZE, objects: objects.iter().enumerate().map(object).collect() }
}

/// Compares normalised planes with the RGB bytes of Pillow's crop. Outside of the crop, the planes must be 0.
fn assert_pixels(what: &str, planes: &[f32], side: usize, name: &str) {
    let file = include_bytes!("../../../../tests/golden/coco_data.safetensors");
    let file = SafeTensors::deserialize(file).unwrap();
    let crop = file.tensor(name).unwrap();
    let [height, width, _] = crop.shape()[..] else { panic!("{name}") };
    let (mean, std) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);
    let (mut worst, mut different) = (0.0f64, 0);
    for (at, &value) in planes.iter().enumerate() {
        let (channel, row, column) = (at / (side * side), at / side % side, at % side);
        if row >= height || column >= width {
            assert_eq!(value, 0.0, "{what}: {row}, {column}");
            continue;
        }
        let byte = (f64::from(value) * std[channel] + mean[channel]) * 255.0;
        let apart = (byte - f64::from(crop.data()[3 * (row * width + column) + channel])).abs();
        worst = worst.max(apart);
        different += usize::from(apart > 0.5);
    }
    assert!(worst < 1.01 && different * 50 < planes.len(), "{what}: {different} bytes differ, by up to {worst}");
}

#[test]
fn pixels_are_pillows_for_every_flip_scale_and_crop_and_zeros_around() {
    let (jitter, bytes) = (jitter(&[]), picture());
    let stored = Stored::Raw { height: SIZE[0], width: SIZE[1] };
    let mut bench = jitter.bench().unwrap();
    let mut out = vec![9.0; 3 * 64 * 64];
    for (number, Case { flipped, scale, share, .. }) in golden().cases.into_iter().enumerate() {
        assert_eq!(bench.open(&bytes, stored).unwrap(), SIZE.into());
        let placement = Placement::new(SIZE, 64, flipped, scale, share);
        jitter.image(&mut bench, &bytes, placement, &mut out).unwrap();
        assert_pixels(&format!("case {number}"), &out, 64, &format!("crop{number}"));
    }
    bench.open(&bytes, stored).unwrap();
    jitter.evaluate(&mut bench, &bytes, SIZE, &mut out).unwrap();
    assert_pixels("evaluated", &out, 64, "evaluated");
}

#[test]
fn sizes_of_evaluated_images_are_detectron2s() {
    for [height, width, side, rows, columns] in golden().fitted {
        assert_eq!(fitted([height, width], side), [rows.max(1), columns.max(1)], "{height}×{width} to {side}");
    }
}

#[test]
fn boxes_areas_and_masks_of_cut_objects_are_shapelys() {
    let Golden { side, cases, objects, .. } = golden();
    let mut left_out = 0;
    for (number, Case { flipped, scale, share, placed }) in cases.into_iter().enumerate() {
        let placement = Placement::new(SIZE, side, flipped, scale, share);
        let ours = placement.scene(&scene(&objects));
        assert_eq!((ours.image, ours.size), (3, [placement.part.height, placement.part.width]));
        let [height, width] = ours.size.map(|length| length as u32);
        let mut ours = ours.objects.into_iter().peekable();
        for (class, placed) in placed.into_iter().enumerate() {
            let what = format!("case {number}, object {class}");
            let own = ours.next_if(|object| object.class == class);
            let (Some(placed), Some(own)) = (&placed, &own) else {
                assert!(placed.is_none() && own.is_none(), "{what}: {own:?}");
                left_out += 1;
                continue;
            };
            let apart = own.bbox.iter().zip(placed.bbox).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(apart < 1e-9, "{what}: {:?} and {:?}", own.bbox, placed.bbox);
            assert!((own.area - placed.area).abs() < 1e-6 * placed.area, "{what}: {} and {}", own.area, placed.area);
            let Outline::Polygons(polygons) = &own.outline else { panic!("{what}") };
            let raster = mask::fr_polys(polygons, height, width).unwrap();
            let overlap = |runs: &str| {
                let other = mask::rle_from_string(runs, height, width).unwrap();
                let area = |intersect| mask::area(&mask::merge(&[raster.clone(), other.clone()], intersect).unwrap());
                area(true) as f64 / area(false) as f64
            };
            assert!(overlap(&placed.cut) > 0.999, "{what}: {}", overlap(&placed.cut));
            // The masks may differ by half a pixel along the outline. In a small or thin object, this is a large share of the area.
            if placed.area > 30_000.0 && scale > 1.0 {
                assert!(overlap(&placed.moved) > 0.98, "{what}: {}", overlap(&placed.moved));
            }
        }
        assert_eq!(ours.next(), None);
    }
    assert!(left_out > 0);
}

#[test]
fn boxes_without_outlines_are_moved_and_cut() {
    let whole =
        Object { class: 1, bbox: [30.0, 20.0, 50.0, 60.0], area: 3000.0, is_crowd: false, outline: Outline::None };
    let object = |bbox| Object { bbox, ..whole.clone() };
    let objects = vec![whole.clone(), object([100.0, 100.0, 50.0, 15.0]), object([0.0, 0.0, 4.0, 4.0])];
    let scene = Scene { image: 0, size: SIZE, objects };
    // The image becomes 240 rows of 320 pixels. The crop shows 160 rows from row 32 on, and 160 columns from column 64 on.
    let placement = Placement::new(SIZE, 160, true, 2.0, 0.4);
    assert_eq!((placement.part.top, placement.part.left), (32, 64));
    let boxes: Vec<[f64; 4]> = placement.scene(&scene).objects.into_iter().map(|object| object.bbox).collect();
    assert_eq!(boxes, [[96.0, 8.0, 64.0, 120.0]]);
}

#[test]
fn a_sample_is_a_function_of_its_key_and_draws_use_the_whole_range() {
    let (jitter, bytes) = (jitter(&["detection.resize=[0.5, 2.0]"]), picture());
    let scene = scene(&golden().objects);
    let mut bench = jitter.bench().unwrap();
    let mut sample = |key: u64| {
        let mut out = vec![9.0; 3 * 64 * 64];
        bench.open(&bytes, Stored::Raw { height: SIZE[0], width: SIZE[1] }).unwrap();
        let scene = jitter.train(&mut bench, &bytes, &scene, &mut Random::new(&[key]), &mut out).unwrap();
        (scene, out)
    };
    assert!(sample(5) == sample(5) && sample(5) != sample(6));
    let sizes: Vec<[usize; 2]> = (0..60).map(|key| sample(key).0.size).collect();
    let padded = sizes.iter().filter(|size| **size != [64, 64]).count();
    let smallest = sizes.iter().map(|size| size[0]).min().unwrap();
    assert!(
        (15..59).contains(&padded) && (24..30).contains(&smallest),
        "{padded} are padded, the smallest has {smallest}"
    );
    // About half of the images are flipped. A flip moves the small object from the lower right corner to the left.
    let small = |key| sample(key).0.objects.into_iter().find(|object| object.class == 4);
    let lefts: Vec<f64> = (0..60).filter_map(small).map(|object| object.bbox[0]).collect();
    let (at_left, seen) = (lefts.iter().filter(|&&left| left < 20.0).count(), lefts.len());
    assert!(at_left * 4 > seen && at_left * 4 < 3 * seen, "{at_left} of {seen}");
}
