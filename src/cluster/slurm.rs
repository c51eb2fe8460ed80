//! Slurm job scripts as pure functions of the plan: the same plan gives the same text. Submission is `submit.rs`.

use crate::config::{Slurm, SlurmMode};
use crate::plan::Plan;
use crate::plan::phases::{META, MODULE, PHASES};
use std::path::Path;

const TEMPLATE: &str = include_str!("../../slurm/templates/job.sh");

/// One job of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// `meta`, `modules` (`modules-1`, … where they exceed an array's size) or `finalize`; `run` in one allocation.
    pub name: String,
    /// The modules of an array job.
    pub modules: Vec<usize>,
    /// The module of the array's task 0.
    pub first: usize,
    /// The jobs that it waits for, by their place in the list.
    pub after: Vec<usize>,
    pub script: String,
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
    pub meta_done: bool,
    pub modules_done: Vec<usize>,
    /// Slurm's MaxArraySize: an array's largest index plus one.
    pub max_array_size: usize,
    /// Seconds that the slowest save of the run took so far.
    pub save_s: f64,
}

impl Default for Situation {
    /// Nothing done, and Slurm's own default.
    fn default() -> Situation {
        Situation { meta_done: false, modules_done: Vec::new(), max_array_size: 1001, save_s: 0.0 }
    }
}

/// The jobs of a plan in order.
pub fn jobs(plan: &Plan, places: Places, situation: &Situation) -> Vec<Job> {
    let graph = Graph { plan, places, lead: lead(&plan.config.slurm, situation) };
    let all = "step run \"$config\" || code=$?";
    if plan.config.slurm.mode == SlurmMode::Allocation {
        return vec![graph.job("run", &[], 0, vec![], all)];
    }
    let mut jobs = Vec::new();
    if !situation.meta_done {
        jobs.push(graph.job("meta", &[], 0, vec![], "step meta \"$config\" || code=$?"));
    }
    let before: Vec<usize> = (0..jobs.len()).collect();
    let stages: Vec<usize> = (0..plan.config.model.stages()).collect();
    for (number, chunk) in stages.chunks(situation.max_array_size.max(1)).enumerate() {
        let left: Vec<usize> = chunk.iter().copied().filter(|i| !situation.modules_done.contains(i)).collect();
        if left.is_empty() {
            continue;
        }
        let name = if number == 0 { "modules".into() } else { format!("modules-{number}") };
        let step = format!("step module \"$config\" --index \"$(({} + SLURM_ARRAY_TASK_ID))\" || code=$?", chunk[0]);
        jobs.push(graph.job(&name, &left, chunk[0], before.clone(), &step));
    }
    // `run` verifies and skips what the jobs before it have done.
    let after = (0..jobs.len()).collect();
    jobs.push(graph.job("finalize", &[], 0, after, all));
    jobs
}

/// How long before the time limit a job is to be told: Slurm may tell it up to a minute early, never late.
fn lead(slurm: &Slurm, situation: &Situation) -> u64 {
    match slurm.signal_lead {
        0 => 60.max((30.0 + 4.0 * situation.save_s).ceil() as u64),
        seconds => seconds,
    }
}

struct Graph<'a> {
    plan: &'a Plan,
    places: Places<'a>,
    /// Seconds from the early signal to the time limit.
    lead: u64,
}

impl Graph<'_> {
    fn job(&self, name: &str, modules: &[usize], first: usize, after: Vec<usize>, steps: &str) -> Job {
        let (config, slurm) = (&self.plan.config, &self.plan.config.slurm);
        let path = |path: &Path| quoted(&path.to_string_lossy());
        let options: Vec<String> =
            self.options(name, modules, first).iter().map(|option| format!("#SBATCH {}", quoted(option))).collect();
        // One rank needs no launcher; more are started by the MPI plug-in that Open MPI speaks.
        let launch = match slurm.ranks {
            1 => String::new(),
            ranks => format!("srun --mpi=pmix --ntasks={ranks} --cpus-per-task={} ", slurm.cpus_per_rank),
        };
        let watched = match name {
            "meta" => META.name.into(),
            _ if !modules.is_empty() => format!("{}-\"$(({first} + SLURM_ARRAY_TASK_ID))\"", MODULE.name),
            _ => PHASES.map(|phase| format!("{}*", phase.name)).join(".json "),
        };
        let script = TEMPLATE
            .replace("{title}", &one_line(&format!("{name} of {}", config.run.name)))
            .replace("{launch} ", &launch)
            .replace("{signal}", &slurm.signal)
            .replace("{max_requeues}", &slurm.max_requeues.to_string())
            .replace("{watched}", &format!("{watched}.json"))
            .replace("{steps}", steps)
            // What comes from the user goes in last, so that nothing in it is taken for a placeholder.
            .replace("{program}", &self.program())
            .replace("{config}", &path(self.places.config))
            .replace("{run_dir}", &path(self.places.run_dir))
            .replace("{setup}", &slurm.setup.join("\n"))
            .replace("{options}", &options.join("\n"));
        Job { name: name.into(), modules: modules.to_vec(), first, after, script }
    }

    /// The words that start this program, within the container if there is one.
    fn program(&self) -> String {
        let (config, slurm) = (&self.plan.config, &self.plan.config.slurm);
        if slurm.container.is_empty() {
            return quoted(&self.places.binary.to_string_lossy());
        }
        let mut words = vec!["apptainer".to_string(), "exec".into()];
        for folder in [self.places.run_dir, &config.data.path].into_iter().filter(|f| !f.as_os_str().is_empty()) {
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
            format!("--nodes={}", slurm.nodes),
            format!("--ntasks={}", slurm.ranks),
            format!("--cpus-per-task={}", slurm.cpus_per_rank),
        ];
        if !modules.is_empty() {
            let limit = if slurm.array_limit > 0 { format!("%{}", slurm.array_limit) } else { String::new() };
            options.push(format!("--array={}{limit}", ranges(modules, first)));
        }
        if slurm.gpus_per_node > 0 {
            // All GPUs of a node to all its ranks: binding one to each task breaks peer-to-peer copies.
            options.push(format!("--gres=gpu:{}", slurm.gpus_per_node));
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

/// Task numbers as sbatch takes them, such as `0-3,7`: a thousand of them are one short word.
fn ranges(modules: &[usize], first: usize) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for task in modules.iter().map(|module| module - first) {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == task => *last = task,
            _ => runs.push((task, task)),
        }
    }
    let run = |&(from, to): &(usize, usize)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

/// A word that a shell, and sbatch in its #SBATCH lines, takes as it is.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn plan(text: &str) -> Plan {
        Plan::new(Config::parse(text, &[]).unwrap(), 1_281_167).unwrap()
    }

    fn places() -> Places<'static> {
        Places { binary: Path::new("/opt/incubate"), config: Path::new("/run/config.toml"), run_dir: Path::new("/run") }
    }

    fn graph(plan: &Plan, situation: &Situation) -> Vec<(String, Vec<usize>, Vec<usize>)> {
        jobs(plan, places(), situation).into_iter().map(|job| (job.name, job.modules, job.after)).collect()
    }

    #[test]
    fn an_array_run_is_meta_then_modules_then_the_rest_and_skips_what_is_done() {
        let plan = plan("[slurm]\npartition = \"gpu\"\narray_limit = 2\ntime_meta = \"01:00:00\"\n");
        let fresh = Situation::default();
        let job = |name: &str, modules: &[usize], after: &[usize]| (name.to_string(), modules.to_vec(), after.to_vec());
        assert_eq!(
            graph(&plan, &fresh),
            [job("meta", &[], &[]), job("modules", &[0, 1, 2, 3], &[0]), job("finalize", &[], &[0, 1])]
        );
        let begun = Situation { meta_done: true, modules_done: vec![0, 2, 3], ..fresh.clone() };
        assert_eq!(graph(&plan, &begun), [job("modules", &[1], &[]), job("finalize", &[], &[0])]);
        let jobs = jobs(&plan, places(), &fresh);
        assert!(jobs[0].script.contains("#SBATCH --time=01:00:00\n") && jobs[2].script.contains("--time=24:00:00\n"));
        let modules = &jobs[1].script;
        assert!(modules.contains("#SBATCH --array=0-3%2\n") && modules.contains("#SBATCH --partition=gpu\n"));
        assert!(!modules.contains("srun"), "one rank needs no launcher");
    }

    #[test]
    fn modules_beyond_the_largest_array_go_into_further_arrays() {
        let depths = vec!["1"; 25].join(", ");
        let plan = plan(&format!("[model]\ndepths = [{depths}]\n"));
        let situation = Situation { max_array_size: 10, modules_done: vec![11, 12], ..Situation::default() };
        let jobs = jobs(&plan, places(), &situation);
        let arrays: Vec<&str> =
            jobs.iter().filter_map(|job| job.script.lines().find(|line| line.contains("--array"))).collect();
        assert_eq!(arrays, ["#SBATCH --array=0-9", "#SBATCH --array=0,3-9", "#SBATCH --array=0-4"]);
        assert!(jobs[2].script.contains("--index \"$((10 + SLURM_ARRAY_TASK_ID))\""));
        assert_eq!(jobs[4].after, [0, 1, 2, 3], "the last job waits for all");
    }

    #[test]
    fn the_lead_of_the_signal_follows_the_time_to_save_unless_it_is_given() {
        let script = |text: &str, save_s: f64| {
            jobs(&plan(text), places(), &Situation { save_s, ..Situation::default() })[0].script.clone()
        };
        assert!(script("", 0.2).contains("--signal=B:USR2@60\n"));
        assert!(script("", 50.0).contains("--signal=B:USR2@230\n"));
        assert!(script("[slurm]\nsignal_lead = 45\n", 50.0).contains("--signal=B:USR2@45\n"));
    }

    #[test]
    fn nothing_from_a_config_reaches_a_shell_unquoted() {
        let plan = plan(
            "[run]\nname = \"$(touch x) `y` ; 'z'\"\n[slurm]\nconstraint = \"a&b\"\nranks = 2\n\
             container = \"/images/$(touch x).sif\"\n",
        );
        let run_dir = Path::new("/data/$(touch x)/it's");
        for job in jobs(&plan, Places { run_dir, ..places() }, &Situation::default()) {
            let mut lines = job.script.lines().filter(|line| line.contains("touch x") && !line.starts_with('#'));
            let run_dir = "'/data/$(touch x)/it'\\''s'";
            let program = format!("program=(apptainer exec --bind {run_dir} '/images/$(touch x).sif' incubate)");
            assert_eq!(lines.next(), Some(program.as_str()));
            assert_eq!(lines.next(), Some(format!("run_dir={run_dir}").as_str()));
            assert_eq!(lines.next(), None);
            assert!(job.script.contains("srun --mpi=pmix --ntasks=2") && !job.script.contains("{options}"));
        }
    }
}
