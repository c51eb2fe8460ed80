//! Proposals: the anchors that most likely contain an object, moved by their deltas, as in detectron2's `find_top_rpn_proposals`.
//! The device finds the highest logits. The host moves the anchors and suppresses overlapping proposals.

use super::anchors::Anchors;
use super::boxes::{Corners, OF_ANCHORS, clipped, decode, is_empty};
use super::heads::Anchored;
use super::nms::grouped_nms;
use crate::plan::detection::LEVELS;
use crate::weights::floats;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

/// Of two proposals of one level whose overlap (IoU) is above this value, the less likely one is removed.
const MOST_OVERLAP: f64 = 0.7;

/// The largest numbers of proposals of an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The largest number of proposals in each level, before overlaps are suppressed.
    pub of_level: usize,
    /// The largest number of proposals in all levels together, after overlaps are suppressed.
    pub all: usize,
}

/// How many numbers describe a proposal in the tensor that is copied to the host: its logit, four deltas, and the number of its
/// anchor.
const NUMBERS: usize = 6;

/// The proposals of each image, the most likely first. `sizes` are the heights and widths of the images in pixels.
pub fn proposals(anchored: &Anchored, anchors: &Anchors, sizes: &[[usize; 2]], limits: Limits) -> Vec<Vec<Corners>> {
    let (best, counts) = best_of_levels(anchored, anchors.counts, limits.of_level);
    let groups: Vec<usize> = counts.iter().enumerate().flat_map(|(level, &count)| vec![level; count]).collect();
    let numbers = floats(&best);
    let of_image = |(of_image, size): (&[f32], &[usize; 2])| {
        let size = size.map(|length| length as f32);
        let (mut boxes, mut scores, mut levels) = (Vec::new(), Vec::new(), Vec::new());
        for (proposal, &level) in of_image.chunks_exact(NUMBERS).zip(&groups) {
            let corners = decode(&anchors.all[proposal[5] as usize], &proposal[1..5], OF_ANCHORS);
            // A network that diverges gives numbers that are not finite. Such proposals are left out.
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

/// The anchors with the highest logits of each level, as rows of [`NUMBERS`] numbers (b, n, 6) in host memory. Also returns the
/// number of these anchors in each level.
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
    // fp32 holds the numbers of the anchors exactly.
    let parts = [
        logits.gather(1, &best, false).unsqueeze(-1),
        deltas.gather(1, &of_each.expand([b, n, 4], false), false),
        of_each.to_kind(Kind::Float),
    ];
    (Tensor::cat(&parts, 2).to_device(Device::Cpu).contiguous(), counts)
}
