//! Submits scripts with Slurm's sbatch.

use crate::usage;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

/// The prefixes of the environment variables that describe the Slurm job, step and rank of a process, and its memory and cores.
const INHERITED: [&str; 4] = ["SLURM_", "PMI_", "PMIX_RANK", "OMPI_COMM_"];
/// The variables with a prefix of `INHERITED` that are not removed, because they say how to reach Slurm.
const KEPT: [&str; 2] = ["SLURM_CONF", "SLURM_CLUSTERS"];

/// The command `sbatch`. This process may itself run in a job, so the variables of that job are removed. Otherwise sbatch would,
/// for example, take SLURM_MEM_PER_CPU as an option of the new job, and pass it on to the job's steps. The variables `SBATCH_*`
/// stay, because they are options of the user.
fn sbatch() -> Command {
    let mut command = Command::new("sbatch");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if INHERITED.iter().any(|start| text.starts_with(start)) && !KEPT.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command
}

/// Submits a script as a job that starts when the jobs `after` have succeeded. Returns the job's number.
pub fn submit(script: &Path, arguments: &[String], after: &[&str]) -> Result<String> {
    let mut command = sbatch();
    command.arg("--parsable");
    if !after.is_empty() {
        // Without --kill-on-invalid-dep, a job that waits for a failed job would wait for ever.
        command.args([&format!("--dependency=afterok:{}", after.join(":")), "--kill-on-invalid-dep=yes"]);
    }
    let output = command.arg(script).args(arguments).output().map_err(|e| {
        usage!(
            "sbatch cannot be started: {e}; submit from a machine of the cluster, or read the scripts with --dry-run"
        )
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let refused = String::from_utf8_lossy(&output.stderr);
        return Err(usage!("{}: sbatch refuses it: {}", script.display(), refused.trim()));
    }
    job_number(&text).ok_or_else(|| {
        usage!(
            "{}: sbatch printed no job number, but {:?}; look with squeue whether a job was submitted, and cancel that job",
            script.display(),
            text.trim()
        )
    })
}

/// The job number in the output of `sbatch --parsable`: the number in the last line of the form `number` or `number;cluster`. A
/// site's wrapper of sbatch may print more lines.
fn job_number(text: &str) -> Option<String> {
    let number = |line: &str| {
        let number = line.trim().split(';').next().unwrap_or_default();
        (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then(|| number.to_string())
    };
    text.lines().rev().find_map(number)
}

/// Lets Slurm check a script without submitting it. Returns Slurm's output, as an error if Slurm refuses the script. None if Slurm
/// cannot be asked.
pub fn test_only(script: &Path) -> Option<Result<String, String>> {
    let output = sbatch().arg("--test-only").arg(script).output().ok()?;
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_string();
    // These errors mean that Slurm is installed on this machine, but that sbatch does not reach a cluster's Slurm.
    if ["configuration source", "Unable to contact"].iter().any(|unreached| stderr.contains(unreached)) {
        return None;
    }
    Some(if output.status.success() { Ok(stderr) } else { Err(stderr) })
}

#[cfg(test)]
mod tests {
    use super::job_number;

    #[test]
    fn the_job_number_is_found_among_the_lines_of_a_site() {
        let of = |text: &str| job_number(text);
        assert_eq!(of("17\n").as_deref(), Some("17"));
        assert_eq!(of("17;gpu\n").as_deref(), Some("17"));
        assert_eq!(
            of("-----\nWelcome; 3 nodes are down\n-----\n 18;gpu \n\nYour budget: 40 h\n").as_deref(),
            Some("18")
        );
        for nothing in ["", "\n", "Submitted", ";gpu", "-----"] {
            assert_eq!(of(nothing), None, "{nothing:?}");
        }
    }
}
