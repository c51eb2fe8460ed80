//! Sites whose Slurm commands print lines of their own, and shells within a job. Slurm's commands are replaced by scripts.

use crate::incubate::{Ended, Incubate, ended};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

/// A folder of commands that are found before all others.
struct Commands(tempfile::TempDir);

impl Commands {
    fn new(scripts: &[(&str, &str)]) -> Commands {
        let folder = tempfile::tempdir().unwrap();
        for (name, script) in scripts {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", folder.path().display())).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Commands(folder)
    }

    fn before(&self, mut command: Command) -> Command {
        let path = format!("{}:{}", self.0.path().display(), std::env::var("PATH").unwrap());
        command.env("PATH", path);
        command
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.0.path().join(name)).unwrap()
    }
}

/// The script for sbatch: it numbers the jobs 1, 2, 3, …, prints lines of a site around the number, and keeps its arguments and its
/// environment in files.
const SBATCH: &str = r#"echo x >> count; n=$(wc -l < count); echo "$@" >> arguments; env > environment
echo '----- 3 nodes are down -----'; echo "$n;gpu"; echo; echo 'Your budget: 40 h'"#;
const SQUEUE: &str = "echo 'Notice|of the|site'; n=1; while [ $n -le $(wc -l < count) ]; do \
                      echo \"$n|PENDING|Priority\"; n=$((n + 1)); done";

fn in_a_job(command: Command) -> Ended {
    let mut command = command;
    command.envs([
        ("SLURM_MEM_PER_CPU", "1000"),
        ("SLURM_JOB_ID", "7"),
        ("SLURM_EXPORT_ENV", "NONE"),
        ("SLURM_CLUSTERS", "gpu"),
        ("SBATCH_ACCOUNT", "mine"),
    ]);
    ended(command.output().unwrap())
}

#[test]
fn job_numbers_are_found_among_a_sites_lines_and_the_shells_own_job_stays_outside() {
    let run = Incubate::new().set("slurm.mode=\"allocation\"");
    let script = run.folder.path().join("list.sbatch");
    std::fs::write(&script, "#!/bin/sh\n").unwrap();
    let run = run.set(&format!("slurm.downstream=[{script:?}]"));
    let commands = Commands::new(&[("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", "echo \"$@\" > cancelled")]);
    let submitted = in_a_job(commands.before(run.command(&["submit", "--json"]))).ok();
    let jobs: Vec<Value> = serde_json::from_str(&submitted.out).unwrap();
    let ids: Vec<&str> = jobs.iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["1", "2"]);
    assert!(commands.text("arguments").contains("--dependency=afterok:1 "), "{}", commands.text("arguments"));
    let environment = commands.text("environment");
    let has = |name: &str| environment.lines().any(|line| line.starts_with(&format!("{name}=")));
    assert!(has("SLURM_CLUSTERS") && has("SBATCH_ACCOUNT"));
    assert!(!has("SLURM_MEM_PER_CPU") && !has("SLURM_JOB_ID") && !has("SLURM_EXPORT_ENV"), "{environment}");
    // The jobs are in the queue, so a second submission is refused, and cancelling finds them.
    ended(commands.before(run.command(&["submit"])).output().unwrap()).fails(2, &["already submitted as job 1, 2"]);
    let mut cancel = commands.before(crate::incubate::plain(&["cancel"]));
    ended(cancel.arg(&run.run_dir).output().unwrap()).ok();
    assert_eq!(commands.text("cancelled"), "1 2\n");
}

#[test]
fn an_answer_without_a_job_number_is_quoted() {
    let run = Incubate::new();
    let commands = Commands::new(&[("sbatch", "echo 'Submitted to the queue'"), ("squeue", "")]);
    let end = ended(commands.before(run.command(&["submit"])).output().unwrap());
    end.fails(2, &["sbatch printed no job number", "Submitted to the queue", "squeue"]);
}

#[test]
fn a_run_directory_with_a_backslash_is_refused_under_slurm() {
    let mut run = Incubate::new();
    run.run_dir = run.folder.path().join("a\\b");
    run.incubate(&["submit", "--dry-run"]).fails(2, &["a\\b", "backslash"]);
}
