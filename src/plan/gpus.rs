//! The usual GPUs by name, with their speed and memory. With them, a machine without a GPU can estimate a run on GPUs.

use crate::config::Precision;
use crate::usage;
use std::str::FromStr;

/// A kind of GPU with the figures of NVIDIA's data sheet: the peak speeds of matrix products without sparsity in TFLOP/s, and the
/// memory in 10⁹ bytes.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct GpuModel {
    /// The name that `--gpu` takes.
    pub name: &'static str,
    pub bf16: f64,
    pub tf32: f64,
    pub fp32: f64,
    pub memory_gb: f64,
}

/// The share of the peak speed that a training step is assumed to reach, in estimates for a named GPU.
pub const UTILISATION: f64 = 0.4;

const MODELS: [GpuModel; 10] = [
    GpuModel { name: "b200", bf16: 2250.0, tf32: 1100.0, fp32: 75.0, memory_gb: 180.0 },
    GpuModel { name: "h200", bf16: 989.4, tf32: 494.7, fp32: 66.9, memory_gb: 141.0 },
    GpuModel { name: "gh200", bf16: 989.4, tf32: 494.7, fp32: 66.9, memory_gb: 96.0 },
    GpuModel { name: "h100", bf16: 989.4, tf32: 494.7, fp32: 66.9, memory_gb: 80.0 },
    GpuModel { name: "h100-pcie", bf16: 756.0, tf32: 378.0, fp32: 51.2, memory_gb: 80.0 },
    GpuModel { name: "a100", bf16: 312.0, tf32: 156.0, fp32: 19.5, memory_gb: 80.0 },
    GpuModel { name: "a100-40", bf16: 312.0, tf32: 156.0, fp32: 19.5, memory_gb: 40.0 },
    GpuModel { name: "l40s", bf16: 362.0, tf32: 183.0, fp32: 91.6, memory_gb: 48.0 },
    GpuModel { name: "a40", bf16: 149.7, tf32: 74.8, fp32: 37.4, memory_gb: 48.0 },
    GpuModel { name: "l4", bf16: 121.0, tf32: 60.0, fp32: 30.3, memory_gb: 24.0 },
];

impl GpuModel {
    /// The kind of GPU to which the driver gives this name, such as `NVIDIA H100 80GB HBM3`. A variant, such as `h100-pcie`, counts
    /// as the main kind.
    pub fn of_device(name: &str) -> Option<GpuModel> {
        let words: Vec<String> = name.to_lowercase().split([' ', '-']).map(str::to_string).collect();
        MODELS.into_iter().find(|model| words.iter().any(|word| word == model.name))
    }

    /// The peak speed in TFLOP/s.
    pub fn peak(&self, precision: Precision) -> f64 {
        match precision {
            Precision::Bf16 => self.bf16,
            Precision::Tf32 => self.tf32,
            Precision::Fp32 => self.fp32,
        }
    }

    /// The estimated speed of a training step, in operations per second.
    pub fn rate(&self, precision: Precision) -> f64 {
        UTILISATION * self.peak(precision) * 1e12
    }

    /// A sentence that says how much faster bf16 would be, and which setting gives bf16. None if the precision is bf16.
    pub fn price(&self, precision: Precision) -> Option<String> {
        (precision != Precision::Bf16).then(|| {
            format!(
                "run.precision = \"{precision:?}\": matrix products in bf16 are {:.0} times as fast on {}; set \
                 run.precision = \"bf16\"",
                self.bf16 / self.peak(precision),
                self.name
            )
            .replace("Fp32", "fp32")
            .replace("Tf32", "tf32")
        })
    }
}

impl FromStr for GpuModel {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<GpuModel, anyhow::Error> {
        let found = MODELS.into_iter().find(|model| model.name == text.to_lowercase());
        found.ok_or_else(|| usage!("{text:?}: give one of {}, or --rate", MODELS.map(|model| model.name).join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_known_by_the_drivers_name_and_by_its_own() {
        let named = |name: &str| GpuModel::of_device(name).map(|model| model.name);
        assert_eq!(named("NVIDIA H100 80GB HBM3"), Some("h100"));
        assert_eq!(named("NVIDIA A100-SXM4-40GB"), Some("a100"));
        assert_eq!(named("NVIDIA GH200 480GB"), Some("gh200"));
        assert_eq!(named("Fake GPU 0"), None);
        assert_eq!("H200".parse::<GpuModel>().unwrap().memory_gb, 141.0);
        let error = "h1000".parse::<GpuModel>().unwrap_err().to_string();
        assert!(error.contains("h100, ") && error.contains("--rate"), "{error}");
    }

    #[test]
    fn what_a_precision_costs_is_said_unless_it_is_the_fastest() {
        let h100: GpuModel = "h100".parse().unwrap();
        assert!(h100.price(Precision::Fp32).unwrap().contains("\"fp32\": matrix products in bf16 are 15 times"));
        assert!(h100.price(Precision::Tf32).unwrap().contains("2 times"));
        assert_eq!(h100.price(Precision::Bf16), None);
        assert_eq!(h100.rate(Precision::Bf16), 0.4 * 989.4e12);
    }
}
