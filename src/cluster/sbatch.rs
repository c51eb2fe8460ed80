//! Hands scripts to Slurm's sbatch.

use crate::usage;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

/// Beginnings of the variables that tell a process which job, step or rank it is.
const INHERITED: [&str; 6] = ["SLURM_ARRAY_", "SLURM_RESTART_COUNT", "SLURM_STEP", "PMI_", "PMIX_RANK", "OMPI_COMM_"];

/// Submits a script that starts when the jobs `after` have ended well. Returns the number of its job.
pub fn submit(script: &Path, arguments: &[String], after: &[&str]) -> Result<String> {
    let mut command = Command::new("sbatch");
    command.arg("--parsable");
    // A job that is submitted from within another one would otherwise inherit that one's variables.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if INHERITED.iter().any(|start| text.starts_with(start)) {
            command.env_remove(&name);
        }
    }
    if !after.is_empty() {
        // Without --kill-on-invalid-dep, a job that waits for a failed one would wait for ever.
        command.args([&format!("--dependency=afterok:{}", after.join(":")), "--kill-on-invalid-dep=yes"]);
    }
    let output = command.arg(script).args(arguments).output().map_err(|e| {
        usage!("sbatch cannot be started: {e}; submit from a machine of the cluster, or look at it with --dry-run")
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let refused = String::from_utf8_lossy(&output.stderr);
        return Err(usage!("{}: sbatch refuses it: {}", script.display(), refused.trim()));
    }
    // sbatch prints «number» or «number;cluster».
    Ok(text.trim().split(';').next().unwrap_or_default().to_string())
}

/// Has Slurm check a script. Returns its words, as an error if it refuses the script; none if no Slurm can be asked.
pub fn test_only(script: &Path) -> Option<Result<String, String>> {
    let output = Command::new("sbatch").arg("--test-only").arg(script).output().ok()?;
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    // Slurm is installed on this machine, but the machine belongs to no cluster.
    if ["configuration source", "Unable to contact"].iter().any(|unreached| words.contains(unreached)) {
        return None;
    }
    Some(if output.status.success() { Ok(words) } else { Err(words) })
}
