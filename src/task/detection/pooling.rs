//! Pools regions from the maps of the pyramid: on a CPU by [`regions`](super::regions), on a GPU by libtorch's `grid_sampler`,
//! which autograd differentiates.

use super::anchors::stride;
use super::regions::{Map, Pooling, Region, Samples};
use crate::plan::detection::POOLED_LEVELS;
use crate::weights::{floats, floats_mut, upload};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The most numbers that one call of `grid_sampler` returns, if a single region does not need more: 512 MiB in fp32.
const MOST_SAMPLES: usize = 1 << 27;

/// Pooled regions (r, c, bins, bins) in fp32.
pub struct Pooled {
    /// On a CPU, a leaf of autograd's graph. On a GPU, its graph leads to the maps.
    pub features: Tensor,
    /// The pooling that [`Pooled::add_gradients`] differentiates; none on a GPU.
    on_host: Option<Pooling>,
}

/// Pools regions from the first [`POOLED_LEVELS`] of the maps (b, c, row, column) to `bins` rows and columns. The finest map comes
/// first.
pub fn pool(maps: &[Tensor], regions: &[Region], bins: usize, patch: usize) -> Pooled {
    let maps = &maps[..POOLED_LEVELS];
    if maps[0].device() != Device::Cpu {
        return Pooled { features: sampled(maps, regions, bins, patch), on_host: None };
    }
    let sides: Vec<(usize, f32)> =
        maps.iter().enumerate().map(|(level, map)| side_and_scale(map, level, patch)).collect();
    let pooling = Pooling::new(regions, &sides, bins, patch);
    let maps_bhwc: Vec<Tensor> = maps.iter().map(|map| channels_last(&map.detach())).collect();
    let c = maps[0].size()[1];
    let of_level = |(map, &(side, _))| Map { numbers: floats(map), side, channels: c as usize };
    let of_levels: Vec<Map> = maps_bhwc.iter().zip(&sides).map(of_level).collect();
    let (r, bins) = (regions.len() as i64, bins as i64);
    let mut output = Tensor::empty([r, bins, bins, c], (Kind::Float, Device::Cpu));
    pooling.forward(&of_levels, floats_mut(&mut output));
    Pooled { features: output.permute([0, 3, 1, 2]).set_requires_grad(true), on_host: Some(pooling) }
}

impl Pooled {
    /// Adds the gradients that reach the maps through these regions to `gradients` (b, c, row, column). On a GPU it does nothing,
    /// because autograd has added them.
    pub fn add_gradients(&self, gradients: &mut [Tensor]) {
        let gradient = self.features.grad();
        let Some(pooling) = self.on_host.as_ref().filter(|_| gradient.defined()) else { return };
        let gradient = channels_last(&gradient);
        for (level, sum) in gradients.iter_mut().enumerate().take(POOLED_LEVELS) {
            let mut sum_bhwc = channels_last(sum).copy();
            let (side, channels) = (sum.size()[2] as usize, sum.size()[1] as usize);
            pooling.backward(level, floats(&gradient), (side, channels), floats_mut(&mut sum_bhwc));
            *sum = sum_bhwc.permute([0, 3, 1, 2]).to_kind(sum.kind());
        }
    }
}

/// The tensor (b, c, row, column) as (b, row, column, c) in fp32.
fn channels_last(bchw: &Tensor) -> Tensor {
    bchw.permute([0, 2, 3, 1]).to_kind(Kind::Float).contiguous()
}

/// The side of the square map of a level, in cells, and the number of cells per pixel along a side.
fn side_and_scale(map: &Tensor, level: usize, patch: usize) -> (usize, f32) {
    (map.size()[2] as usize, (1.0 / stride(patch, level)) as f32)
}

/// The level, the image and the numbers of samples per bin (rows, columns) of a region. Regions for which all these numbers are the
/// same are sampled together.
type Bucket = (usize, usize, [usize; 2]);

/// The pooled regions (r, c, bins, bins), computed by `grid_sampler`. Autograd's graph leads from them to the maps.
fn sampled(maps: &[Tensor], regions: &[Region], bins: usize, patch: usize) -> Tensor {
    let mut buckets: BTreeMap<Bucket, Vec<usize>> = BTreeMap::new();
    for (number, region) in regions.iter().enumerate() {
        let level = region.level(patch);
        let per_bin = axes(region, side_and_scale(&maps[level], level, patch).1, bins).map(|axis| axis.per_bin);
        buckets.entry((level, region.image, per_bin)).or_default().push(number);
    }
    let (c, device) = (maps[0].size()[1], maps[0].device());
    let mut parts = vec![Tensor::zeros([0, c, bins as i64, bins as i64], (Kind::Float, device))];
    let mut order: Vec<usize> = Vec::with_capacity(regions.len());
    for ((level, image, per_bin), numbers) in buckets {
        let map = maps[level].narrow(0, image as i64, 1).to_kind(Kind::Float);
        let scale = side_and_scale(&maps[level], level, patch).1;
        let each = c as usize * bins * bins * (per_bin[0] * per_bin[1]).max(1);
        for some in numbers.chunks((MOST_SAMPLES / each).max(1)) {
            let some_regions: Vec<&Region> = some.iter().map(|&number| &regions[number]).collect();
            parts.push(sample(&map, &some_regions, (scale, bins), per_bin));
        }
        order.extend(numbers);
    }
    let mut places = vec![0i64; order.len()];
    order.into_iter().zip(0..).for_each(|(number, place)| places[number] = place);
    Tensor::cat(&parts, 0).index_select(0, &upload(&Tensor::from_slice(&places), device))
}

/// The samples of a region along the rows and along the columns of a map.
fn axes(region: &Region, scale: f32, bins: usize) -> [Samples; 2] {
    let [left, top, right, bottom] = region.corners;
    [Samples::new([top, bottom], scale, bins), Samples::new([left, right], scale, bins)]
}

/// The pooled regions (r, c, bins, bins) of a map (1, c, row, column). All these regions have `per_bin` samples in a bin.
fn sample(map: &Tensor, regions: &[&Region], (scale, bins): (f32, usize), per_bin: [usize; 2]) -> Tensor {
    let (r, c, side) = (regions.len() as i64, map.size()[1], map.size()[2] as usize);
    let bins_of = bins as i64;
    if per_bin.contains(&0) {
        return Tensor::zeros([r, c, bins_of, bins_of], (Kind::Float, map.device()));
    }
    // For each axis, compute the positions of the samples, where the map reaches from −1 to 1. Also compute the weights of the
    // samples, which are 0 outside of the map.
    let [(ys, of_rows), (xs, of_columns)] = [0, 1].map(|axis| {
        let (mut places, mut weights) = (Vec::new(), Vec::new());
        for region in regions {
            let samples = &axes(region, scale, bins)[axis];
            for (bin, number) in (0..bins).flat_map(|bin| (0..samples.per_bin).map(move |number| (bin, number))) {
                let place = samples.place(bin, number, side);
                places.push(place.map_or(0.0, |place| (2.0 * place + 1.0) / side as f32 - 1.0));
                weights.push(place.map_or(0.0, |_| 1.0 / samples.per_bin as f32));
            }
        }
        let tensor = |numbers: &[f32]| upload(&Tensor::from_slice(numbers), map.device());
        (tensor(&places), tensor(&weights))
    });
    let [gy, gx] = per_bin.map(|count| count as i64);
    let (rows, columns) = (r * bins_of * gy, bins_of * gx);
    let ys = ys.view([rows, 1]).expand([rows, columns], false);
    let xs = xs.view([r, 1, columns]).expand([r, bins_of * gy, columns], false).reshape([rows, columns]);
    let grid = Tensor::stack(&[xs, ys], -1).unsqueeze(0);
    let (bilinear, border) = (0, 1);
    let samples = map.grid_sampler(&grid, bilinear, border, false).view([c, r, bins_of, gy, bins_of, gx]);
    let weighted = samples * of_rows.view([1, r, bins_of, gy, 1, 1]) * of_columns.view([1, r, 1, 1, bins_of, gx]);
    weighted.sum_dim_intlist([3i64, 5].as_slice(), false, Kind::Float).permute([1, 0, 2, 3])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, corners, golden};
    use super::*;

    #[test]
    fn pooled_regions_and_their_gradients_are_torchvisions() {
        let golden = golden();
        let maps: Vec<Tensor> = (0..POOLED_LEVELS).map(|level| golden[&format!("pool.map.{level}")].copy()).collect();
        let images = Vec::<i64>::try_from(&golden["pool.images"]).unwrap();
        let of = |(corners, image): (_, &i64)| Region { image: *image as usize, corners };
        let regions: Vec<Region> = corners(&golden["pool.boxes"]).into_iter().zip(&images).map(of).collect();
        let levels: Vec<i64> = regions.iter().map(|region| region.level(16) as i64).collect();
        assert_eq!(levels, Vec::<i64>::try_from(&golden["pool.levels"]).unwrap());
        assert!((0..POOLED_LEVELS as i64).all(|level| levels.contains(&level)), "{levels:?}");
        let check = |what: &str, ours: &Tensor, name: &str, error: f64| {
            let numbers = Vec::<f32>::try_from(ours.contiguous().flatten(0, -1)).unwrap();
            assert_close(&format!("{what} {name}"), &numbers, &golden[name], error);
        };
        for bins in [7, 14] {
            let factors = &golden[&format!("pool.factors.{bins}")];
            let pooled = pool(&maps, &regions, bins, 16);
            check("host", &pooled.features, &format!("pool.features.{bins}"), 1e-5);
            (&pooled.features * factors).sum(Kind::Float).backward();
            let mut gradients: Vec<Tensor> = maps.iter().map(Tensor::zeros_like).collect();
            pooled.add_gradients(&mut gradients);
            let leaves: Vec<Tensor> = maps.iter().map(|map| map.copy().set_requires_grad(true)).collect();
            let features = sampled(&leaves, &regions, bins, 16);
            check("grid", &features, &format!("pool.features.{bins}"), 1e-5);
            (&features * factors).sum(Kind::Float).backward();
            for (level, (gradient, leaf)) in gradients.iter().zip(&leaves).enumerate() {
                let name = format!("pool.gradient.{bins}.{level}");
                check("host", gradient, &name, 1e-4);
                check("grid", &leaf.grad(), &name, 1e-4);
            }
        }
        let nothing = [pool(&maps, &[], 7, 16).features, sampled(&maps, &[], 7, 16)];
        assert!(nothing.iter().all(|features| features.size() == [0, maps[0].size()[1], 7, 7]));
    }
}
