//! Slurm job scripts as pure functions of the plan: the same plan gives the same text. Submission is `submit.rs`.

use crate::config::{Slurm, SlurmMode};
use crate::plan::Plan;
use crate::plan::phases::{META, MODULE, PHASES};
use std::path::Path;

const TEMPLATE: &str = include_str!("../../slurm/templates/job.sh");

/// One job of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// `meta`, `modules` or `finalize`; `run` in one allocation.
    pub name: &'static str,
    /// The modules of an array job.
    pub array: Vec<usize>,
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

/// What is done already and needs no job.
#[derive(Debug, Clone, Default)]
pub struct Done {
    pub meta: bool,
    pub modules: Vec<usize>,
}

/// The jobs of a plan in order; each waits for the one before it.
pub fn jobs(plan: &Plan, places: Places, done: &Done) -> Vec<Job> {
    let config = &plan.config;
    if config.slurm.mode == SlurmMode::Allocation {
        return vec![job(plan, places, "run", &[], "step run \"$config\" || code=$?")];
    }
    let mut jobs = Vec::new();
    if !done.meta {
        jobs.push(job(plan, places, "meta", &[], "step meta \"$config\" || code=$?"));
    }
    let left: Vec<usize> = (0..config.model.stages()).filter(|i| !done.modules.contains(i)).collect();
    if !left.is_empty() {
        let step = "step module \"$config\" --index \"$SLURM_ARRAY_TASK_ID\" || code=$?";
        jobs.push(job(plan, places, "modules", &left, step));
    }
    // `run` verifies and skips what the jobs before it have done.
    jobs.push(job(plan, places, "finalize", &[], "step run \"$config\" || code=$?"));
    jobs
}

fn job(plan: &Plan, places: Places, name: &'static str, array: &[usize], steps: &str) -> Job {
    let slurm = &plan.config.slurm;
    let path = |path: &Path| quoted(&path.to_string_lossy());
    let options: Vec<String> =
        options(plan, places, name, array).into_iter().map(|option| format!("#SBATCH {}", quoted(&option))).collect();
    // One rank needs no launcher; more are started by the MPI plug-in that Open MPI speaks.
    let launch = if slurm.ranks == 1 {
        String::new()
    } else {
        format!("srun --mpi=pmix --ntasks={} --cpus-per-task={}", slurm.ranks, slurm.cpus_per_rank)
    };
    let watched: Vec<String> = match name {
        "meta" => vec![META.name.into()],
        "modules" => vec![format!("{}-\"$SLURM_ARRAY_TASK_ID\"", MODULE.name)],
        _ => PHASES.iter().map(|phase| format!("{}*", phase.name)).collect(),
    };
    let script = TEMPLATE
        .replace("{title}", &one_line(&format!("{} of {}", name, plan.config.run.name)))
        .replace("{launch} ", &if launch.is_empty() { launch } else { format!("{launch} ") })
        .replace("{signal}", &slurm.signal)
        .replace("{max_requeues}", &slurm.max_requeues.to_string())
        .replace("{watched}", &watched.iter().map(|w| format!("{w}.json")).collect::<Vec<_>>().join(" "))
        .replace("{steps}", steps)
        // What comes from the user goes in last, so that nothing in it is taken for a placeholder.
        .replace("{binary}", &path(places.binary))
        .replace("{config}", &path(places.config))
        .replace("{run_dir}", &path(places.run_dir))
        .replace("{setup}", &slurm.setup.join("\n"))
        .replace("{options}", &options.join("\n"));
    Job { name, array: array.to_vec(), script }
}

fn options(plan: &Plan, places: Places, name: &str, array: &[usize]) -> Vec<String> {
    let slurm: &Slurm = &plan.config.slurm;
    let pattern = if array.is_empty() { "%j" } else { "%A_%a" };
    // Slurm expands % in file names; a literal one is doubled.
    let logs = places.run_dir.join("slurm").to_string_lossy().replace('%', "%%");
    let mut options = vec![
        format!("--job-name={}-{name}", plan.config.run.name),
        format!("--output={logs}/{name}-{pattern}.log"),
        "--open-mode=append".into(),
        "--requeue".into(),
        format!("--signal=B:{}@{}", slurm.signal, slurm.signal_lead),
        format!("--nodes={}", slurm.nodes),
        format!("--ntasks={}", slurm.ranks),
        format!("--cpus-per-task={}", slurm.cpus_per_rank),
        format!("--time={}", slurm.time),
    ];
    if !array.is_empty() {
        let list: Vec<String> = array.iter().map(usize::to_string).collect();
        let limit = if slurm.array_limit > 0 { format!("%{}", slurm.array_limit) } else { String::new() };
        options.push(format!("--array={}{limit}", list.join(",")));
    }
    if slurm.gpus_per_node > 0 {
        // All GPUs of a node to all its ranks: binding one to each task breaks peer-to-peer copies.
        options.push(format!("--gres=gpu:{}", slurm.gpus_per_node));
    }
    for (key, value) in [
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

    #[test]
    fn an_array_run_is_meta_then_modules_then_the_rest_and_skips_what_is_done() {
        let plan = plan("[slurm]\npartition = \"gpu\"\narray_limit = 2\n");
        let names =
            |done: &Done| jobs(&plan, places(), done).iter().map(|j| (j.name, j.array.clone())).collect::<Vec<_>>();
        let none: Vec<usize> = vec![];
        assert_eq!(
            names(&Done::default()),
            [("meta", none.clone()), ("modules", vec![0, 1, 2, 3]), ("finalize", none.clone())]
        );
        let done = Done { meta: true, modules: vec![0, 2, 3] };
        assert_eq!(names(&done), [("modules", vec![1]), ("finalize", none)]);
        let modules = &jobs(&plan, places(), &Done::default())[1].script;
        assert!(modules.contains("#SBATCH --array=0,1,2,3%2\n") && modules.contains("#SBATCH --partition=gpu\n"));
        assert!(!modules.contains("srun"), "one rank needs no launcher");
    }

    #[test]
    fn nothing_from_a_config_reaches_a_shell_unquoted() {
        let plan = plan("[run]\nname = \"$(touch x) `y` ; 'z'\"\n[slurm]\nconstraint = \"a&b\"\nranks = 2\n");
        let run_dir = Path::new("/data/$(touch x)/it's");
        for job in jobs(&plan, Places { run_dir, ..places() }, &Done::default()) {
            for line in job.script.lines().filter(|line| line.contains("touch x") && !line.starts_with('#')) {
                assert_eq!(line, "run_dir='/data/$(touch x)/it'\\''s'");
            }
            assert!(job.script.contains("srun --mpi=pmix --ntasks=2"));
            assert!(!job.script.contains(['{']) || !job.script.contains("{options}"));
        }
    }
}
