//! The table of a ResNet's parameters and buffers: stage, name, shape. In the whole network, parameters have the names of
//! torchvision and timm: `conv1`, `bn1`, `layer{1…}.{0…}.{conv1,bn1,conv2,bn2,downsample.0,downsample.1}` and `fc`.

use super::{Resnet, Shortcut};
use crate::family::parameter::{Initial, Parameter, Role};

/// The rate at which the running statistics follow the statistics of the batches, PyTorch's default.
const MOMENTUM: f64 = 0.1;

/// The parameters and buffers of the network with these stage depths, in the order of PyTorch's `state_dict`. Convolutions
/// have no biases.
pub fn parameters(resnet: &Resnet, depths: &[usize]) -> Vec<Parameter> {
    let mut table = Table(Vec::new());
    table.convolution(0, "conv1", [resnet.width, resnet.channels, 3]);
    table.norm(0, "bn1", resnet.width);
    for (stage, blocks) in resnet.blocks(depths).iter().enumerate() {
        for (number, block) in blocks.iter().enumerate() {
            let name = |part: &str| format!("blocks.{number}.{part}");
            table.convolution(stage, &name("conv1"), [block.output, block.input, 3]);
            table.norm(stage, &name("bn1"), block.output);
            table.convolution(stage, &name("conv2"), [block.output, block.output, 3]);
            table.norm(stage, &name("bn2"), block.output);
            if block.changes_shape() && resnet.shortcut == Shortcut::B {
                table.convolution(stage, &name("downsample.0"), [block.output, block.input, 1]);
                table.norm(stage, &name("downsample.1"), block.output);
            }
        }
    }
    let (features, last) = (resnet.features(), depths.len() - 1);
    let start = Initial::FanIn { fan_in: features };
    table.add(last, "fc.weight", &[resnet.classes, features], start, Role::Decayed);
    table.add(last, "fc.bias", &[resnet.classes], start, Role::Plain);
    table.0
}

struct Table(Vec<Parameter>);

impl Table {
    fn add(&mut self, stage: usize, name: &str, shape: &[usize], start: Initial, role: Role) {
        let shape = shape.iter().map(|&size| size as i64).collect();
        self.0.push(Parameter { stage, name: name.into(), shape, start, role });
    }

    fn convolution(&mut self, stage: usize, name: &str, [output, input, side]: [usize; 3]) {
        let start = Initial::FanOut { fan_out: output * side * side };
        self.add(stage, &format!("{name}.weight"), &[output, input, side, side], start, Role::Decayed);
    }

    fn norm(&mut self, stage: usize, name: &str, channels: usize) {
        let buffer = Role::Buffer { momentum: MOMENTUM };
        for (part, start, role) in [
            ("weight", Initial::Ones, Role::Plain),
            ("bias", Initial::Zeros, Role::Plain),
            ("running_mean", Initial::Zeros, buffer),
            ("running_var", Initial::Ones, buffer),
        ] {
            self.add(stage, &format!("{name}.{part}"), &[channels], start, role);
        }
    }
}

/// torchvision's name of the parameter in the whole network, in which blocks are numbered within each layer.
pub fn whole_name(resnet: &Resnet, parameter: &Parameter, depths: &[usize]) -> String {
    let Some((number, rest)) = parameter.name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) else {
        return parameter.name.clone();
    };
    let number: usize = number.parse().expect("a block's name holds its number");
    let block = resnet.blocks(depths)[parameter.stage][number];
    format!("layer{}.{}.{rest}", block.layer + 1, block.number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::family::{Family, Model};

    fn resnet(sets: &[&str]) -> Resnet {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        let Model::Resnet(resnet) = Config::parse("[model]\nfamily = \"resnet\"", &sets).unwrap().model else {
            unreachable!()
        };
        resnet
    }

    /// The numbers that train, and those in buffers.
    fn counts(resnet: &Resnet, depths: &[usize]) -> [usize; 2] {
        let all = resnet.parameters(depths);
        let of = |trainable| all.iter().filter(|p| p.is_trainable() == trainable).map(Parameter::count).sum();
        [of(true), of(false)]
    }

    #[test]
    fn resnets_have_the_published_parameter_counts() {
        let n_5 = ["model.layers=[5, 5, 5]", "model.depths=[5, 5, 5]"];
        for (sets, classes, shortcut, expected) in [
            (&[][..], 10, "A", [1_727_962, 8_096]),
            (&[], 10, "B", [1_730_714, 8_288]),
            (&[], 100, "A", [1_733_812, 8_096]),
            (&[], 100, "B", [1_736_564, 8_288]),
            (&n_5, 10, "A", [464_154, 2_272]),
            (&n_5, 10, "B", [466_906, 2_464]),
        ] {
            let own = [format!("model.classes={classes}"), format!("model.shortcut={shortcut}")];
            let sets: Vec<&str> = sets.iter().copied().chain(own.iter().map(String::as_str)).collect();
            let resnet = resnet(&sets);
            assert_eq!(counts(&resnet, &resnet.depths), expected, "{sets:?}");
        }
    }

    #[test]
    fn meta_models_hybrids_and_stages_have_the_counts_of_their_blocks() {
        let [a, b] = ["A", "B"].map(|shortcut| resnet(&[&format!("model.shortcut={shortcut}")]));
        assert_eq!([&a, &b].map(|resnet| counts(resnet, &[1, 1, 1])[0]), [81_140, 83_892]);
        assert_eq!(a.counts(&[18, 18, 18]), [84_560, 329_472, 1_319_780]);
        assert_eq!(b.counts(&[18, 18, 18]), [84_560, 330_048, 1_321_956]);
        let hybrids = [[18, 1, 1], [1, 18, 1], [1, 1, 18]].map(|depths| counts(&a, &depths)[0]);
        assert_eq!(hybrids, [160_564, 396_660, 1_338_868]);
        let four = resnet(&["model.depths=[12, 14, 14, 14]"]);
        assert_eq!(counts(&four, &four.meta_depths())[0], 157_876);
    }

    #[test]
    fn names_are_those_of_the_whole_network_without_repetition() {
        let resnet = resnet(&["model.depths=[12, 14, 14, 14]"]);
        let table = resnet.parameters(&resnet.depths);
        let names: std::collections::BTreeSet<String> =
            table.iter().map(|parameter| resnet.whole_name(parameter, &resnet.depths)).collect();
        assert_eq!(names.len(), table.len());
        for name in
            ["conv1.weight", "layer1.17.bn2.running_var", "layer2.0.downsample.1.bias", "layer3.17.conv2.weight"]
        {
            assert!(names.contains(name), "{name}");
        }
    }
}
