//! Evaluates one image as mmsegmentation does. The network reads the image as a whole, or in windows of the size of the crop,
//! whose logits are averaged. The logits are interpolated to the size of the label map, and each pixel gets the class of its
//! largest logit. With several scales or mirror images, each pixel gets the class of the largest sum of probabilities.

use super::{Heads, Inference, Segmentation};
use crate::model::Network;
use anyhow::Result;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The most numbers of interpolated logits that [`largest`] computes at a time, if a single class does not have more: 256 MiB in
/// fp32.
const MOST_LOGITS: i64 = 1 << 26;

/// The class of each pixel (1, h, w) of an image. `images_1chw` holds the image at each scale.
pub fn infer(task: Segmentation, network: &Network, images_1chw: &[Tensor], [h, w]: [i64; 2]) -> Result<Tensor> {
    let heads = Heads::new(task, network, None);
    let at_scale = |image_1chw: &Tensor| match task.inference {
        Inference::Whole => logits(task, network, &heads, image_1chw),
        Inference::Slide => sliding(task, image_1chw, &|window| logits(task, network, &heads, window)),
    };
    let classes_1hw = match images_1chw {
        [image_1chw] if !task.flip => largest(&at_scale(image_1chw)?, [h, w]),
        images_1chw => summed_probabilities(images_1chw, task.flip, [h, w], &at_scale)?.argmax(1, false),
    };
    Ok(classes_1hw.to_kind(Kind::Uint8).to_device(Device::Cpu))
}

/// The sum of the class probabilities (1, c, h, w) over the scales of an image, as in mmsegmentation's `SegTTAModel`. If `flip`,
/// the mirror images are added too.
fn summed_probabilities(
    images_1chw: &[Tensor],
    flip: bool,
    [h, w]: [i64; 2],
    logits: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let mirrored =
        |tensor: &Tensor, is_mirrored: bool| if is_mirrored { tensor.flip([3]) } else { tensor.shallow_clone() };
    let mut sum: Option<Tensor> = None;
    for image_1chw in images_1chw {
        for is_mirrored in [false, true].into_iter().take(1 + usize::from(flip)) {
            let logits_1chw = mirrored(&logits(&mirrored(image_1chw, is_mirrored))?, is_mirrored);
            let probabilities = logits_1chw.upsample_bilinear2d([h, w], false, None, None).softmax(1, Kind::Float);
            sum = Some(sum.map_or_else(|| probabilities.shallow_clone(), |sum| sum + &probabilities));
        }
    }
    Ok(sum.expect("an image has a scale"))
}

/// The logits (1, c, row, column) of an image, interpolated to the size of the image.
fn logits(task: Segmentation, network: &Network, heads: &Heads, image_1chw: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = image_1chw.size4().expect("an image is (1, c, h, w)");
    let tokens = network.forward(image_1chw, &task.taps());
    let maps: Vec<Tensor> = tokens.iter().map(|tokens| task.map(tokens, [h, w])).collect();
    Ok(heads.uper(&heads.neck(maps)?)?.upsample_bilinear2d([h, w], false, None, None))
}

/// The logits (1, c, h, w) of an image. The logits of a pixel are the means over all windows that contain the pixel.
fn sliding(task: Segmentation, image_1chw: &Tensor, logits: &dyn Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (_, _, h, w) = image_1chw.size4().expect("an image is (1, c, h, w)");
    let options = (Kind::Float, image_1chw.device());
    let sums = Tensor::zeros([1, task.architecture.classes as i64, h, w], options);
    let counts = Tensor::zeros([1, 1, h, w], options);
    let along = |side: i64| windows(side as usize, task.architecture.crop, task.stride);
    for rows in along(h) {
        for columns in along(w) {
            let part = |tensor: &Tensor| {
                let of_rows = tensor.narrow(2, rows.start as i64, rows.len() as i64);
                of_rows.narrow(3, columns.start as i64, columns.len() as i64)
            };
            let _ = part(&sums).g_add_(&logits(&part(image_1chw).contiguous())?);
            let _ = part(&counts).g_add_scalar_(1);
        }
    }
    Ok(sums / counts)
}

/// The windows along one side of an image. Each window starts `stride` pixels after the window before it. But the last window ends
/// at the border, so it may start earlier. A side shorter than the crop has one window.
fn windows(side: usize, crop: usize, stride: usize) -> Vec<Range<usize>> {
    let count = (side + stride - 1).saturating_sub(crop) / stride + 1;
    let window = |number: usize| {
        let end = (number * stride + crop).min(side);
        end.saturating_sub(crop)..end
    };
    (0..count).map(window).collect()
}

/// The class (1, h, w) of the largest logit of each pixel, after an interpolation of the logits (1, c, row, column) to this size.
/// To save memory, the logits of only a few classes are interpolated at a time.
fn largest(logits_1chw: &Tensor, [h, w]: [i64; 2]) -> Tensor {
    let classes = logits_1chw.size()[1];
    let each = (MOST_LOGITS / (h * w)).clamp(1, classes);
    let of_classes = |start: i64| {
        let some = logits_1chw.narrow(1, start, each.min(classes - start));
        let (values, best) = some.upsample_bilinear2d([h, w], false, None, None).max_dim(1, false);
        (values, best + start)
    };
    let better = |(values, best): (Tensor, Tensor), (others, theirs): (Tensor, Tensor)| {
        let is_better = others.gt_tensor(&values);
        (others.where_self(&is_better, &values), theirs.where_self(&is_better, &best))
    };
    let all = (0..classes).step_by(each as usize).map(of_classes);
    all.reduce(better).expect("there are classes").1
}

#[cfg(test)]
mod tests {
    use super::super::tests::task;
    use super::*;

    #[test]
    fn windows_are_those_of_mmsegmentation() {
        // The expected windows are those of `EncoderDecoder.slide_inference` of mmsegmentation 1.2.2 for crops of 512 with a
        // stride of 341.
        let starts = |side| windows(side, 512, 341).iter().map(|window| window.start).collect::<Vec<_>>();
        assert_eq!([starts(512), starts(683), starts(1024)], [vec![0], vec![0, 171], vec![0, 341, 512]]);
        assert_eq!(windows(300, 512, 341), vec![0..300]);
        assert_eq!(windows(854, 512, 341), vec![0..512, 341..853, 342..854]);
    }

    #[test]
    fn scales_and_mirror_images_have_one_vote_each() {
        let image = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([1, 1, 2, 3]);
        // Logits that depend on the pixel's value alone are mirrored with the image, so `flip` only doubles the sums.
        let even = |image: &Tensor| Ok(Tensor::cat(&[image * 0.3, -image], 1));
        let of = |flip, logits: &dyn Fn(&Tensor) -> Result<Tensor>| {
            summed_probabilities(&[image.copy(), image.copy()], flip, [2, 3], logits).unwrap()
        };
        let (plain, flipped) = (of(false, &even), of(true, &even));
        assert!((&plain * 2.0 - &flipped).abs().max().double_value(&[]) < 1e-6);
        assert!((plain.sum(Kind::Float).double_value(&[]) - 12.0).abs() < 1e-5, "a sum over two scales of six pixels");
        // Logits that depend on the column alone become symmetric.
        let ramp = |_: &Tensor| {
            let ramp = Tensor::from_slice(&[0.0f32, 1.0, 2.0]).view([1, 1, 1, 3]).expand([1, 1, 2, 3], false);
            Ok(Tensor::cat(&[&ramp, &ramp.zeros_like()], 1))
        };
        let columns = of(true, &ramp).select(1, 0).select(1, 0);
        assert!((columns.double_value(&[0, 0]) - columns.double_value(&[0, 2])).abs() < 1e-6, "{columns}");
    }

    #[test]
    fn windows_cover_every_pixel_and_average_what_they_share() {
        let task =
            task(&["segmentation.crop=16", "segmentation.stride=10", "segmentation.classes=2", "model.image_size=16"]);
        let image = (Tensor::arange(20 * 37, (Kind::Float, Device::Cpu)) + 1.0).view([1, 1, 20, 37]);
        // Logits that depend on the pixel's value alone are the same in every window.
        let logits = |window: &Tensor| Ok(Tensor::cat(&[window * 2.0, -window], 1));
        let whole = logits(&image).unwrap();
        assert!((sliding(task, &image, &logits).unwrap() - &whole).abs().max().double_value(&[]) < 1e-3);
        let largest = largest(&whole, [20, 37]);
        assert_eq!(largest.sum(Kind::Int64).int64_value(&[]), 0);
    }
}
