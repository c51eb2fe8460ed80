//! Slurm job scripts as pure functions of the plan: the same plan gives the same text. Submission is `submit.rs`.

use crate::config::{Slurm, SlurmMode};
use crate::plan::Plan;
use crate::plan::groups::ranges;
use crate::plan::phases::{META, MODULE, PHASES};
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
    pub script: String,
    /// What the script is given.
    pub arguments: Vec<String>,
}

impl Job {
    /// A script of the user's that waits for the jobs before it, and is given the folder of the exported models.
    pub fn downstream(path: &Path, script: String, before: usize, exported: &Path) -> Job {
        let name = format!("downstream-{}", path.file_stem().unwrap_or_default().to_string_lossy());
        let arguments = vec![exported.to_string_lossy().into_owned()];
        Job { name, modules: vec![], first: 0, after: vec![before], script, arguments }
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
    /// Slurm's MaxArraySize: an array's largest index plus one.
    pub max_array_size: usize,
    /// Seconds that the slowest save of the run took so far.
    pub save_s: f64,
}

impl Default for Situation {
    /// Nothing done, and Slurm's own default.
    fn default() -> Situation {
        Situation { packed: true, meta_done: false, modules_done: Vec::new(), max_array_size: 1001, save_s: 0.0 }
    }
}

/// The jobs of a plan in order.
pub fn jobs(plan: &Plan, places: Places, situation: &Situation) -> Vec<Job> {
    let graph = Graph { plan, places, lead: lead(&plan.config.slurm, situation) };
    let all = "step run \"$config\" || code=$?";
    let mut jobs = Vec::new();
    if !situation.packed {
        jobs.push(graph.job("pack", &[], 0, vec![], "step pack \"$config\" || code=$?"));
    }
    let before: Vec<usize> = (0..jobs.len()).collect();
    if plan.config.slurm.mode == SlurmMode::Allocation {
        jobs.push(graph.job("run", &[], 0, before, all));
        return jobs;
    }
    if !situation.meta_done {
        jobs.push(graph.job("meta", &[], 0, before, "step meta \"$config\" || code=$?"));
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
            ranks => format!("srun --mpi=pmix --ntasks={ranks} --cpus-per-task={cpus} "),
        };
        let watched = match name {
            "pack" => name.into(),
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
        Job { name: name.into(), modules: modules.to_vec(), first, after, script, arguments: vec![] }
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
    fn what_is_not_packed_yet_is_packed_first_by_one_process_with_a_nodes_cores() {
        let text = "[slurm]\nnodes = 2\nranks = 8\ncpus_per_rank = 3\ngpus_per_node = 4\n";
        let situation = Situation { packed: false, ..Situation::default() };
        let array = jobs(&plan(text), places(), &situation);
        assert_eq!(
            array.iter().map(|job| job.name.as_str()).collect::<Vec<_>>(),
            ["pack", "meta", "modules", "finalize"]
        );
        assert_eq!((&array[1].after[..], &array[2].after[..]), (&[0][..], &[0, 1][..]));
        let pack = &array[0].script;
        for line in ["#SBATCH --nodes=1\n", "--ntasks=1\n", "--cpus-per-task=12\n", "step pack \"$config\""] {
            assert!(pack.contains(line), "{line} in {pack}");
        }
        assert!(!pack.contains("srun") && !pack.contains("--gres"), "{pack}");
        let one = jobs(&plan(&format!("{text}mode = \"allocation\"\n")), places(), &situation);
        assert_eq!(one.iter().map(|job| job.name.as_str()).collect::<Vec<_>>(), ["pack", "run"]);
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

    /// Runs the meta job's script, its program and scontrol replaced, as its second start; its exit code and words.
    fn second_start(program: &str) -> (Option<i32>, String) {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        std::fs::create_dir(folder.path().join("progress")).unwrap();
        file("progress/meta.json", r#"{"step":5}"#);
        file("scontrol", "#!/bin/sh\necho \"$@\"\n");
        let binary = file("program", &format!("#!/bin/sh\ncd {}\n{program}\n", folder.path().display()));
        let places = Places { binary: &binary, run_dir: folder.path(), ..places() };
        let script = file("job.sh", &jobs(&plan(""), places, &Situation::default())[0].script);
        let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
        let mut bash = std::process::Command::new("bash");
        bash.arg(script).env("PATH", path).env("SLURM_RESTART_COUNT", "1").env("SLURM_JOB_ID", "17");
        let ended = bash.output().unwrap();
        (ended.status.code(), String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap())
    }

    #[test]
    fn a_stopped_job_is_requeued_only_if_its_start_gained_a_step() {
        let gained = second_start(r#"echo '{"step":6}' > progress/meta.json; exit 75"#);
        assert_eq!(gained, (Some(0), "requeue 17\n".into()));
        let (code, words) = second_start("exit 75");
        assert!(code == Some(1) && words.contains("without a step gained") && !words.contains("requeue 17"), "{words}");
        assert_eq!(second_start("exit 3"), (Some(3), String::new()), "only 75 is resumable");
    }
}
