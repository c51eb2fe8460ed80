//! Writes Slurm job scripts. A script is a pure function of the plan, the graph of the run, the paths, the seconds that a
//! checkpoint takes, and the job: the same input gives the same text.

use super::job::{JobKind, PlannedJob};
use crate::config::Slurm;
use crate::plan::Plan;
use crate::plan::groups::ranges;
use crate::require;
use crate::run::graph::Graph;
use crate::run::table::SlurmJob;
use anyhow::Result;
use std::path::Path;

const TEMPLATE: &str = include_str!("../../slurm/templates/job.sh");

/// The paths that the scripts use.
#[derive(Debug, Clone, Copy)]
pub struct Paths<'a> {
    pub binary: &'a Path,
    /// The copy of the config in the run directory.
    pub config: &'a Path,
    pub run_dir: &'a Path,
}

/// The resources of a job.
struct Resources {
    /// The number of machines. Slurm calls them nodes.
    nodes: usize,
    ranks: usize,
    cpus_per_rank: usize,
    gpus_per_node: usize,
}

/// Writes the scripts of one submission.
pub struct Script<'a> {
    plan: &'a Plan,
    graph: &'a Graph,
    paths: Paths<'a>,
    /// The seconds from the early signal to the time limit.
    signal_lead_s: u64,
}

impl<'a> Script<'a> {
    /// Prepares the scripts of one submission. `save_s` is the number of seconds that a checkpoint takes.
    ///
    /// # Errors
    /// A usage error for a text that cannot be written into a script.
    pub fn new(plan: &'a Plan, graph: &'a Graph, paths: Paths<'a>, save_s: f64) -> Result<Script<'a>> {
        require_plain_text(plan, paths)?;
        Ok(Script { plan, graph, paths, signal_lead_s: signal_lead_s(&plan.config.slurm, save_s) })
    }

    /// The script of one job.
    pub fn of(&self, job: &PlannedJob) -> String {
        let (config, slurm) = (&self.plan.config, &self.plan.config.slurm);
        let path = |path: &Path| quoted(&path.to_string_lossy());
        let options: Vec<String> =
            self.options(job).iter().map(|option| format!("#SBATCH {}", quoted(option))).collect();
        // A task of an array is requeued by the array's job ID and the task's number. The task's own job ID would not be enough,
        // because the last task has the same job ID as the whole array.
        let (own_id, array_variables) = match job.kind {
            JobKind::Array { .. } => ("${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}", ""),
            _ => ("$SLURM_JOB_ID", "${!SLURM_ARRAY_@}"),
        };
        let texts = [
            ("title", format!("{} of {}", job.kind, config.run.name)),
            ("options", options.join("\n")),
            ("signal", slurm.signal.clone()),
            ("array_variables", array_variables.into()),
            ("setup", slurm.setup.join("\n")),
            ("program", self.program()),
            ("config", path(self.paths.config)),
            ("run_dir", path(self.paths.run_dir)),
            ("max_requeues", slurm.max_requeues.to_string()),
            ("job", own_id.into()),
            ("launch", self.launch(job)),
            ("watched", self.watched(job)),
            ("steps", start_line(job)),
        ];
        fill(TEMPLATE, &texts.each_ref().map(|(name, text)| (*name, text.as_str())))
    }

    /// The command that starts the ranks. Empty for one rank. Several ranks are started through PMIx, which Open MPI supports.
    fn launch(&self, job: &PlannedJob) -> String {
        match self.resources(job) {
            Resources { ranks: 1, .. } => String::new(),
            // If a rank dies, the other ranks wait for it in a collective call until --wait ends them. The option
            // --kill-on-bad-exit is not used, because it would treat the exit code 75 (a stop by a signal) as a failure.
            Resources { ranks, cpus_per_rank, .. } => {
                format!(
                    "srun --mpi=pmix --wait=\"${{SLURM_WAIT:-20}}\" --ntasks={ranks} --cpus-per-task={cpus_per_rank}"
                )
            }
        }
    }

    /// Shell words that expand to the names of heartbeat files. These heartbeats show whether a start of the job has gained a
    /// step.
    fn watched(&self, job: &PlannedJob) -> String {
        let all_phases = || {
            let trained = self.graph.nodes().iter().filter(|node| node.row.phase().is_some());
            let mut files: Vec<String> = trained.map(|node| format!("{}*.json", node.row.name)).collect();
            files.dedup();
            files.join(" ")
        };
        match &job.kind {
            JobKind::Row(row_name) => format!("{row_name}.json"),
            JobKind::Array { row_name, .. } => {
                format!("{row_name}-\"$(({} + SLURM_ARRAY_TASK_ID))\".json", job.first_module)
            }
            JobKind::Finalize | JobKind::Run | JobKind::Script(_) => all_phases(),
        }
    }

    /// The resources of a job.
    fn resources(&self, job: &PlannedJob) -> Resources {
        let slurm = &self.plan.config.slurm;
        let (nodes, ranks, cpus_per_rank) = (slurm.nodes, slurm.ranks, slurm.cpus_per_rank);
        match self.graph.nodes()[job.nodes[0]].row.job {
            // Packing is one process with the cores that the ranks of a machine have together.
            SlurmJob::Alone => {
                let cpus_per_rank = ranks.div_ceil(nodes) * cpus_per_rank;
                Resources { nodes: 1, ranks: 1, cpus_per_rank, gpus_per_node: 0 }
            }
            _ => Resources { nodes, ranks, cpus_per_rank, gpus_per_node: slurm.gpus_per_node },
        }
    }

    /// The time limit of a job.
    fn time(&self, job: &PlannedJob) -> &str {
        let slurm = &self.plan.config.slurm;
        let row_limit = match job.kind {
            JobKind::Run => "",
            _ => (self.graph.nodes()[job.nodes[0]].row.time)(slurm),
        };
        if row_limit.is_empty() { &slurm.time } else { row_limit }
    }

    /// The command that starts this program, in the container if the config names one.
    fn program(&self) -> String {
        let (config, slurm) = (&self.plan.config, &self.plan.config.slurm);
        if slurm.container.is_empty() {
            return quoted(&self.paths.binary.to_string_lossy());
        }
        let mut words = vec!["apptainer".to_string(), "exec".into()];
        let (data, segmentation, detection) = (&config.data, &config.segmentation, &config.detection);
        for folder in [self.paths.run_dir, &data.path, &data.pack_from, &segmentation.path, &detection.path]
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

    /// The options of sbatch.
    fn options(&self, job: &PlannedJob) -> Vec<String> {
        let slurm: &Slurm = &self.plan.config.slurm;
        let resources = self.resources(job);
        let is_array = !job.modules.is_empty();
        let pattern = if is_array { "%A_%a" } else { "%j" };
        // Slurm expands % in file names, so a literal % is doubled.
        let logs = self.paths.run_dir.join("slurm").to_string_lossy().replace('%', "%%");
        let mut options = vec![
            format!("--job-name={}-{}", self.plan.config.run.name, job.kind),
            format!("--output={logs}/{}-{pattern}.log", job.kind),
            "--open-mode=append".into(),
            "--requeue".into(),
            format!("--signal=B:{}@{}", slurm.signal, self.signal_lead_s),
            format!("--nodes={}", resources.nodes),
            format!("--ntasks={}", resources.ranks),
            format!("--ntasks-per-node={}", resources.ranks / resources.nodes),
            format!("--cpus-per-task={}", resources.cpus_per_rank),
        ];
        if is_array {
            let limit = if slurm.array_limit > 0 { format!("%{}", slurm.array_limit) } else { String::new() };
            let tasks: Vec<usize> = job.modules.iter().map(|module| module - job.first_module).collect();
            options.push(format!("--array={}{limit}", ranges(&tasks)));
        }
        if resources.gpus_per_node > 0 {
            // All ranks of a machine see all of its GPUs, because binding a GPU to each task would break peer-to-peer copies.
            options.push(format!("--gres=gpu:{}", resources.gpus_per_node));
        }
        for (key, value) in [
            ("time", self.time(job)),
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

/// The line of the script that starts the program, by the script's function `step`.
fn start_line(job: &PlannedJob) -> String {
    let command = match &job.kind {
        JobKind::Row(row_name) => format!("{row_name} \"$config\""),
        JobKind::Array { row_name, .. } => {
            format!("{row_name} \"$config\" --index \"$(({} + SLURM_ARRAY_TASK_ID))\"", job.first_module)
        }
        // `run` verifies and skips the nodes of the run's graph that earlier jobs have executed.
        JobKind::Finalize | JobKind::Run | JobKind::Script(_) => "run \"$config\"".into(),
    };
    format!("step {command} || code=$?")
}

/// Refuses texts with control characters, because a line break could end an #SBATCH line early and begin another. Also refuses a
/// run directory with a backslash, because Slurm would then put no job number into the paths of the logs.
fn require_plain_text(plan: &Plan, paths: Paths) -> Result<()> {
    let (config, slurm) = (&plan.config, &plan.config.slurm);
    let path = |path: &Path| path.to_string_lossy().into_owned();
    let mut texts = vec![
        ("run.name", config.run.name.clone()),
        ("the run directory", path(paths.run_dir)),
        ("the config's path", path(paths.config)),
        ("this program's path", path(paths.binary)),
        ("data.path", path(&config.data.path)),
        ("data.pack_from", path(&config.data.pack_from)),
        ("segmentation.path", path(&config.segmentation.path)),
        ("detection.path", path(&config.detection.path)),
        ("slurm.container", slurm.container.clone()),
    ];
    for (key, value) in slurm.sbatch_options() {
        texts.push((key, value.into()));
    }
    for (key, text) in texts {
        require!(
            !text.chars().any(char::is_control),
            "{key} = {text:?}: a line break or another control character cannot go into a script; take it out"
        );
    }
    let run_dir = path(paths.run_dir);
    require!(
        !run_dir.contains('\\'),
        "{run_dir}: Slurm puts no job number into the name of a log file whose path has a backslash; choose a run directory without \
             one"
    );
    Ok(())
}

/// Replaces each `{name}` in a template by its text. It does so in one pass, so a `{name}` inside a text is not replaced.
pub(super) fn fill(template: &str, texts: &[(&str, &str)]) -> String {
    let (mut out, mut rest) = (String::new(), template);
    while let Some(brace) = rest.find('{') {
        out.push_str(&rest[..brace]);
        rest = &rest[brace..];
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

/// The seconds from the early signal to the time limit. By default they are at least 60. According to Slurm's manual, the signal
/// may come up to 60 seconds earlier than requested.
fn signal_lead_s(slurm: &Slurm, save_s: f64) -> u64 {
    match slurm.signal_lead {
        0 => 60.max((30.0 + 4.0 * save_s).ceil() as u64),
        seconds => seconds,
    }
}

/// Quotes a word for the shell and for sbatch's #SBATCH lines, if it needs quotes.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}
