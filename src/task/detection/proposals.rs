//! Proposals: the anchors that most likely hold an object, moved by their deltas. As in detectron2's `find_top_rpn_proposals`. They are
//! selected on the host.

use super::anchors::Anchors;
use super::boxes::{Corners, OF_ANCHORS, clipped, decode, is_empty};
use super::heads::Anchored;
use super::nms::grouped_nms;
use crate::plan::detection::LEVELS;
use crate::weights::floats;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// The overlap up to which two proposals of one level may stay.
const MOST_OVERLAP: f64 = 0.7;

/// How many proposals an image has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Of a level, before suppression.
    pub of_level: usize,
    /// Of all levels, after it.
    pub all: usize,
}

/// The numbers of a proposal in the tensor that travels to the host: its logit, four deltas, and the number of its anchor.
const NUMBERS: usize = 6;

/// The proposals of each image, the most likely first. `sizes` are the heights and widths of the images.
pub fn proposals(anchored: &Anchored, anchors: &Anchors, sizes: &[[usize; 2]], limits: Limits) -> Vec<Vec<Corners>> {
    let (best, counts) = best_of_levels(anchored, anchors.counts, limits.of_level);
    let groups: Vec<usize> = counts.iter().enumerate().flat_map(|(level, &count)| vec![level; count]).collect();
    let numbers = floats(&best);
    let of_image = |(of_image, size): (&[f32], &[usize; 2])| {
        let size = size.map(|length| length as f32);
        let (mut boxes, mut scores, mut levels) = (Vec::new(), Vec::new(), Vec::new());
        for (proposal, &level) in of_image.chunks_exact(NUMBERS).zip(&groups) {
            let corners = decode(&anchors.all[proposal[5] as usize], &proposal[1..5], OF_ANCHORS);
            // A network that diverges gives numbers that are not finite.
            let is_finite = corners.iter().chain(&proposal[..1]).all(|number| number.is_finite());
            let corners = clipped(&corners, size);
            if is_finite && !is_empty(&corners) {
                boxes.push(corners);
                scores.push(proposal[0]);
                levels.push(level);
            }
        }
        let kept = grouped_nms(&boxes, &scores, &levels, MOST_OVERLAP);
        kept.into_iter().take(limits.all).map(|number| boxes[number]).collect()
    };
    numbers.par_chunks(numbers.len() / sizes.len()).zip(sizes).map(of_image).collect()
}

/// The numbers (b, n, 6) of the anchors of each level with the highest logits, in host memory, and how many each level has.
fn best_of_levels(anchored: &Anchored, of_levels: [usize; LEVELS], most: usize) -> (Tensor, [usize; LEVELS]) {
    let (logits, deltas) = (anchored.logits.detach(), anchored.deltas.detach());
    let counts = of_levels.map(|of_level| of_level.min(most));
    let mut start = 0;
    let of_level = |(of_level, count): (usize, usize)| {
        let (_, best) = logits.narrow(1, start, of_level as i64).topk(count as i64, 1, true, true);
        let best = best + start;
        start += of_level as i64;
        best
    };
    let best = Tensor::cat(&of_levels.into_iter().zip(counts).map(of_level).collect::<Vec<_>>(), 1);
    let (b, n) = best.size2().expect("a row for each image");
    let of_each = best.unsqueeze(-1);
    // fp32 holds these numbers of anchors exactly.
    let parts = [
        logits.gather(1, &best, false).unsqueeze(-1),
        deltas.gather(1, &of_each.expand([b, n, 4], false), false),
        of_each.to_kind(Kind::Float),
    ];
    (Tensor::cat(&parts, 2).to_device(Device::Cpu).contiguous(), counts)
}
