//! The losses of Mask R-CNN. The RPN (region proposal network) has a cross entropy and a box loss. The regions have a class loss,
//! a box loss and a mask loss. The total loss is the plain sum of these five losses, as in detectron2.
//!
//! Each loss is normalised within its micro-batch. The loss of the global batch is the mean over the micro-batches, weighted by
//! their numbers of images. So a micro-batch corresponds to the batch of one GPU in detectron2.

use super::boxes::{Corners, OF_ANCHORS, OF_REGIONS, encode};
use super::heads::{Anchored, Heads};
use super::matching::{self, Label, Sample};
use super::pooling::{Pooled, pool};
use super::proposals::proposals;
use super::regions::Region;
use super::{Detection, Loss, Part};
use crate::coco::objects::{Outline, Scene};
use crate::coco::outlines::rasterised;
use crate::libtorch;
use crate::model::Network;
use crate::plan::detection::{BOX_SIDE, MASK_OUTPUT, MASK_SIDE};
use crate::random::Random;
use crate::weights::upload;
use anyhow::Result;
use rayon::prelude::*;
use tch::{Device, Kind, Reduction, Tensor};

/// The number in a random key that marks the draw of the anchors that train.
const DRAWN_ANCHORS: u64 = 8;
/// The number in a random key that marks the draw of the regions that train.
const DRAWN_REGIONS: u64 = 9;

/// The objects of an image, in the form that the losses need.
struct Targets {
    /// The height and width of the part of the crop that the image fills.
    size: [usize; 2],
    boxes: Vec<Corners>,
    classes: Vec<usize>,
    outlines: Vec<Outline>,
}

/// A region that trains, with the object that it must find.
struct Trained {
    region: Region,
    /// The number of the object within its image; none if the region belongs to the background.
    object: Option<usize>,
}

pub fn loss(task: Detection, network: &Network, outputs: &[Tensor], rows: &Tensor, part: &Part) -> Result<Loss> {
    let (losses, gradient) = losses(task, network, &outputs[0], rows, part)?;
    let share = rows.size()[0] as f64 / part.global_batch;
    let sum = losses.iter().fold(Tensor::zeros([], (Kind::Float, rows.device())), |sum, loss| sum + loss) * share;
    Ok(Loss { sum, gradients: vec![gradient] })
}

/// The losses of a micro-batch, and the gradient of their sum at the tap (b, 1 + n, d). The gradient, but not the losses, is
/// multiplied by the micro-batch's share of the global batch. Adds the gradients of the pyramid's and the heads' parameters to
/// their sums in the flat buffer.
pub(super) fn losses(
    task: Detection,
    network: &Network,
    tokens: &Tensor,
    rows: &Tensor,
    part: &Part,
) -> Result<(Vec<Tensor>, Tensor)> {
    let targets = targets(rows)?;
    let heads = Heads::new(task.architecture, network, true);
    let tap = tokens.detach().set_requires_grad(true);
    let pyramid = tch::with_grad(|| heads.pyramid(&task.map(&tap)));
    // The maps are detached from the graph here, because on a CPU the gradients of pooled regions reach the maps without autograd.
    let maps: Vec<Tensor> = pyramid.iter().map(|map| map.detach().set_requires_grad(true)).collect();
    let anchored = tch::with_grad(|| heads.anchored(&maps));
    let anchors = task.anchors();
    let mut losses = Vec::from(tch::with_grad(|| anchor_losses(task, &anchored, &anchors.all, &targets, part)));
    let sizes: Vec<[usize; 2]> = targets.iter().map(|target| target.size).collect();
    let trained = regions(task, proposals(&anchored, &anchors, &sizes, task.limits), &targets, part);
    let mut pooled = Vec::new();
    tch::with_grad(|| {
        if !trained.is_empty() {
            let of_all: Vec<Region> = trained.iter().map(|trained| trained.region).collect();
            let regions = pool(&maps, &of_all, BOX_SIDE, task.patch);
            losses.extend(region_losses(&heads, &regions, &trained, &targets));
            pooled.push(regions);
        }
        let with_object: Vec<&Trained> = trained.iter().filter(|trained| trained.object.is_some()).collect();
        if task.architecture.masks && !with_object.is_empty() {
            let of_all: Vec<Region> = with_object.iter().map(|trained| trained.region).collect();
            let regions = pool(&maps, &of_all, MASK_SIDE, task.patch);
            losses.push(mask_loss(&heads, &regions, &with_object, &targets));
            pooled.push(regions);
        }
    });
    let share = rows.size()[0] as f64 / part.global_batch;
    let total = tch::with_grad(|| Tensor::stack(&losses, 0).sum(Kind::Float) * share);
    total.backward();
    let mut gradients: Vec<Tensor> = maps.iter().map(Tensor::grad).collect();
    pooled.iter().for_each(|pooled| pooled.add_gradients(&mut gradients));
    pyramid.iter().zip(&gradients).for_each(|(map, gradient)| libtorch::backward(map, gradient));
    heads.add_gradients();
    Ok((losses.iter().map(Tensor::detach).collect(), tap.grad()))
}

fn targets(rows: &Tensor) -> Result<Vec<Targets>> {
    let rows = rows.to_device(Device::Cpu);
    let of_row = |row: i64| {
        let (scene, _) = Scene::from_row(&Vec::<f64>::try_from(rows.get(row))?)?;
        let Scene { size, objects, .. } = scene;
        let corners = |[x, y, width, height]: [f64; 4]| [x, y, x + width, y + height].map(|length| length as f32);
        Ok(Targets {
            size,
            boxes: objects.iter().map(|object| corners(object.bbox)).collect(),
            classes: objects.iter().map(|object| object.class).collect(),
            outlines: objects.into_iter().map(|object| object.outline).collect(),
        })
    };
    (0..rows.size()[0]).map(of_row).collect()
}

/// The cross entropy of the RPN, summed over the drawn anchors, and its box loss (L1), summed over the drawn anchors that contain
/// an object. Both sums are divided by the largest number of anchors that can be drawn from the micro-batch.
fn anchor_losses(
    task: Detection,
    anchored: &Anchored,
    anchors: &[Corners],
    targets: &[Targets],
    part: &Part,
) -> [Tensor; 2] {
    let (mut drawn, mut is_object, mut with_object, mut deltas) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (image, target) in targets.iter().enumerate() {
        let labels = matching::OF_ANCHORS.labels(anchors, &target.boxes);
        let position = (part.positions.start + image) as u64;
        let mut random = Random::new(&[part.seed, DRAWN_ANCHORS, part.step, position]);
        let Sample { positive, negative } = task.drawn_anchors.draw(&labels, &mut random);
        let place = |number: usize| (image * anchors.len() + number) as i64;
        drawn.extend(positive.iter().chain(&negative).map(|&number| place(number)));
        is_object.extend(std::iter::repeat_n(1.0f32, positive.len()));
        is_object.extend(std::iter::repeat_n(0.0f32, negative.len()));
        for number in positive {
            if let Label::Positive(object) = labels[number] {
                with_object.push(place(number));
                deltas.extend(encode(&anchors[number], &target.boxes[object], OF_ANCHORS));
            }
        }
    }
    let device = anchored.logits.device();
    let places = (task.drawn_anchors.all * targets.len()) as f64;
    let logits = anchored.logits.flatten(0, -1).index_select(0, &on_device(&drawn, device));
    let expected = upload(&Tensor::from_slice(&is_object), device);
    let entropy = logits.binary_cross_entropy_with_logits::<Tensor>(&expected, None, None, Reduction::Sum);
    let found = anchored.deltas.view([-1, 4]).index_select(0, &on_device(&with_object, device));
    let expected = upload(&Tensor::from_slice(&deltas).view([-1, 4]), device);
    [entropy / places, found.l1_loss(&expected, Reduction::Sum) / places]
}

fn on_device(numbers: &[i64], device: Device) -> Tensor {
    upload(&Tensor::from_slice(numbers), device)
}

/// Draws the regions that train, from the proposals and the objects' own boxes.
fn regions(task: Detection, proposals: Vec<Vec<Corners>>, targets: &[Targets], part: &Part) -> Vec<Trained> {
    let of_image = |(image, (mut boxes, target)): (usize, (Vec<Corners>, &Targets))| {
        boxes.extend(&target.boxes);
        let labels = matching::OF_PROPOSALS.labels(&boxes, &target.boxes);
        let position = (part.positions.start + image) as u64;
        let mut random = Random::new(&[part.seed, DRAWN_REGIONS, part.step, position]);
        let Sample { positive, negative } = task.drawn_regions.draw(&labels, &mut random);
        let trained = |number: usize| {
            let object = if let Label::Positive(object) = labels[number] { Some(object) } else { None };
            Trained { region: Region { image, corners: boxes[number] }, object }
        };
        positive.into_iter().chain(negative).map(trained).collect::<Vec<_>>()
    };
    proposals.into_iter().zip(targets).enumerate().flat_map(of_image).collect()
}

/// The cross entropy of the classes and the box loss (L1). The cross entropy is a mean over all regions. The box loss is a sum
/// over the regions with an object, divided by the number of all regions.
fn region_losses(heads: &Heads, pooled: &Pooled, trained: &[Trained], targets: &[Targets]) -> [Tensor; 2] {
    let [logits, deltas] = heads.boxes(&pooled.features);
    let (device, classes) = (logits.device(), deltas.size()[1]);
    let class = |trained: &Trained| match trained.object {
        Some(object) => targets[trained.region.image].classes[object] as i64,
        None => classes,
    };
    let expected: Vec<i64> = trained.iter().map(class).collect();
    let entropy = logits.cross_entropy_loss::<Tensor>(&on_device(&expected, device), None, Reduction::Mean, -100, 0.0);
    let (mut with_object, mut of_objects) = (Vec::new(), Vec::new());
    for (number, Trained { region, object }) in trained.iter().enumerate() {
        if let Some(object) = object {
            with_object.push(number as i64 * classes + expected[number]);
            of_objects.extend(encode(&region.corners, &targets[region.image].boxes[*object], OF_REGIONS));
        }
    }
    let found = deltas.view([-1, 4]).index_select(0, &on_device(&with_object, device));
    let expected = upload(&Tensor::from_slice(&of_objects).view([-1, 4]), device);
    [entropy, found.l1_loss(&expected, Reduction::Sum) / trained.len() as f64]
}

/// The binary cross entropy of the masks of regions with an object: a mean over all pixels of these masks. For each region, only
/// the mask of its object's class counts.
fn mask_loss(heads: &Heads, pooled: &Pooled, trained: &[&Trained], targets: &[Targets]) -> Tensor {
    let object = |trained: &Trained| trained.object.expect("the region has an object");
    let classes: Vec<i64> =
        trained.iter().map(|trained| targets[trained.region.image].classes[object(trained)] as i64).collect();
    let logits = heads.masks(&pooled.features, &on_device(&classes, pooled.features.device()));
    let mask = |trained: &&Trained| {
        let outline = &targets[trained.region.image].outlines[object(trained)];
        rasterised(outline, trained.region.corners, MASK_OUTPUT)
    };
    let pixels: Vec<u8> = trained.par_iter().flat_map_iter(mask).collect();
    let expected = Tensor::from_slice(&pixels).view(logits.size().as_slice()).to_kind(Kind::Float);
    let expected = upload(&expected, logits.device());
    logits.binary_cross_entropy_with_logits::<Tensor>(&expected, None, None, Reduction::Mean)
}
