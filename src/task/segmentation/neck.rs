//! The necks between the stages and the heads, as in mmsegmentation 1.2.2. The sides of the maps that they give are 4, 2, 1 and ½
//! times those of the stages' maps.

use super::heads::Heads;
use crate::config::Neck;
use crate::plan::segmentation::FACTORS;
use anyhow::Result;
use tch::Tensor;

impl Heads<'_> {
    /// The maps (b, d, row, column) that the heads read, the finest first. `maps` are the maps of the tapped stages.
    pub fn neck(&self, maps: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let maps = match self.task.architecture.neck {
            Neck::None => return Ok(maps),
            Neck::Mln => maps.iter().enumerate().map(|(level, map)| self.level(level, map)).collect(),
            Neck::Pyramid => self.pyramid(&maps)?,
        };
        // Several layers read each map. Because of the cut, the backward pass goes through the neck only once, after the
        // gradients of all these layers are summed.
        let cuts = self.training.as_ref().and_then(|training| training.cuts.as_ref());
        Ok(cuts.map_or_else(|| maps.iter().map(Tensor::shallow_clone).collect(), |cuts| cuts.cut(&maps)))
    }

    /// A level of `MultiLevelNeck`: a convolution, an interpolation to another size, and another convolution.
    fn level(&self, level: usize, map: &Tensor) -> Tensor {
        let lateral = self.convolution(&format!("neck.lateral_convs.{level}.conv"), map);
        let factor = FACTORS[level];
        let resized = match factor {
            1.0 => lateral,
            _ => {
                let to = [2, 3].map(|side| (lateral.size()[side] as f64 * factor) as i64);
                lateral.upsample_bilinear2d(to, false, Some(factor), Some(factor))
            }
        };
        self.convolution(&format!("neck.convs.{level}.conv"), &resized)
    }

    /// `Feature2Pyramid`: transposed convolutions for the two finest maps, and max pooling for the coarsest.
    fn pyramid(&self, maps: &[Tensor]) -> Result<Vec<Tensor>> {
        let doubled = self.doubled("neck.upsample_4x.0", &maps[0]);
        let normed = self.norm("neck.upsample_4x.1", &doubled)?.gelu("none");
        Ok(vec![
            self.doubled("neck.upsample_4x.3", &normed),
            self.doubled("neck.upsample_2x.0", &maps[1]),
            maps[2].shallow_clone(),
            maps[3].max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false),
        ])
    }

    /// A transposed convolution that doubles the number of rows and columns.
    fn doubled(&self, name: &str, map: &Tensor) -> Tensor {
        let [weight, bias] = self.weight_and_bias(name);
        map.conv_transpose2d(weight, Some(bias), [2, 2], [0, 0], [0, 0], 1, [1, 1])
    }
}
