//! The report of `incubate plan`: parameters of each stage, steps, learning rates, memory, cost, and the modules of each rank.

use crate::config::{DeviceChoice, MicroBatch, Precision};
use crate::device::cuda;
use crate::plan::cost::{cost, fitting_micro_batch, memory, smallest_micro_batch};
use crate::plan::gpus::{GpuModel, UTILISATION};
use crate::plan::groups::{assignment, micro_batches, ranges, share};
use crate::plan::{PhasePlan, Plan};
use serde_json::{Value, json};
use std::fmt::Write;

/// The speed of a device.
#[derive(Debug, Clone, Copy)]
pub enum Speed {
    /// The measured speed of this machine's matrix product, in operations per second.
    Measured(f64),
    /// The speed that the user gives, in operations per second.
    Given(f64),
    /// The assumed speed of a kind of GPU.
    Gpu(GpuModel),
}

impl Speed {
    /// The speed in operations per second.
    pub fn rate(self, precision: Precision) -> f64 {
        match self {
            Speed::Measured(rate) | Speed::Given(rate) => rate,
            Speed::Gpu(gpu) => gpu.rate(precision),
        }
    }
}

/// The report about a plan on a world of `ranks` ranks with devices of this speed, as JSON. `others` are the run's plans for other
/// tasks. `input` says whether the cores of a machine read images as fast as its devices train on them.
pub fn report(plan: &Plan, others: &[Plan], ranks: usize, speed: Speed, input: Value) -> Value {
    let plan = &for_planned_device(plan, speed);
    let others: Vec<Plan> = others.iter().map(|plan| for_planned_device(plan, speed)).collect();
    let precision = plan.config.run.precision;
    let rate = speed.rate(precision);
    let model = &plan.config.model;
    let stages = model.stages();
    let per_stage = model.counts(model.depths());
    let on_cpu = plan.is_for_cpu(cuda().is_ok());
    let phase_report = |plan: &Plan, phase: &PhasePlan| {
        phase_report(&with_fitting_micro_batch(plan, phase, ranks, speed), phase, ranks, rate, on_cpu)
    };
    let of_plan = |plan: &Plan| plan.wanted_phases().iter().map(|phase| phase_report(plan, phase)).collect::<Vec<_>>();
    let phases: Vec<Value> = std::iter::once(plan).chain(&others).flat_map(of_plan).collect();
    let parts: Vec<Value> = (0..ranks)
        .map(|rank| {
            let part = assignment(rank, ranks, stages);
            // The report lists only the first and the last rank of a group. With many ranks, full lists would fill gigabytes.
            json!({"rank": rank, "modules": part.modules, "group": [part.group.start, part.group.end - 1]})
        })
        .collect();
    let mut report = json!({
        "name": plan.config.run.name,
        "train_images": plan.train_images,
        "parameters": per_stage.iter().sum::<usize>(),
        "parameters_per_stage": per_stage,
        "depths": model.depths(),
        "flops_per_s": rate,
        "devices_per_rank": plan.replicas_per_rank(),
        "phases": phases,
        "input": input,
        "ranks": parts,
    });
    if let Speed::Gpu(gpu) = speed {
        report["gpu"] = json!({
            "name": gpu.name,
            "memory_gb": gpu.memory_gb,
            "peak_tflops": gpu.peak(precision),
            "utilisation": UTILISATION,
            "price_of_precision": gpu.price(precision),
        });
    }
    report
}

/// The plan. If the user names a kind of GPU and the config leaves the device open, the plan is for GPUs, even on a machine without
/// a GPU.
fn for_planned_device(plan: &Plan, speed: Speed) -> Plan {
    let mut plan = plan.clone();
    if matches!(speed, Speed::Gpu(_)) && plan.config.run.device == DeviceChoice::Auto {
        plan.config.run.device = DeviceChoice::Cuda;
    }
    plan
}

/// The plan. If the config's micro-batch is "auto" and the user names a kind of GPU, the plan has the largest micro-batch that fits
/// the GPU's memory by the formula. If no micro-batch fits, the plan has the smallest micro-batch of the task.
fn with_fitting_micro_batch(plan: &Plan, phase: &PhasePlan, ranks: usize, speed: Speed) -> Plan {
    let mut plan = plan.clone();
    if let (Speed::Gpu(gpu), MicroBatch::Auto) = (speed, plan.config.run.micro_batch) {
        let replicas = plan.ranks_on(phase.training.on, phase.index, ranks) * plan.replicas_per_rank();
        let most = share(phase.training.global_batch, 0, replicas).len();
        let fitting = fitting_micro_batch(&plan, phase, (gpu.memory_gb * 1e9) as u64, most, false);
        plan.config.run.micro_batch = MicroBatch::Samples(fitting.unwrap_or(smallest_micro_batch(plan.config.task)));
    }
    plan
}

fn phase_report(plan: &Plan, phase: &PhasePlan, ranks: usize, rate: f64, on_cpu: bool) -> Value {
    let cost = cost(plan, phase);
    let ranks_of_phase = plan.ranks_on(phase.training.on, phase.index, ranks);
    let replicas = ranks_of_phase * plan.replicas_per_rank();
    let global_batch = phase.training.global_batch;
    let largest = share(global_batch, 0, replicas);
    let passes = micro_batches(largest, plan.config.run.micro_batch.samples()).len();
    let warmup = phase.training.warmup_epochs as u64 * phase.steps_per_epoch;
    let device_hours = cost.flops / rate / 3600.0;
    json!({
        "phase": phase.name,
        "depths": phase.depths,
        "parameters": cost.parameters,
        "trained_parameters": cost.trained_parameters,
        "epochs": phase.training.epochs,
        "steps": phase.steps,
        "steps_per_epoch": phase.steps_per_epoch,
        "global_batch": global_batch,
        "replicas": replicas,
        "forward_passes_per_step": passes,
        "lr_first": phase.lr(0),
        "lr_peak": (0..phase.training.epochs as u64 + 1)
            .map(|e| phase.lr((e * phase.steps_per_epoch).min(phase.steps - 1)))
            .fold(phase.lr(warmup.min(phase.steps - 1)), f64::max),
        "lr_last": phase.lr(phase.steps - 1),
        "images": cost.images,
        "flops": cost.flops,
        "memory_bytes_per_device": memory(plan, phase, on_cpu),
        "device_hours": device_hours,
        "hours": device_hours / replicas as f64,
        "file": phase.file,
    })
}

/// Formats the report for people.
pub fn text(report: &Value, speed: Speed) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}: {} parameters in {} stages of {} blocks ({} parameters), {} training images",
        report["name"].as_str().unwrap_or_default(),
        report["parameters"],
        report["depths"].as_array().map_or(0, Vec::len),
        list(&report["depths"]),
        list(&report["parameters_per_stage"]),
        report["train_images"]
    );
    out += &table(&report["phases"]);
    let _ = writeln!(
        out,
        "hours at {:.3} TFLOP/s per device ({})",
        number(&report["flops_per_s"]) / 1e12,
        origin(report, speed)
    );
    if let Some(price) = report["gpu"]["price_of_precision"].as_str() {
        let _ = writeln!(out, "{price}");
    }
    let _ = writeln!(out, "data: {}", report["input"]["text"].as_str().unwrap_or_default());
    for part in report["ranks"].as_array().into_iter().flatten() {
        let modules = serde_json::from_value::<Vec<usize>>(part["modules"].clone()).unwrap_or_default();
        let _ = writeln!(
            out,
            "rank {}: {} device(s), modules {} with ranks {}",
            part["rank"],
            report["devices_per_rank"],
            ranges(&modules),
            match (&part["group"][0], &part["group"][1]) {
                (first, last) if first == last => first.to_string(),
                (first, last) => format!("{first}-{last}"),
            }
        );
    }
    out
}

/// A text that says where the speed of a device comes from.
fn origin(report: &Value, speed: Speed) -> String {
    match speed {
        Speed::Measured(_) => {
            "this machine's fp32 matrix product, measured now; a real step reaches a part of it".into()
        }
        Speed::Given(_) => "as given by --rate".into(),
        Speed::Gpu(gpu) => format!(
            "assumed: {:.0} % of {}'s {:.0} TFLOP/s, {:.0} GB",
            100.0 * UTILISATION,
            gpu.name,
            number(&report["gpu"]["peak_tflops"]),
            gpu.memory_gb
        ),
    }
}

/// A table with a line for each phase.
fn table(phases: &Value) -> String {
    let mut out = format!(
        "{:<11} {:>12} {:>12} {:>8} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>12} {:>9}\n",
        "phase",
        "parameters",
        "trained",
        "steps",
        "batch",
        "lr first",
        "lr peak",
        "lr last",
        "GiB/dev",
        "FLOPs",
        "device-hours",
        "hours"
    );
    for phase in phases.as_array().into_iter().flatten() {
        let _ = writeln!(
            out,
            "{:<11} {:>12} {:>12} {:>8} {:>6} {:>9.2e} {:>9.2e} {:>9.2e} {:>9.2} {:>9.2e} {:>12.2} {:>9.2}",
            phase["phase"].as_str().unwrap_or_default(),
            phase["parameters"].to_string(),
            phase["trained_parameters"].to_string(),
            phase["steps"].to_string(),
            phase["global_batch"].to_string(),
            number(&phase["lr_first"]),
            number(&phase["lr_peak"]),
            number(&phase["lr_last"]),
            number(&phase["memory_bytes_per_device"]) / (1u64 << 30) as f64,
            number(&phase["flops"]),
            number(&phase["device_hours"]),
            number(&phase["hours"])
        );
    }
    out
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

fn list(value: &Value) -> String {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")
}
