//! The necks between the stages and the heads, as in mmsegmentation 1.2.2. They give maps of four, two, one and half the size.

use super::heads::Heads;
use crate::config::Neck;
use crate::plan::segmentation::FACTORS;
use anyhow::Result;
use tch::Tensor;

impl Heads<'_> {
    /// The maps (b, d, row, column) that the heads read, the finest first, from those of the tapped stages.
    pub fn neck(&self, maps: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let maps = match self.task.architecture.neck {
            Neck::None => return Ok(maps),
            Neck::Mln => maps.iter().enumerate().map(|(level, map)| self.level(level, map)).collect(),
            Neck::Pyramid => self.pyramid(&maps)?,
        };
        // Several layers read each map. A cut differentiates the neck once, after all of them.
        let cuts = self.training.as_ref().and_then(|training| training.cuts.as_ref());
        Ok(cuts.map_or_else(|| maps.iter().map(Tensor::shallow_clone).collect(), |cuts| cuts.cut(&maps)))
    }

    /// A level of `MultiLevelNeck`: a convolution, a change of size, and another convolution.
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

    /// `Feature2Pyramid`: transposed convolutions, and a maximum for the coarsest map.
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

    fn doubled(&self, name: &str, map: &Tensor) -> Tensor {
        let [weight, bias] = self.weight_and_bias(name);
        map.conv_transpose2d(weight, Some(bias), [2, 2], [0, 0], [0, 0], 1, [1, 1])
    }
}
