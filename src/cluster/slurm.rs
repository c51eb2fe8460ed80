//! Slurm job scripts as pure functions of the plan: the same plan gives the same text. Submission is `submit.rs`.

use crate::config::{Slurm, SlurmMode};
use crate::plan::Plan;
use crate::plan::groups::ranges;
use crate::plan::phases::{META, MODULE, PHASES};
use crate::require;
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::Path;

const TEMPLATE: &str = include_str!("../../slurm/templates/job.sh");

/// One job of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// `pack`, `meta`, `modules` (`modules-1`, … where they exceed an array's size) or `finalize`; `run` in one allocation;
    /// `downstream-NAME` for the user's own scripts after them.
    pub name: String,
    /// The modules of an array job.
    pub modules: Vec<usize>,
    /// The module of the array's task 0.
    pub first: usize,
    /// The jobs that it waits for, by their place in the list.
    pub after: Vec<usize>,
    /// Those of an earlier submission that it waits for too, as `squeue` names them.
    pub alive: Vec<String>,
    pub script: String,
    /// What the script is given.
    pub arguments: Vec<String>,
}

impl Job {
    /// A script of the user's that waits for the jobs before it, and is given the folder of the exported models.
    pub fn downstream(path: &Path, script: String, before: Vec<usize>, alive: Vec<String>, exported: &Path) -> Job {
        let name = format!("downstream-{}", path.file_stem().unwrap_or_default().to_string_lossy());
        let arguments = vec![exported.to_string_lossy().into_owned()];
        Job { name, modules: vec![], first: 0, after: before, alive, script, arguments }
    }
}

/// Where the scripts find things.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    pub binary: &'a Path,
    /// The config in the run directory.
    pub config: &'a Path,
    pub run_dir: &'a Path,
}

/// What the graph depends on beside the plan.
#[derive(Debug, Clone)]
pub struct Situation {
    /// Whether the data is as the run reads it, or there is nothing to pack it from.
    pub packed: bool,
    pub meta_done: bool,
    pub modules_done: Vec<usize>,
    /// Whether nothing is left to do.
    pub all_done: bool,
    /// What earlier submissions still have queued or running.
    pub alive: Alive,
    /// Slurm's MaxArraySize: an array's largest index plus one.
    pub max_array_size: usize,
    /// Seconds that the slowest save of the run took so far.
    pub save_s: f64,
}

impl Default for Situation {
    /// Nothing done, and Slurm's own default.
    fn default() -> Situation {
        Situation {
            packed: true,
            meta_done: false,
            modules_done: Vec::new(),
            all_done: false,
            alive: Alive::default(),
            max_array_size: 1001,
            save_s: 0.0,
        }
    }
}

/// Jobs that may still do something, as `squeue` names them.
#[derive(Debug, Clone, Default)]
pub struct Alive {
    pub pack: Option<String>,
    pub meta: Option<String>,
    /// A module's task.
    pub modules: BTreeMap<usize, String>,
    /// The job that does the rest: `finalize` or `run`.
    pub last: Option<String>,
}

/// The jobs of a plan that are neither done nor alive, in order. Where one of them comes before a last job that is alive,
/// that one is among them again: it waits for something that failed, so whoever submits these cancels it first.
///
/// # Errors
/// A usage error for text that cannot be written into a script.
pub fn jobs(plan: &Plan, places: Places, situation: &Situation) -> Result<Vec<Job>> {
    require_plain_text(plan, places)?;
    let graph = Graph { plan, places, lead: lead(&plan.config.slurm, situation), alive: &situation.alive };
    let alive = &situation.alive;
    let all = "step run \"$config\" || code=$?";
    let mut jobs = Vec::new();
    if !situation.packed && alive.pack.is_none() {
        jobs.push(graph.job("pack", &[], 0, vec![], "step pack \"$config\" || code=$?"));
    }
    let before: Vec<usize> = (0..jobs.len()).collect();
    if plan.config.slurm.mode == SlurmMode::Allocation {
        if !situation.all_done && (alive.last.is_none() || !jobs.is_empty()) {
            jobs.push(graph.job("run", &[], 0, before, all));
        }
        return Ok(jobs);
    }
    if !situation.meta_done && alive.meta.is_none() {
        jobs.push(graph.job("meta", &[], 0, before, "step meta \"$config\" || code=$?"));
    }
    let before: Vec<usize> = (0..jobs.len()).collect();
    let done_or_alive = |i: &usize| situation.modules_done.contains(i) || alive.modules.contains_key(i);
    let stages: Vec<usize> = (0..plan.config.model.stages()).collect();
    for (number, chunk) in stages.chunks(situation.max_array_size.max(1)).enumerate() {
        let left: Vec<usize> = chunk.iter().copied().filter(|i| !done_or_alive(i)).collect();
        if left.is_empty() {
            continue;
        }
        let name = if number == 0 { "modules".into() } else { format!("modules-{number}") };
        let step = format!("step module \"$config\" --index \"$(({} + SLURM_ARRAY_TASK_ID))\" || code=$?", chunk[0]);
        jobs.push(graph.job(&name, &left, chunk[0], before.clone(), &step));
    }
    // `run` verifies and skips what the jobs before it have done.
    if !situation.all_done && (alive.last.is_none() || !jobs.is_empty()) {
        let after = (0..jobs.len()).collect();
        jobs.push(graph.job("finalize", &[], 0, after, all));
    }
    Ok(jobs)
}

/// Refuses what could end an #SBATCH line early and begin another.
fn require_plain_text(plan: &Plan, places: Places) -> Result<()> {
    let (config, slurm) = (&plan.config, &plan.config.slurm);
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let mut texts = vec![
        ("run.name", config.run.name.clone()),
        ("the run directory", path(places.run_dir)),
        ("the config's path", path(places.config)),
        ("this program's path", path(places.binary)),
        ("data.path", path(&config.data.path)),
        ("data.pack_from", path(&config.data.pack_from)),
        ("slurm.container", slurm.container.clone()),
    ];
    for (key, value) in slurm.words() {
        texts.push((key, value.into()));
    }
    for (key, text) in texts {
        require!(
            !text.chars().any(char::is_control),
            "{key} = {text:?}: a line break or another control character cannot go into a script; take it out"
        );
    }
    Ok(())
}

/// A template with each `{name}` replaced by its text, in one pass: what stands in a text is never taken for a name.
fn filled(template: &str, texts: &[(&str, &str)]) -> String {
    let (mut out, mut rest) = (String::new(), template);
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let named =
            texts.iter().find_map(|(name, text)| Some((text, rest[1..].strip_prefix(name)?.strip_prefix('}')?)));
        rest = match named {
            Some((text, after)) => {
                out.push_str(text);
                after
            }
            None => {
                out.push('{');
                &rest[1..]
            }
        };
    }
    out + rest
}

/// How long before the time limit a job is to be told: Slurm may tell it up to a minute early, never late.
fn lead(slurm: &Slurm, situation: &Situation) -> u64 {
    match slurm.signal_lead {
        0 => 60.max((30.0 + 4.0 * situation.save_s).ceil() as u64),
        seconds => seconds,
    }
}

/// What a job asks for: nodes, ranks, cores of each rank, GPUs of each node.
struct Size {
    nodes: usize,
    ranks: usize,
    cpus: usize,
    gpus: usize,
}

struct Graph<'a> {
    plan: &'a Plan,
    places: Places<'a>,
    /// Seconds from the early signal to the time limit.
    lead: u64,
    alive: &'a Alive,
}

impl Graph<'_> {
    fn job(&self, name: &str, modules: &[usize], first: usize, after: Vec<usize>, steps: &str) -> Job {
        let (config, slurm) = (&self.plan.config, &self.plan.config.slurm);
        let path = |path: &Path| quoted(&path.to_string_lossy());
        let options: Vec<String> =
            self.options(name, modules, first).iter().map(|option| format!("#SBATCH {}", quoted(option))).collect();
        // One rank needs no launcher; more are started by the MPI plug-in that Open MPI speaks.
        let Size { ranks, cpus, .. } = self.size(name);
        let launch = match ranks {
            1 => String::new(),
            // When one rank is gone the others wait for it in a collective call, for ever but for --wait. (Not
            // --kill-on-bad-exit: 75 is a bad exit to it.)
            ranks => format!("srun --mpi=pmix --wait=\"${{SLURM_WAIT:-20}}\" --ntasks={ranks} --cpus-per-task={cpus}"),
        };
        // A task is requeued by its own name: the last task's number is that of the whole array.
        let (job, foreign) = match modules {
            [] => ("$SLURM_JOB_ID", "${!SLURM_ARRAY_@}"),
            _ => ("${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}", ""),
        };
        let watched = match name {
            "pack" => name.into(),
            "meta" => META.name.into(),
            _ if !modules.is_empty() => format!("{}-\"$(({first} + SLURM_ARRAY_TASK_ID))\"", MODULE.name),
            _ => PHASES.map(|phase| format!("{}*", phase.name)).join(".json "),
        };
        let texts = [
            ("title", format!("{name} of {}", config.run.name)),
            ("options", options.join("\n")),
            ("signal", slurm.signal.clone()),
            ("foreign", foreign.into()),
            ("setup", slurm.setup.join("\n")),
            ("program", self.program()),
            ("config", path(self.places.config)),
            ("run_dir", path(self.places.run_dir)),
            ("max_requeues", slurm.max_requeues.to_string()),
            ("job", job.into()),
            ("launch", launch),
            ("watched", format!("{watched}.json")),
            ("steps", steps.into()),
        ];
        let script = filled(TEMPLATE, &texts.each_ref().map(|(name, text)| (*name, text.as_str())));
        let alive = self.alive_before(name);
        Job { name: name.into(), modules: modules.to_vec(), first, after, alive, script, arguments: vec![] }
    }

    /// What is alive of the jobs that come before this one.
    fn alive_before(&self, name: &str) -> Vec<String> {
        let Alive { pack, meta, modules, .. } = self.alive;
        match name {
            "pack" => vec![],
            "meta" => pack.iter().cloned().collect(),
            "finalize" | "run" => pack.iter().chain(meta).chain(modules.values()).cloned().collect(),
            _ => pack.iter().chain(meta).cloned().collect(),
        }
    }

    /// Packing is one process with the cores that the ranks of a node have together.
    fn size(&self, name: &str) -> Size {
        let slurm = &self.plan.config.slurm;
        let (nodes, ranks, cpus) = (slurm.nodes, slurm.ranks, slurm.cpus_per_rank);
        match name {
            "pack" => Size { nodes: 1, ranks: 1, cpus: ranks.div_ceil(nodes) * cpus, gpus: 0 },
            _ => Size { nodes, ranks, cpus, gpus: slurm.gpus_per_node },
        }
    }

    /// The words that start this program, within the container if there is one.
    fn program(&self) -> String {
        let (config, slurm) = (&self.plan.config, &self.plan.config.slurm);
        if slurm.container.is_empty() {
            return quoted(&self.places.binary.to_string_lossy());
        }
        let mut words = vec!["apptainer".to_string(), "exec".into()];
        for folder in [self.places.run_dir, &config.data.path, &config.data.pack_from]
            .into_iter()
            .filter(|f| !f.as_os_str().is_empty())
        {
            words.extend(["--bind".into(), folder.to_string_lossy().into_owned()]);
        }
        if slurm.gpus_per_node > 0 {
            words.push("--nv".into());
        }
        words.extend([slurm.container.clone(), "incubate".into()]);
        words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }

    fn options(&self, name: &str, modules: &[usize], first: usize) -> Vec<String> {
        let slurm: &Slurm = &self.plan.config.slurm;
        let size = self.size(name);
        let pattern = if modules.is_empty() { "%j" } else { "%A_%a" };
        // Slurm expands % in file names; a literal one is doubled.
        let logs = self.places.run_dir.join("slurm").to_string_lossy().replace('%', "%%");
        let own_time = match name {
            "meta" => &slurm.time_meta,
            "finalize" => &slurm.time_finalize,
            _ => &slurm.time,
        };
        let mut options = vec![
            format!("--job-name={}-{name}", self.plan.config.run.name),
            format!("--output={logs}/{name}-{pattern}.log"),
            "--open-mode=append".into(),
            "--requeue".into(),
            format!("--signal=B:{}@{}", slurm.signal, self.lead),
            format!("--nodes={}", size.nodes),
            format!("--ntasks={}", size.ranks),
            format!("--ntasks-per-node={}", size.ranks / size.nodes),
            format!("--cpus-per-task={}", size.cpus),
        ];
        if !modules.is_empty() {
            let limit = if slurm.array_limit > 0 { format!("%{}", slurm.array_limit) } else { String::new() };
            let tasks: Vec<usize> = modules.iter().map(|module| module - first).collect();
            options.push(format!("--array={}{limit}", ranges(&tasks)));
        }
        if size.gpus > 0 {
            // All GPUs of a node to all its ranks: binding one to each task breaks peer-to-peer copies.
            options.push(format!("--gres=gpu:{}", size.gpus));
        }
        for (key, value) in [
            ("time", if own_time.is_empty() { &slurm.time } else { own_time }),
            ("partition", &slurm.partition),
            ("account", &slurm.account),
            ("qos", &slurm.qos),
            ("constraint", &slurm.constraint),
        ] {
            if !value.is_empty() {
                options.push(format!("--{key}={value}"));
            }
        }
        options.extend(slurm.options.clone());
        options
    }
}

/// A word that a shell, and sbatch in its #SBATCH lines, takes as it is.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests;
