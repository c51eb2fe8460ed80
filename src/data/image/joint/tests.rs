use super::*;
use crate::data::source::samples::Stored;

fn joint(sets: &[&str]) -> Joint {
    let mut all = vec!["segmentation.format=shapes", "segmentation.train_images=2", "segmentation.test_images=2"];
    all.extend([
        "segmentation.crop=32",
        "segmentation.classes=9",
        "model.image_size=32",
        "segmentation.distortion=false",
    ]);
    all.extend(sets);
    let sets: Vec<String> = all.into_iter().map(str::to_string).collect();
    Joint::new(&Config::parse("", &sets).unwrap())
}

/// An image of flat areas of 10 rows and 14 columns, and its label map. The red of a pixel is 20 times its class.
fn image(height: usize, width: usize) -> (Vec<u8>, LabelMap) {
    let class = |row: usize, column: usize| (row / 10 * 3 + column / 14) as u8 % 9;
    let classes: Vec<u8> =
        (0..height).flat_map(|row| (0..width).map(move |column| (row, column))).map(|(r, c)| class(r, c)).collect();
    let bytes = classes.iter().flat_map(|&class| [20 * class, 100, 200]).collect();
    (bytes, LabelMap { height, width, classes })
}

/// The red values, in units of bytes, and the classes of a training sample.
fn sample(joint: &Joint, (bytes, map): &(Vec<u8>, LabelMap), key: u64) -> (Vec<f64>, Vec<u8>) {
    let side = joint.keys.crop;
    let (mut pixels, mut classes) = (vec![9.0; 3 * side * side], vec![9; side * side]);
    let mut bench = joint.bench().unwrap();
    bench.open(bytes, Stored::Raw { height: map.height, width: map.width }).unwrap();
    let out = Crop { pixels: &mut pixels, classes: &mut classes };
    joint.train(&mut bench, bytes, map, &mut Random::new(&[key]), out).unwrap();
    let red = pixels[..side * side].iter().map(|&value| (f64::from(value) * 0.229 + 0.485) * 255.0).collect();
    (red, classes)
}

#[test]
fn an_image_and_its_map_are_resized_cropped_flipped_and_padded_alike() {
    let joint = joint(&["segmentation.resize=[0.5, 2.0]"]);
    let image = image(47, 61);
    let (mut padded, mut samples) = (0, std::collections::BTreeSet::new());
    for key in 0..40 {
        let (red, classes) = sample(&joint, &image, key);
        samples.insert(classes.clone());
        let inside: Vec<usize> = (0..classes.len()).filter(|&i| classes[i] != IGNORED).collect();
        // Near a border between two classes, the colours are blended, and the nearest pixel may have the other class.
        let right = inside.iter().filter(|&&i| (red[i] - 20.0 * f64::from(classes[i])).abs() < 4.0).count();
        assert!(right as f64 > 0.6 * inside.len() as f64, "{key}: {right} of {}", inside.len());
        let outside = (0..classes.len()).filter(|&i| classes[i] == IGNORED);
        assert!(outside.clone().all(|i| (red[i] - 0.485 * 255.0).abs() < 1e-3), "the mean colour");
        padded += usize::from(outside.count() > 0);
    }
    assert!((5..30).contains(&padded) && samples.len() == 40, "{padded} are padded, {} differ", samples.len());
}

#[test]
fn a_sample_is_a_function_of_its_key_alone() {
    let joint = joint(&["segmentation.distortion=true"]);
    let image = image(50, 70);
    assert_eq!(sample(&joint, &image, 5), sample(&joint, &image, 5));
    assert_ne!(sample(&joint, &image, 5), sample(&joint, &image, 6));
}

#[test]
fn a_crop_of_one_class_is_drawn_again() {
    // One class covers nine tenths of the width.
    let (height, width) = (32, 320);
    let classes: Vec<u8> = (0..height * width).map(|i| u8::from(i % width >= 288)).collect();
    let image = (vec![50; 3 * height * width], LabelMap { height, width, classes });
    let shares = |limit: &str| {
        let joint = joint(&["segmentation.resize=[1.0, 1.0]", &format!("segmentation.category_limit={limit}")]);
        let mixed = |key| {
            let classes = sample(&joint, &image, key).1;
            classes.contains(&0) && classes.contains(&1)
        };
        (0..200).filter(|&key| mixed(key)).count()
    };
    let (without, with) = (shares("1.0"), shares("0.75"));
    assert!(without < 40 && with > 80, "{without} and {with} of 200");
}

#[test]
fn sizes_are_those_of_mmcv_and_nearest_is_that_of_opencv() {
    // The expected values are those of mmcv.rescale_size((w, h), (2048, 512)), and in the fourth line of (2048, 512) times 0.7.
    assert_eq!(fitting((512, 683), 512, 1.0), (512, 683));
    assert_eq!(fitting((300, 400), 512, 1.0), (512, 683));
    assert_eq!(fitting((200, 1600), 512, 1.0), (256, 2048));
    assert_eq!(fitting((512, 683), 512, 0.7), (358, 478));
    // The expected values are those of cv2.resize(np.arange(5)[None], (7, 1), interpolation=cv2.INTER_NEAREST), and of the same
    // with (3, 1).
    let map = LabelMap { height: 1, width: 5, classes: vec![0, 1, 2, 3, 4] };
    let row = |width: usize| {
        let mut out = vec![0; width];
        Nearest { map: &map, resized: (1, width) }.row(0, 0, &mut out);
        out
    };
    assert_eq!(row(7), [0, 0, 1, 2, 2, 3, 4]);
    assert_eq!(row(3), [0, 1, 3]);
}
