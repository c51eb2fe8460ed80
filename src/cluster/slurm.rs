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
            ranks => format!("srun --mpi=pmix --wait=\"${{SLURM_WAIT:-60}}\" --ntasks={ranks} --cpus-per-task={cpus}"),
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
        jobs(plan, places(), situation).unwrap().into_iter().map(|job| (job.name, job.modules, job.after)).collect()
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
        let jobs = jobs(&plan, places(), &fresh).unwrap();
        assert!(jobs[0].script.contains("#SBATCH --time=01:00:00\n") && jobs[2].script.contains("--time=24:00:00\n"));
        let modules = &jobs[1].script;
        assert!(modules.contains("#SBATCH --array=0-3%2\n") && modules.contains("#SBATCH --partition=gpu\n"));
        assert!(!modules.contains("srun"), "one rank needs no launcher");
    }

    #[test]
    fn what_is_not_packed_yet_is_packed_first_by_one_process_with_a_nodes_cores() {
        let text = "[slurm]\nnodes = 2\nranks = 8\ncpus_per_rank = 3\ngpus_per_node = 4\n";
        let situation = Situation { packed: false, ..Situation::default() };
        let array = jobs(&plan(text), places(), &situation).unwrap();
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
        let one = jobs(&plan(&format!("{text}mode = \"allocation\"\n")), places(), &situation).unwrap();
        assert_eq!(one.iter().map(|job| job.name.as_str()).collect::<Vec<_>>(), ["pack", "run"]);
    }

    #[test]
    fn modules_beyond_the_largest_array_go_into_further_arrays() {
        let depths = vec!["1"; 25].join(", ");
        let plan = plan(&format!("[model]\ndepths = [{depths}]\n"));
        let situation = Situation { max_array_size: 10, modules_done: vec![11, 12], ..Situation::default() };
        let jobs = jobs(&plan, places(), &situation).unwrap();
        let arrays: Vec<&str> =
            jobs.iter().filter_map(|job| job.script.lines().find(|line| line.contains("--array"))).collect();
        assert_eq!(arrays, ["#SBATCH --array=0-9", "#SBATCH --array=0,3-9", "#SBATCH --array=0-4"]);
        assert!(jobs[2].script.contains("--index \"$((10 + SLURM_ARRAY_TASK_ID))\""));
        assert_eq!(jobs[4].after, [0, 1, 2, 3], "the last job waits for all");
    }

    #[test]
    fn the_lead_of_the_signal_follows_the_time_to_save_unless_it_is_given() {
        let script = |text: &str, save_s: f64| {
            jobs(&plan(text), places(), &Situation { save_s, ..Situation::default() }).unwrap()[0].script.clone()
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
        for job in jobs(&plan, Places { run_dir, ..places() }, &Situation::default()).unwrap() {
            let mut lines = job.script.lines().filter(|line| line.contains("touch x") && !line.starts_with('#'));
            let run_dir = "'/data/$(touch x)/it'\\''s'";
            let program = format!("program=(apptainer exec --bind {run_dir} '/images/$(touch x).sif' incubate)");
            assert_eq!(lines.next(), Some(program.as_str()));
            assert_eq!(lines.next(), Some(format!("run_dir={run_dir}").as_str()));
            assert_eq!(lines.next(), None);
            assert!(job.script.contains("srun --mpi=pmix --wait=\"${SLURM_WAIT:-60}\" --ntasks=2"), "{}", job.script);
        }
    }

    #[test]
    fn what_stands_in_a_value_is_never_taken_for_a_placeholder() {
        assert_eq!(filled("{a} ${b} {b}{c", &[("a", "{b}"), ("b", "{a}")]), "{b} ${a} {a}{c");
        let plan = plan("[run]\nname = \"{options}{steps}\"\n");
        let run_dir = Path::new("/data/{setup}/{options}");
        let script = &jobs(&plan, Places { run_dir, ..places() }, &Situation::default()).unwrap()[0].script;
        assert!(script.contains("# meta of {options}{steps}\n"), "{script}");
        assert!(script.contains("run_dir='/data/{setup}/{options}'\n"), "{script}");
        assert_eq!(script.matches("#SBATCH --requeue").count(), 1);
    }

    #[test]
    fn a_line_break_anywhere_in_what_goes_into_a_script_is_refused() {
        let hostile = "/data/x\n#SBATCH --wrap=touch";
        let refused = |plan: &Plan, places: Places| {
            let error = jobs(plan, places, &Situation::default()).unwrap_err();
            assert!(format!("{error}").contains("control character"), "{error}");
        };
        let harmless = plan("");
        refused(&harmless, Places { run_dir: Path::new(hostile), ..places() });
        refused(&harmless, Places { config: Path::new(hostile), ..places() });
        refused(&harmless, Places { binary: Path::new("/opt/\rincubate"), ..places() });
        refused(&plan("[slurm]\ncontainer = \"a\\nb\"\n"), places());
        refused(&plan("[data]\npath = \"a\\nb\"\n"), places());
        refused(&plan("[run]\nname = \"a\\rb\"\n"), places());
        for text in
            ["options = [\"--exclusive\\n#SBATCH --wrap=x\"]", "partition = \"a\\u001bb\"", "setup = [\"a\\rb\"]"]
        {
            let error = Config::parse(&format!("[slurm]\n{text}\n"), &[]).unwrap_err();
            assert!(format!("{error}").contains("control character"), "{error}");
        }
    }

    #[test]
    fn what_is_alive_is_left_alone_and_waited_for() {
        let plan = plan("");
        let alive = |modules: &[usize], last: Option<&str>| Alive {
            modules: modules.iter().map(|&i| (i, format!("8_{i}"))).collect(),
            last: last.map(str::to_string),
            ..Alive::default()
        };
        let begun = Situation { meta_done: true, modules_done: vec![0], ..Situation::default() };
        let left = |alive| jobs(&plan, places(), &Situation { alive, ..begun.clone() }).unwrap();
        let again = left(alive(&[2, 3], Some("9")));
        let names: Vec<&str> = again.iter().map(|job| job.name.as_str()).collect();
        assert_eq!((names, &again[0].modules), (vec!["modules", "finalize"], &vec![1]));
        assert_eq!(again[1].alive, ["8_2", "8_3"]);
        assert!(left(alive(&[1, 2, 3], Some("9"))).is_empty(), "all of it is on its way");
        let only_last = left(alive(&[1, 2, 3], None));
        assert_eq!((only_last.len(), only_last[0].alive.len()), (1, 3));
        assert!(
            jobs(&plan, places(), &Situation { modules_done: vec![0, 1, 2, 3], all_done: true, ..begun })
                .unwrap()
                .is_empty()
        );
    }

    /// A job's script with its program and scontrol replaced, in a folder of its own.
    struct Staged {
        folder: tempfile::TempDir,
        script: std::path::PathBuf,
    }

    impl Staged {
        fn new(config: &str, program: &str, place: usize) -> Staged {
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
            let binary = file("program", &format!("#!/bin/bash\ncd {}\n{program}\n", folder.path().display()));
            let places = Places { binary: &binary, run_dir: folder.path(), ..places() };
            let script = file("job.sh", &jobs(&plan(config), places, &Situation::default()).unwrap()[place].script);
            Staged { script, folder }
        }

        fn command(&self) -> std::process::Command {
            let path = format!("{}:{}", self.folder.path().display(), std::env::var("PATH").unwrap());
            let mut bash = std::process::Command::new("bash");
            bash.arg(&self.script).env("PATH", path).env("SLURM_JOB_ID", "17");
            bash.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            bash
        }

        /// Starts it and sends it a signal when the program has made the file `ready`.
        fn signalled(&self, command: &mut std::process::Command, signal: i32) -> (Option<i32>, String) {
            let child = command.spawn().unwrap();
            while !self.folder.path().join("ready").exists() {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            // SAFETY: our child, which has not been waited for.
            unsafe { libc::kill(child.id() as i32, signal) };
            told(child.wait_with_output().unwrap())
        }
    }

    fn told(ended: std::process::Output) -> (Option<i32>, String) {
        (ended.status.code(), String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap())
    }

    /// Runs the meta job's script as its second start; its exit code and words.
    fn second_start(program: &str) -> (Option<i32>, String) {
        told(Staged::new("", program, 0).command().env("SLURM_RESTART_COUNT", "1").output().unwrap())
    }

    #[test]
    fn a_stopped_job_is_requeued_only_if_its_start_gained_a_step() {
        let gained = second_start(r#"echo '{"step":6}' > progress/meta.json; exit 75"#);
        assert_eq!(gained, (Some(0), "requeue 17\n".into()));
        for behind in ["exit 75", r#"echo '{"step":4}' > progress/meta.json; exit 75"#] {
            let (code, words) = second_start(behind);
            assert!(code == Some(1) && words.contains("without a step gained"), "{words}");
            assert!(!words.contains("requeue 17"), "{words}");
        }
        assert_eq!(second_start("exit 3"), (Some(3), String::new()), "only 75 is resumable");
    }

    #[test]
    fn a_task_of_an_array_requeues_itself_alone() {
        let staged = Staged::new("", "exit 75", 1);
        let task = [("SLURM_ARRAY_JOB_ID", "17"), ("SLURM_ARRAY_TASK_ID", "3")];
        assert_eq!(told(staged.command().envs(task).output().unwrap()), (Some(0), "requeue 17_3\n".into()));
        // Submitted from within a task, another job is none.
        let staged = Staged::new("", "env | grep -c SLURM_ARRAY; exit 75", 0);
        assert_eq!(told(staged.command().envs(task).output().unwrap()), (Some(0), "0\nrequeue 17\n".into()));
    }

    #[test]
    fn the_early_signal_reaches_the_program_as_usr2_and_before_it_listens_is_no_failure() {
        let listening = "trap 'exit 75' USR2; touch ready; for i in {1..500}; do sleep 0.02; done";
        let deaf = "touch ready; exec sleep 10";
        for config in ["", "[slurm]\nsignal = \"USR1\"\n"] {
            let signal = if config.is_empty() { libc::SIGUSR2 } else { libc::SIGUSR1 };
            for program in [listening, deaf] {
                let staged = Staged::new(config, program, 0);
                let (code, words) = staged.signalled(&mut staged.command(), signal);
                assert!(code == Some(0) && words.contains("requeue 17\n"), "{config}{program}: {code:?} {words}");
            }
        }
        // While the site's lines run: the program is not even started.
        let setup = format!("[slurm]\nsetup = [\"touch \\\"${{0%/*}}/ready\\\"; sleep 0.3\"]\n");
        let staged = Staged::new(&setup, "echo started", 0);
        let (code, words) = staged.signalled(&mut staged.command(), libc::SIGUSR2);
        assert!(code == Some(0) && words == "requeue 17\n", "{code:?} {words}");
        // TERM is Slurm's own: it decides whether the job comes back.
        let staged = Staged::new("", "trap 'exit 75' TERM; touch ready; for i in {1..500}; do sleep 0.02; done", 0);
        assert_eq!(staged.signalled(&mut staged.command(), libc::SIGTERM), (Some(75), String::new()));
    }

    #[test]
    fn a_job_takes_itself_for_no_part_of_the_step_it_was_submitted_from() {
        let staged = Staged::new("", "env | grep -E '^(PMI|OMPI|SLURM_STEP)' | sort", 0);
        let step = [("PMIX_RANK", "0"), ("PMI_SIZE", "2"), ("OMPI_COMM_WORLD_SIZE", "2"), ("SLURM_STEP_ID", "0")];
        let mut command = staged.command();
        command.envs(step).env("OMPI_MCA_btl_tcp_if_include", "lo");
        let (code, words) = told(command.output().unwrap());
        let kept: Vec<&str> = words.lines().filter(|line| !line.starts_with("OMPI_MCA_btl_tcp")).collect();
        assert!(code == Some(0) && words.contains("OMPI_MCA_btl_tcp_if_include=lo"), "{words}");
        assert!(kept.is_empty(), "{words}");
    }

    #[test]
    fn the_settings_of_every_site_are_a_config() {
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/sites")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                let text = std::fs::read_to_string(&path).unwrap();
                assert_eq!(graph(&plan(&text), &Situation::default()).len(), 3, "{}", path.display());
            }
        }
    }
}
