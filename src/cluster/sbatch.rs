//! Hands scripts to Slurm's sbatch.

use crate::usage;
use anyhow::Result;
use std::path::Path;
use std::process::Command;

/// What tells a job or step who it is.
const INHERITED: [&str; 6] = ["SLURM_ARRAY_", "SLURM_RESTART_COUNT", "SLURM_STEP", "PMI_", "PMIX_RANK", "OMPI_COMM_"];

/// Submits one script; returns the job's number.
pub fn submit(script: &Path, arguments: &[String], after: &[&str]) -> Result<String> {
    let mut command = Command::new("sbatch");
    command.arg("--parsable");
    // Submitted from within a job, the new one would inherit what that one is.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if INHERITED.iter().any(|start| text.starts_with(start)) {
            command.env_remove(&name);
        }
    }
    if !after.is_empty() {
        // Without --kill-on-invalid-dep a job behind a failed one would wait for ever.
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
    // «number» or «number;cluster»
    Ok(text.trim().split(';').next().unwrap_or_default().to_string())
}

/// What Slurm, where there is one, says of a script; an error if it refuses it.
pub fn test_only(script: &Path) -> Option<Result<String, String>> {
    let output = Command::new("sbatch").arg("--test-only").arg(script).output().ok()?;
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    // Installed here, but no cluster's: as good as none.
    if ["configuration source", "Unable to contact"].iter().any(|unreached| words.contains(unreached)) {
        return None;
    }
    Some(if output.status.success() { Ok(words) } else { Err(words) })
}
