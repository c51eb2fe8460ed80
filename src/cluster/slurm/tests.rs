//! Tests the dependencies of the jobs and the text of the scripts. Also lets bash run the scripts, with stand-ins for `incubate`
//! and `scontrol`.

use super::*;
use crate::cluster::script::fill;
use crate::config::Config;
use crate::plan::PhasePlan;
use crate::plan::cost::cost;
use std::collections::BTreeSet;
use std::path::Path;

#[path = "../../../tests/suite/wait.rs"]
mod wait;

fn plan(text: &str) -> Plan {
    Plan::new(Config::parse(text, &[]).unwrap(), 1_281_167).unwrap()
}

/// The situation in which some nodes of the plan's graph are done, and all other wanted nodes of the graph are not done. `done`
/// holds the names of the nodes that are done.
fn with_done(plan: &Plan, done: &[&str]) -> Situation {
    let is_unfinished = |node: &Node| node.is_wanted && !done.contains(&node.name.as_str());
    let graph = plan.graph();
    let unfinished = (0..graph.nodes().len()).filter(|&node| is_unfinished(&graph.nodes()[node])).collect();
    Situation { unfinished, open: OpenJobs::default(), max_array_size: DEFAULT_MAX_ARRAY_SIZE, save_s: 0.0 }
}

fn position(plan: &Plan, name: &str) -> usize {
    plan.graph().nodes().iter().position(|node| node.name == name).unwrap()
}

fn jobs_of(plan: &Plan, situation: &Situation) -> Vec<PlannedJob> {
    jobs(plan, &plan.graph(), paths(), situation).unwrap()
}

/// The jobs of a run in which no node is done yet.
fn fresh(plan: &Plan, paths: Paths) -> Result<Vec<PlannedJob>> {
    jobs(plan, &plan.graph(), paths, &with_done(plan, &[]))
}

fn names(jobs: &[PlannedJob]) -> Vec<String> {
    jobs.iter().map(|job| job.kind.to_string()).collect()
}

fn paths() -> Paths<'static> {
    Paths { binary: Path::new("/opt/incubate"), config: Path::new("/run/config.toml"), run_dir: Path::new("/run") }
}

fn graph(plan: &Plan, situation: &Situation) -> Vec<(String, Vec<usize>, Vec<usize>)> {
    jobs_of(plan, situation).into_iter().map(|job| (job.kind.to_string(), job.modules, job.after)).collect()
}

#[test]
fn an_array_run_is_meta_then_modules_then_the_rest_and_skips_what_is_done() {
    let plan = plan("[slurm]\npartition = \"gpu\"\narray_limit = 2\ntime_meta = \"01:00:00\"\n");
    let fresh = with_done(&plan, &[]);
    let job = |name: &str, modules: &[usize], after: &[usize]| (name.to_string(), modules.to_vec(), after.to_vec());
    assert_eq!(
        graph(&plan, &fresh),
        [job("meta", &[], &[]), job("modules", &[0, 1, 2, 3], &[0]), job("finalize", &[], &[0, 1])]
    );
    let begun = with_done(&plan, &["meta", "module-0", "module-2", "module-3"]);
    assert_eq!(graph(&plan, &begun), [job("modules", &[1], &[]), job("finalize", &[], &[0])]);
    let jobs = jobs_of(&plan, &fresh);
    assert!(jobs[0].script.contains("#SBATCH --time=01:00:00\n") && jobs[2].script.contains("--time=24:00:00\n"));
    let modules = &jobs[1].script;
    assert!(modules.contains("#SBATCH --array=0-3%2\n") && modules.contains("#SBATCH --partition=gpu\n"));
    assert!(!modules.contains("srun --"), "one rank needs no launcher");
}

#[test]
fn what_is_not_packed_yet_is_packed_first_by_one_process_with_a_nodes_cores() {
    let text = "[data]\nformat = \"packed\"\npath = \"/pack\"\npack_from = \"/images\"\ntrain_images = 1281167\n\
                [slurm]\nnodes = 2\nranks = 8\ncpus_per_rank = 3\ngpus_per_node = 4\n";
    let array = fresh(&plan(text), paths()).unwrap();
    assert_eq!(names(&array), ["pack", "meta", "modules", "finalize"]);
    assert_eq!((&array[1].after[..], &array[2].after[..]), (&[0][..], &[0, 1][..]));
    let pack = &array[0].script;
    assert!(array[1].script.contains("#SBATCH --ntasks=8\n#SBATCH --ntasks-per-node=4\n"), "evenly");
    for line in ["#SBATCH --nodes=1\n", "--ntasks=1\n", "--cpus-per-task=12\n", "step pack \"$config\""] {
        assert!(pack.contains(line), "{line} in {pack}");
    }
    assert!(!pack.contains("srun --") && !pack.contains("--gres"), "{pack}");
    let one = fresh(&plan(&format!("{text}mode = \"allocation\"\n")), paths()).unwrap();
    assert_eq!(names(&one), ["pack", "run"]);
}

#[test]
fn modules_beyond_the_largest_array_go_into_further_arrays() {
    let depths = vec!["1"; 25].join(", ");
    let plan = plan(&format!("[model]\ndepths = [{depths}]\n"));
    let situation = Situation { max_array_size: 10, ..with_done(&plan, &["module-11", "module-12"]) };
    let jobs = jobs_of(&plan, &situation);
    let arrays: Vec<&str> =
        jobs.iter().filter_map(|job| job.script.lines().find(|line| line.contains("--array"))).collect();
    assert_eq!(arrays, ["#SBATCH --array=0-9", "#SBATCH --array=0,3-9", "#SBATCH --array=0-4"]);
    assert!(jobs[2].script.contains("--index \"$((10 + SLURM_ARRAY_TASK_ID))\""));
    assert_eq!(jobs[4].after, [0, 1, 2, 3], "the last job waits for all");
}

#[test]
fn the_lead_of_the_signal_follows_the_time_to_save_unless_it_is_given() {
    let script = |text: &str, save_s: f64| {
        let plan = plan(text);
        jobs_of(&plan, &Situation { save_s, ..with_done(&plan, &[]) })[0].script.clone()
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
    for job in fresh(&plan, Paths { run_dir, ..paths() }).unwrap() {
        let mut lines = job.script.lines().filter(|line| line.contains("touch x") && !line.starts_with('#'));
        let run_dir = "'/data/$(touch x)/it'\\''s'";
        let program = format!("program=(apptainer exec --bind {run_dir} '/images/$(touch x).sif' incubate)");
        assert_eq!(lines.next(), Some(program.as_str()));
        assert_eq!(lines.next(), Some(format!("run_dir={run_dir}").as_str()));
        assert_eq!(lines.next(), None);
        assert!(job.script.contains("srun --mpi=pmix --wait=\"${SLURM_WAIT:-20}\" --ntasks=2"), "{}", job.script);
    }
}

#[test]
fn what_stands_in_a_value_is_never_taken_for_a_placeholder() {
    assert_eq!(fill("{a} ${b} {b}{c", &[("a", "{b}"), ("b", "{a}")]), "{b} ${a} {a}{c");
    let plan = plan("[run]\nname = \"{options}{steps}\"\n");
    let run_dir = Path::new("/data/{setup}/{options}");
    let script = &fresh(&plan, Paths { run_dir, ..paths() }).unwrap()[0].script;
    assert!(script.contains("# meta of {options}{steps}\n"), "{script}");
    assert!(script.contains("run_dir='/data/{setup}/{options}'\n"), "{script}");
    assert_eq!(script.matches("#SBATCH --requeue").count(), 1);
}

#[test]
fn a_line_break_anywhere_in_what_goes_into_a_script_is_refused() {
    let hostile = "/data/x\n#SBATCH --wrap=touch";
    let refused = |plan: &Plan, paths: Paths| {
        let error = fresh(plan, paths).unwrap_err();
        assert!(format!("{error}").contains("control character"), "{error}");
    };
    let harmless = plan("");
    refused(&harmless, Paths { run_dir: Path::new(hostile), ..paths() });
    refused(&harmless, Paths { config: Path::new(hostile), ..paths() });
    refused(&harmless, Paths { binary: Path::new("/opt/\rincubate"), ..paths() });
    refused(&plan("[slurm]\ncontainer = \"a\\nb\"\n"), paths());
    for table in ["data", "segmentation", "detection"] {
        refused(&plan(&format!("[{table}]\npath = \"a\\nb\"\n")), paths());
    }
    refused(&plan("[run]\nname = \"a\\rb\"\n"), paths());
    for text in ["options = [\"--exclusive\\n#SBATCH --wrap=x\"]", "partition = \"a\\u001bb\"", "setup = [\"a\\rb\"]"] {
        let error = Config::parse(&format!("[slurm]\n{text}\n"), &[]).unwrap_err();
        assert!(format!("{error}").contains("control character"), "{error}");
    }
}

#[test]
fn new_jobs_wait_for_open_ones_and_do_not_replace_them() {
    let plan = plan("");
    let open = |modules: &[usize], last: Option<&str>| OpenJobs {
        of_nodes: modules.iter().map(|i| (position(&plan, &format!("module-{i}")), format!("8_{i}"))).collect(),
        last: last.map(str::to_string),
    };
    let begun = with_done(&plan, &["meta", "module-0"]);
    let jobs_beside = |open| jobs_of(&plan, &Situation { open, ..begun.clone() });
    let again = jobs_beside(open(&[2, 3], Some("9")));
    assert_eq!((names(&again), &again[0].modules), (vec!["modules".into(), "finalize".into()], &vec![1]));
    assert_eq!(again[1].after_open, ["8_2", "8_3"]);
    assert!(jobs_beside(open(&[1, 2, 3], Some("9"))).is_empty(), "all nodes have open jobs");
    let only_last = jobs_beside(open(&[1, 2, 3], None));
    assert_eq!((only_last.len(), only_last[0].after_open.len()), (1, 3));
    assert!(jobs_of(&plan, &Situation { unfinished: vec![], ..begun }).is_empty());
}

#[test]
fn a_thousand_modules_each_in_its_own_job_cost_what_the_plan_does() {
    let depths = vec!["1"; 1000].join(", ");
    let plan = plan(&format!("[model]\ndepths = [{depths}]\n"));
    let graph = plan.graph();
    let jobs = jobs_of(&plan, &Situation { max_array_size: 1, ..with_done(&plan, &[]) });
    assert_eq!(jobs.len(), 1002);
    let nodes: Vec<usize> = jobs.iter().flat_map(|job| job.nodes.iter().copied()).collect();
    assert_eq!(nodes.iter().collect::<BTreeSet<_>>().len(), nodes.len(), "no two jobs do the same");
    let flops = |phase: &PhasePlan| cost(&plan, phase).flops;
    let of_jobs: f64 = nodes.iter().filter_map(|&node| plan.phase_of(&graph.nodes()[node])).map(|p| flops(&p)).sum();
    let of_plan: f64 = plan.wanted_phases().iter().map(flops).sum();
    assert!((of_jobs / of_plan - 1.0).abs() < 1e-9, "{of_jobs} {of_plan}");
}

/// A job's script in a folder of its own, with stand-ins for `incubate` and `scontrol`.
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
        let paths = Paths { binary: &binary, run_dir: folder.path(), ..paths() };
        let script = file("job.sh", &fresh(&plan(config), paths).unwrap()[place].script);
        Staged { script, folder }
    }

    fn command(&self) -> std::process::Command {
        let path = format!("{}:{}", self.folder.path().display(), std::env::var("PATH").unwrap());
        let mut bash = std::process::Command::new("bash");
        bash.arg(&self.script).env("PATH", path).env("SLURM_JOB_ID", "17");
        bash.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        bash
    }

    /// Starts the script, and sends it a signal as soon as the file `ready` exists. The program or a line of `slurm.setup` makes
    /// this file. Returns the exit code and the output.
    fn signalled(&self, command: &mut std::process::Command, signal: i32) -> (Option<i32>, String) {
        let child = command.spawn().unwrap();
        wait::wait_until("the file `ready`", || self.folder.path().join("ready").exists());
        // SAFETY: the process is our child and has not been waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        code_and_output(child.wait_with_output().unwrap())
    }
}

fn code_and_output(ended: std::process::Output) -> (Option<i32>, String) {
    (ended.status.code(), String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap())
}

/// Runs the script of the job `meta` as if Slurm had restarted the job once. Returns the script's exit code and output.
fn second_start(program: &str) -> (Option<i32>, String) {
    code_and_output(Staged::new("", program, 0).command().env("SLURM_RESTART_COUNT", "1").output().unwrap())
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
    assert_eq!(code_and_output(staged.command().envs(task).output().unwrap()), (Some(0), "requeue 17_3\n".into()));
    // A job that is submitted from within an array's task inherits SLURM_ARRAY_* variables, but is not a task itself.
    let staged = Staged::new("", "env | grep -c SLURM_ARRAY; exit 75", 0);
    assert_eq!(code_and_output(staged.command().envs(task).output().unwrap()), (Some(0), "0\nrequeue 17\n".into()));
}

#[test]
fn the_early_signal_reaches_the_program_as_usr2_and_is_no_failure_before_the_program_handles_it() {
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
    // If the signal comes while the lines of `slurm.setup` run, the program is not even started.
    let setup = "[slurm]\nsetup = [\"touch \\\"${0%/*}/ready\\\"; sleep 0.3\"]\n";
    let staged = Staged::new(setup, "echo started", 0);
    let (code, words) = staged.signalled(&mut staged.command(), libc::SIGUSR2);
    assert!(code == Some(0) && words == "requeue 17\n", "{code:?} {words}");
    // If Slurm itself sends TERM, Slurm decides whether the job comes back, so the script does not requeue it.
    let staged = Staged::new("", "trap 'exit 75' TERM; touch ready; for i in {1..500}; do sleep 0.02; done", 0);
    assert_eq!(staged.signalled(&mut staged.command(), libc::SIGTERM), (Some(75), String::new()));
}

#[test]
fn a_job_drops_the_variables_of_the_step_from_which_it_was_submitted() {
    let staged = Staged::new("", "env | grep -E '^(PMI|OMPI|SLURM_STEP)' | sort", 0);
    let step = [("PMIX_RANK", "0"), ("PMI_SIZE", "2"), ("OMPI_COMM_WORLD_SIZE", "2"), ("SLURM_STEP_ID", "0")];
    let mut command = staged.command();
    command.envs(step).env("OMPI_MCA_btl_tcp_if_include", "lo");
    let (code, words) = code_and_output(command.output().unwrap());
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
            let plan = plan(&text);
            assert_eq!(graph(&plan, &with_done(&plan, &[])).len(), 3, "{}", path.display());
        }
    }
}
