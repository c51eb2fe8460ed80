//! The neck and the heads of a segmentation network as data: layers with their parameters, operations and memory. The names of the
//! parameters are those of mmsegmentation 1.2.2. `task/segmentation` runs the layers. The neck turns the outputs of four stages
//! into maps of the sizes that the heads expect.

use crate::config::{Config, Neck, TAPS, TaskKind};
use crate::family::parameter::{Initial, Parameter, Role};

/// The sides of the square maps to which the pyramid pooling module averages the coarsest map.
pub const POOLED: [usize; 4] = [1, 2, 3, 6];
/// The factors by which a neck changes the sides of the maps, the finest map first.
pub const FACTORS: [f64; TAPS] = [4.0, 2.0, 1.0, 0.5];
/// PyTorch's default momentum of BatchNorm.
const BATCH_NORM_MOMENTUM: f64 = 0.1;

/// All sizes on which the layers depend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Architecture {
    pub classes: usize,
    pub neck: Neck,
    /// The width of the tokens. It is the number of channels of the maps that the network gives.
    pub channels: usize,
    /// The channels of UPerNet, the main head.
    pub width: usize,
    /// The channels of the FCN, the auxiliary head.
    pub auxiliary_width: usize,
    pub has_auxiliary: bool,
    /// The side of the square grid of tokens of a training crop.
    pub grid: usize,
    /// The side of a square training crop, in pixels.
    pub crop: usize,
}

/// A layer with parameters.
#[derive(Debug, Clone)]
pub struct Layer {
    pub name: String,
    pub form: Form,
    pub input: usize,
    pub output: usize,
    pub kernel: usize,
    /// The number of rows, and of columns, of the output for a training crop.
    pub side: usize,
}

/// The kind of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A convolution without bias, followed by BatchNorm and ReLU.
    Unit,
    /// A convolution with a bias.
    Convolution,
    /// A transposed convolution of 2×2 with stride 2 and a bias, which doubles rows and columns.
    Doubling,
    /// BatchNorm alone.
    Norm,
    /// A convolution that gives a logit for each class.
    Classifier,
}

impl Architecture {
    /// The sizes that the config gives; none if the config's task is not segmentation.
    pub fn of(config: &Config) -> Option<Architecture> {
        let (keys, tokens) = (&config.segmentation, config.model.tokens_given()?);
        (config.task == TaskKind::Segmentation).then(|| Architecture {
            classes: keys.classes,
            neck: keys.neck,
            channels: tokens.width,
            width: keys.width,
            auxiliary_width: keys.auxiliary_width,
            has_auxiliary: keys.auxiliary_weight > 0.0,
            grid: keys.crop / tokens.patch,
            crop: keys.crop,
        })
    }

    /// The level whose map the FCN reads, counted from 0 for the finest. As in mmsegmentation's configs, it is 2 for a pyramid
    /// (MAE, BEiT) and 3 for other necks (ViT, DeiT).
    pub fn auxiliary_level(self) -> usize {
        if self.neck == Neck::Pyramid { 2 } else { TAPS - 1 }
    }

    /// The number of rows, and of columns, of each level's map for a training crop.
    fn sides(self) -> [usize; TAPS] {
        match self.neck {
            Neck::None => [self.grid; TAPS],
            Neck::Mln | Neck::Pyramid => FACTORS.map(|factor| (self.grid as f64 * factor) as usize),
        }
    }

    /// All layers of the neck and the heads.
    pub fn layers(self) -> Vec<Layer> {
        let Architecture { channels, width, auxiliary_width, classes, .. } = self;
        let sides = self.sides();
        let (finest, coarsest) = (sides[0], sides[TAPS - 1]);
        let mut all = self.neck_layers();
        let mut unit = |name: String, input, output, kernel, side| {
            all.push(Layer { name, form: Form::Unit, input, output, kernel, side });
        };
        for (i, size) in POOLED.into_iter().enumerate() {
            unit(format!("decode_head.psp_modules.{i}.1"), channels, width, 1, size);
        }
        unit("decode_head.bottleneck".into(), channels + POOLED.len() * width, width, 3, coarsest);
        for (i, side) in sides.into_iter().enumerate().take(TAPS - 1) {
            unit(format!("decode_head.lateral_convs.{i}"), channels, width, 1, side);
        }
        for (i, side) in sides.into_iter().enumerate().take(TAPS - 1) {
            unit(format!("decode_head.fpn_convs.{i}"), width, width, 3, side);
        }
        unit("decode_head.fpn_bottleneck".into(), TAPS * width, width, 3, finest);
        let of_auxiliary = sides[self.auxiliary_level()];
        if self.has_auxiliary {
            unit("auxiliary_head.convs.0".into(), channels, auxiliary_width, 3, of_auxiliary);
        }
        let heads = [("decode_head", width, finest), ("auxiliary_head", auxiliary_width, of_auxiliary)];
        let heads = heads.into_iter().take(1 + usize::from(self.has_auxiliary));
        all.extend(heads.map(|(head, input, side)| Layer {
            name: format!("{head}.conv_seg"),
            form: Form::Classifier,
            input,
            output: classes,
            kernel: 1,
            side,
        }));
        all
    }

    fn neck_layers(self) -> Vec<Layer> {
        let (d, grid) = (self.channels, self.grid);
        let layer = |name: String, form, kernel, side| Layer { name, form, input: d, output: d, kernel, side };
        match self.neck {
            Neck::None => Vec::new(),
            Neck::Mln => {
                let lateral = |i| layer(format!("neck.lateral_convs.{i}.conv"), Form::Convolution, 1, grid);
                let resized = |(i, side)| layer(format!("neck.convs.{i}.conv"), Form::Convolution, 3, side);
                (0..TAPS).map(lateral).chain(self.sides().into_iter().enumerate().map(resized)).collect()
            }
            Neck::Pyramid => vec![
                layer("neck.upsample_4x.0".into(), Form::Doubling, 2, 2 * grid),
                layer("neck.upsample_4x.1".into(), Form::Norm, 1, 2 * grid),
                layer("neck.upsample_4x.3".into(), Form::Doubling, 2, 4 * grid),
                layer("neck.upsample_2x.0".into(), Form::Doubling, 2, 2 * grid),
            ],
        }
    }

    /// All parameters and buffers, with mmsegmentation's initial values. Their stage is `stage`, which follows the network's
    /// stages.
    pub fn parameters(self, stage: usize) -> Vec<Parameter> {
        self.layers().into_iter().flat_map(|layer| layer.parameters(stage)).collect()
    }

    /// The number of values that all parameters hold, without the buffers.
    pub fn count(self) -> usize {
        self.parameters(0).iter().filter(|parameter| parameter.is_trainable()).map(Parameter::count).sum()
    }

    /// The operations of a forward pass on one training crop. A multiply-add counts as two.
    pub fn flops(self) -> f64 {
        self.layers().iter().map(Layer::flops).sum()
    }

    /// The numbers that training on one crop keeps in memory: the input and the output of each layer and, for a convolution with
    /// BatchNorm, also the outputs of the norm and of the ReLU. The cross entropy keeps three numbers for each pixel and class.
    pub fn activations(self) -> f64 {
        let of = |layer: &Layer| {
            let plane = layer.side.pow(2) as f64;
            let inputs = if layer.form == Form::Doubling { plane / 4.0 } else { plane };
            let outputs = if layer.form == Form::Unit { 3.0 } else { 1.0 };
            inputs * layer.input as f64 + outputs * plane * layer.output as f64
        };
        let logits = 3.0 * (self.classes * self.crop.pow(2)) as f64;
        self.layers().iter().map(of).sum::<f64>() + logits
    }
}

impl Layer {
    fn parameters(self, stage: usize) -> Vec<Parameter> {
        let Layer { name, form, input, output, kernel, .. } = self;
        let parameter = |name: String, shape: &[usize], start: Initial, role: Role| {
            let shape = shape.iter().map(|&n| n as i64).collect();
            Parameter { stage, name, shape, start, role }
        };
        let both = |shape: &[usize], weight: Initial, bias: Initial| {
            let weight = parameter(format!("{name}.weight"), shape, weight, Role::Decayed);
            vec![weight, parameter(format!("{name}.bias"), &[output], bias, Role::Plain)]
        };
        let norm = |name: &str| {
            let buffer = Role::Buffer { momentum: BATCH_NORM_MOMENTUM };
            let of = |part: &str, start, role| parameter(format!("{name}.{part}"), &[output], start, role);
            vec![
                of("weight", Initial::Ones, Role::Plain),
                of("bias", Initial::Zeros, Role::Plain),
                of("running_mean", Initial::Zeros, buffer),
                of("running_var", Initial::Ones, buffer),
            ]
        };
        let shape = [output, input, kernel, kernel];
        match form {
            Form::Unit => {
                let start = Initial::FanOut { fan_out: output * kernel * kernel };
                let weight = parameter(format!("{name}.conv.weight"), &shape, start, Role::Decayed);
                std::iter::once(weight).chain(norm(&format!("{name}.bn"))).collect()
            }
            // Xavier's uniform initialisation.
            Form::Convolution => {
                let bound = (6.0 / ((input + output) * kernel * kernel) as f64).sqrt();
                both(&shape, Initial::Uniform { bound }, Initial::Zeros)
            }
            // torch's default. For the fan-in of a transposed convolution, torch uses the second dimension of the kernel, which is
            // the number of outputs.
            Form::Doubling => {
                let start = Initial::FanIn { fan_in: output * kernel * kernel };
                both(&[input, output, kernel, kernel], start, start)
            }
            Form::Norm => norm(&name),
            Form::Classifier => both(&shape, Initial::Deviation { deviation: 0.01 }, Initial::Zeros),
        }
    }

    fn flops(&self) -> f64 {
        let per_output = match self.form {
            Form::Unit | Form::Convolution | Form::Classifier => self.input * self.kernel * self.kernel,
            // Each output cell depends on one cell of the input.
            Form::Doubling => self.input,
            Form::Norm => 1,
        };
        2.0 * (per_output * self.output * self.side.pow(2)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn architecture(sets: &[&str]) -> Architecture {
        let shapes = ["segmentation.format=shapes", "segmentation.train_images=2", "segmentation.test_images=2"];
        let sets: Vec<String> = shapes.iter().chain(sets).map(|set| set.to_string()).collect();
        Architecture::of(&Config::parse("", &sets).unwrap().of_task(TaskKind::Segmentation)).unwrap()
    }

    #[test]
    fn necks_and_heads_have_the_parameters_of_mmsegmentations() {
        let count = |sets: &[&str], part: &str| -> usize {
            let all = architecture(sets).parameters(4);
            all.iter().filter(|p| p.is_trainable() && p.name.starts_with(part)).map(Parameter::count).sum()
        };
        let [base, large, huge] = [
            ["model.width=768", "model.heads=12"],
            ["model.width=1024", "model.heads=16"],
            ["model.width=1280", "model.heads=16"],
        ];
        for (size, uper, wide, fcn, mln, pyramid) in [
            (base, 32_332_950, 67_963_542, 1_808_534, 23_599_104, 7_081_728),
            (large, 34_430_102, 120_764_566, 2_398_358, 41_951_232, 12_588_032),
            (huge, 36_527_254, 188_638_870, 2_988_182, 65_546_240, 19_667_200),
        ] {
            let with = |set: String, part| count(&[size[0], size[1], &set], part);
            assert_eq!(count(&size, "neck"), 0);
            assert_eq!([count(&size, "decode_head"), count(&size, "auxiliary_head")], [uper, fcn]);
            assert_eq!(with(size[0].replace("model", "segmentation"), "decode_head"), wide);
            assert_eq!(with("segmentation.neck=mln".into(), "neck"), mln);
            assert_eq!(with("segmentation.neck=pyramid".into(), "neck"), pyramid);
        }
        assert_eq!(count(&["segmentation.auxiliary_weight=0.0"], "auxiliary_head"), 0);
    }

    #[test]
    fn a_crop_of_512_pixels_costs_the_known_operations() {
        // Multiply-adds of mmsegmentation's ViT-B config, by hand: MLN 0.118 T, UPerNet 0.218 T, and the FCN on 16×16.
        let with_neck = architecture(&["segmentation.neck=mln", "segmentation.auxiliary_weight=0.0"]).flops() / 2e12;
        assert!((with_neck - 0.118 - 0.218).abs() < 0.002, "{with_neck}");
        let neck: f64 = architecture(&["segmentation.neck=mln"]).neck_layers().iter().map(Layer::flops).sum();
        assert!((neck / 2e12 - 0.118).abs() < 0.001, "{neck}");
    }
}
