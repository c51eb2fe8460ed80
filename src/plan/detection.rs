//! The feature pyramid and the heads of a detector as data: layers with their parameters, operations and memory. The names of the
//! parameters and their initial values are those of detectron2's ViTDet (`configs/common/models/mask_rcnn_vitdet.py`).
//! `task/detection` runs the layers.

use crate::config::{Config, TaskKind};
use crate::family::parameter::{Initial, Parameter, Role};

/// The number of levels of the pyramid, p2 … p6. A level is one map. A cell of each level covers twice as many pixels in each
/// direction as a cell of the level before.
pub const LEVELS: usize = 5;
/// The number of levels from which regions are pooled, p2 … p5.
pub const POOLED_LEVELS: usize = 4;
/// The ratios of height to width of the anchors. A cell has one anchor for each ratio.
pub const RATIOS: [f64; 3] = [0.5, 1.0, 2.0];
/// The number of rows, and of columns, to which a region is pooled for the box head.
pub const BOX_SIDE: usize = 7;
/// The number of rows, and of columns, to which a region is pooled for the mask head.
pub const MASK_SIDE: usize = 14;
/// The number of rows, and of columns, of a predicted mask.
pub const MASK_OUTPUT: usize = 2 * MASK_SIDE;
/// The number of convolutions at the start of the box head. The mask head starts with the same number.
pub const CONVOLUTIONS: usize = 4;

/// All sizes on which the layers depend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Architecture {
    pub classes: usize,
    /// The width of the tokens. It is the number of channels of the map that the network gives.
    pub channels: usize,
    /// The channels of the pyramid's maps and of the heads' convolutions.
    pub width: usize,
    /// The width of the box head's hidden layer.
    pub hidden: usize,
    /// The number of regions of an image on which the box head trains.
    pub regions: usize,
    /// The side of the square grid of tokens of a training image.
    pub grid: usize,
    /// The side of a square training image, in pixels.
    pub crop: usize,
    /// Whether there is a mask head.
    pub masks: bool,
}

/// A layer with parameters.
#[derive(Debug, Clone)]
struct Layer {
    name: String,
    form: Form,
    input: usize,
    output: usize,
    kernel: usize,
    /// The number of outputs per channel for a training image: the cells of a map, or the cells of all regions together.
    cells: usize,
    weight: Initial,
    bias: Initial,
}

/// The kind of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A convolution without bias, followed by LayerNorm over the channels.
    Unit,
    /// A convolution with a bias.
    Convolution,
    /// A transposed convolution of 2×2 with stride 2 and a bias, which doubles rows and columns.
    Doubling,
    /// LayerNorm over the channels alone.
    Norm,
    Linear,
}

impl Architecture {
    /// The sizes that the config gives; none if the config's task is not detection.
    pub fn of(config: &Config) -> Option<Architecture> {
        let (keys, tokens) = (&config.detection, config.model.tokens_given()?);
        (config.task == TaskKind::Detection).then(|| Architecture {
            classes: keys.classes,
            channels: tokens.width,
            width: keys.width,
            hidden: keys.hidden,
            regions: keys.regions,
            grid: keys.crop / tokens.patch,
            crop: keys.crop,
            masks: keys.masks,
        })
    }

    /// The largest number of training regions of an image that may contain an object: a quarter of all. The mask head trains on
    /// these regions alone.
    pub fn most_with_object(self) -> usize {
        self.regions / 4
    }

    /// The number of rows, and of columns, of the map of each level.
    pub fn sides(self) -> [usize; LEVELS] {
        let grid = self.grid;
        [4 * grid, 2 * grid, grid, grid / 2, (grid / 2).div_ceil(2)]
    }

    /// All parameters, with detectron2's initial values. Their stage is `stage`, which follows the network's stages. Weight decay
    /// applies to all of them, also to biases and norms: detectron2 exempts a norm only if its class is torch's own, and
    /// detectron2's LayerNorm over channels is not torch's.
    pub fn parameters(self, stage: usize) -> Vec<Parameter> {
        self.layers().into_iter().flat_map(|layer| layer.parameters(stage)).collect()
    }

    /// The number of values that all parameters hold.
    pub fn count(self) -> usize {
        self.parameters(0).iter().map(Parameter::count).sum()
    }

    /// The operations of a forward pass on one training image with all its regions. A multiply-add counts as two.
    pub fn flops(self) -> f64 {
        self.layers().iter().map(Layer::flops).sum()
    }

    /// The numbers that training on one image keeps in memory: the input and the output of each layer and, for a convolution with
    /// LayerNorm, also the outputs of the norm and of the ReLU. The image is assumed to have the largest number of regions, a
    /// quarter of which the mask head sees.
    pub fn activations(self) -> f64 {
        let of = |layer: &Layer| {
            let outputs = if layer.form == Form::Unit { 3 } else { 1 };
            let inputs = if layer.form == Form::Doubling { layer.cells / 4 } else { layer.cells };
            (layer.input * inputs + outputs * layer.output * layer.cells) as f64
        };
        self.layers().iter().map(of).sum()
    }

    fn layers(self) -> Vec<Layer> {
        let masks = if self.masks { self.mask_layers() } else { Vec::new() };
        [self.pyramid_layers(), self.proposal_layers(), self.box_layers(), masks].concat()
    }

    fn pyramid_layers(self) -> Vec<Layer> {
        let (d, width, sides) = (self.channels, self.width, self.sides());
        let doubling = |name: &str, input: usize, output: usize, side: usize| {
            // torch's default. For the fan-in of a transposed convolution, torch uses the second dimension of the kernel, which is
            // the number of outputs.
            let start = Initial::FanIn { fan_in: output * 4 };
            Layer {
                bias: start,
                ..Layer::new(format!("backbone.{name}"), Form::Doubling, [input, output, 2], side.pow(2), start)
            }
        };
        let norm =
            Layer::new("backbone.simfp_2.1".into(), Form::Norm, [d / 2, d / 2, 1], sides[1].pow(2), Initial::Ones);
        let units = |level: usize, first: usize, input: usize| {
            [(first, input, 1), (first + 1, width, 3)].map(|(number, input, kernel)| {
                let name = format!("backbone.simfp_{level}.{number}");
                let start = Initial::FanIn { fan_in: input * kernel * kernel };
                Layer::new(name, Form::Unit, [input, width, kernel], sides[level - 2].pow(2), start)
            })
        };
        let mut all =
            vec![doubling("simfp_2.0", d, d / 2, sides[1]), norm, doubling("simfp_2.3", d / 2, d / 4, sides[0])];
        all.extend(units(2, 4, d / 4));
        all.push(doubling("simfp_3.0", d, d / 2, sides[1]));
        all.extend([units(3, 1, d / 2), units(4, 0, d), units(5, 1, d)].as_flattened().iter().cloned());
        all
    }

    fn proposal_layers(self) -> Vec<Layer> {
        let (width, cells) = (self.width, self.sides().iter().map(|side| side.pow(2)).sum());
        let layer = |name: &str, output, kernel| {
            let name = format!("proposal_generator.rpn_head.{name}");
            Layer::new(name, Form::Convolution, [width, output, kernel], cells, Initial::Deviation { deviation: 0.01 })
        };
        vec![
            layer("conv.conv0", width, 3),
            layer("conv.conv1", width, 3),
            layer("objectness_logits", RATIOS.len(), 1),
            layer("anchor_deltas", 4 * RATIOS.len(), 1),
        ]
    }

    fn box_layers(self) -> Vec<Layer> {
        let (hidden, regions) = (self.hidden, self.regions);
        let mut all = self.convolutions("box_head.conv", regions * BOX_SIDE.pow(2));
        let input = self.width * BOX_SIDE.pow(2);
        let linear = |name: &str, input, output, start| {
            Layer::new(format!("roi_heads.{name}"), Form::Linear, [input, output, 1], regions, start)
        };
        all.push(linear("box_head.fc1", input, hidden, Initial::Uniform { bound: (3.0 / input as f64).sqrt() }));
        let deviation = |deviation| Initial::Deviation { deviation };
        all.push(linear("box_predictor.cls_score", hidden, self.classes + 1, deviation(0.01)));
        all.push(linear("box_predictor.bbox_pred", hidden, 4 * self.classes, deviation(0.001)));
        all
    }

    fn mask_layers(self) -> Vec<Layer> {
        let (width, regions) = (self.width, self.most_with_object());
        let mut all = self.convolutions("mask_head.mask_fcn", regions * MASK_SIDE.pow(2));
        let cells = regions * MASK_OUTPUT.pow(2);
        // For the fan-out of a transposed convolution, torch uses the first dimension of the kernel, which is the number of inputs.
        let start = Initial::FanOut { fan_out: width * 4 };
        let name = |name: &str| format!("roi_heads.mask_head.{name}");
        all.push(Layer::new(name("deconv"), Form::Doubling, [width, width, 2], cells, start));
        let start = Initial::Deviation { deviation: 0.001 };
        all.push(Layer::new(name("predictor"), Form::Convolution, [width, self.classes, 1], cells, start));
        all
    }

    /// The first convolutions of the box head or the mask head, with the initial values of detectron2's `c2_msra_fill`.
    fn convolutions(self, name: &str, cells: usize) -> Vec<Layer> {
        let width = self.width;
        let start = Initial::FanOut { fan_out: width * 9 };
        let layer =
            |number| Layer::new(format!("roi_heads.{name}{number}"), Form::Unit, [width, width, 3], cells, start);
        (1..=CONVOLUTIONS).map(layer).collect()
    }
}

impl Layer {
    /// Makes a layer whose bias, if it has one, starts at zero.
    fn new(name: String, form: Form, [input, output, kernel]: [usize; 3], cells: usize, weight: Initial) -> Layer {
        Layer { name, form, input, output, kernel, cells, weight, bias: Initial::Zeros }
    }

    fn parameters(self, stage: usize) -> Vec<Parameter> {
        let Layer { name, form, input, output, kernel, weight, bias, .. } = self;
        let parameter = |part: &str, shape: &[usize], start: Initial| {
            let shape = shape.iter().map(|&n| n as i64).collect();
            Parameter { stage, name: format!("{name}.{part}"), shape, start, role: Role::Decayed }
        };
        let shape = match form {
            Form::Unit | Form::Convolution => vec![output, input, kernel, kernel],
            Form::Doubling => vec![input, output, kernel, kernel],
            Form::Norm => vec![output],
            Form::Linear => vec![output, input],
        };
        let weight = parameter("weight", &shape, weight);
        match form {
            Form::Unit => vec![
                weight,
                parameter("norm.weight", &[output], Initial::Ones),
                parameter("norm.bias", &[output], Initial::Zeros),
            ],
            _ => vec![weight, parameter("bias", &[output], bias)],
        }
    }

    fn flops(&self) -> f64 {
        let per_output = match self.form {
            Form::Unit | Form::Convolution | Form::Linear => self.input * self.kernel * self.kernel,
            // Each output cell depends on one cell of the input.
            Form::Doubling => self.input,
            Form::Norm => 1,
        };
        2.0 * per_output as f64 * (self.output * self.cells) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn architecture(sets: &[&str]) -> Architecture {
        let shapes = ["detection.format=shapes", "detection.train_images=2", "detection.test_images=2"];
        let sets: Vec<String> = shapes.iter().chain(sets).map(|set| set.to_string()).collect();
        Architecture::of(&Config::parse("", &sets).unwrap().of_task(TaskKind::Detection)).unwrap()
    }

    #[test]
    fn the_pyramid_and_the_heads_have_the_parameters_of_detectron2s() {
        let count = |sets: &[&str], part: &str| -> usize {
            let all = architecture(sets).parameters(4);
            all.iter().filter(|p| p.name.starts_with(part)).map(Parameter::count).sum()
        };
        for (size, pyramid) in [
            (["model.width=768", "model.heads=12"], 5_560_000),
            (["model.width=1024", "model.heads=16"], 7_805_184),
            (["model.width=1280", "model.heads=16"], 10_640_192),
        ] {
            assert_eq!(count(&size, "backbone"), pyramid);
            assert_eq!(count(&size, "proposal_generator"), 1_184_015);
            assert_eq!(count(&size, "roi_heads.box"), 15_618_449);
            assert_eq!(count(&size, "roi_heads.mask"), 2_644_304);
        }
        let levels = [2, 3, 4, 5].map(|level| count(&[], &format!("backbone.simfp_{level}")));
        assert_eq!(levels, [2_115_904, 1_869_184, 787_456, 787_456]);
        assert_eq!(count(&["detection.masks=false"], "roi_heads.mask"), 0);
    }

    #[test]
    fn a_training_image_costs_the_operations_counted_by_hand() {
        // In multiply-adds. RPN: 87,296 cells. Box head: 512 regions of 49 cells. Mask head: 128 regions of 196 and of 784 cells.
        let proposals: u64 = 87_296 * (2 * 9 * 256 * 256 + 256 * 15);
        let boxes: u64 = 512 * (49 * 4 * 9 * 256 * 256 + 12_544 * 1024 + 1024 * (81 + 320));
        let masks: u64 = 128 * (196 * 4 * 9 * 256 * 256 + 784 * (256 * 256 + 256 * 80));
        let with = architecture(&["detection.crop=1024"]);
        let of = |layers: Vec<Layer>| layers.iter().map(Layer::flops).sum::<f64>() / 2.0;
        assert_eq!(of(with.proposal_layers()), proposals as f64);
        assert_eq!(of(with.box_layers()), boxes as f64);
        assert_eq!(of(with.mask_layers()), masks as f64);
        let without = architecture(&["detection.crop=1024", "detection.masks=false"]);
        assert_eq!((with.flops() - without.flops()) / 2.0, masks as f64);
        assert!(with.activations() > without.activations());
    }
}
