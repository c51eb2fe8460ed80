//! Runs `tools/torture.sh`, which otherwise disturbs runs for hours, for a few disturbances.

use crate::incubate::ended;
use std::path::Path;
use std::process::Command;

/// Runs the script until `count` disturbances of these kinds have happened. The time limits are so long that the speed of the machine
/// does not matter.
fn torture(count: u32, kinds: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/torture.sh");
    let mut command = Command::new(script);
    command.args(["24", "--binary", env!("CARGO_BIN_EXE_incubate"), "--seed", "17"]);
    command.args(["--count", &count.to_string(), "--only", kinds]);
    let end = ended(command.output().unwrap());
    assert_eq!(end.code, Some(0), "{}{}", end.out, end.err);
    let printed = end.out.lines().rev().find_map(|line| line.split_once(" rounds, ")?.1.split(' ').next());
    let happened: u32 = printed.unwrap().parse().unwrap();
    assert!(happened >= count, "{}", end.out);
}

#[test]
fn disturbed_runs_end_with_the_bits_of_undisturbed_runs() {
    torture(24, "kill,peer,term,usr2,hup,pause,clock,second,full,readonly,torn,flipped");
}

#[test]
fn disturbed_jobs_of_a_slurm_end_with_the_bits_of_undisturbed_runs() {
    torture(8, "slurm-signal,slurm-requeue,slurm-scancel,slurm-cancel,slurm-kill,slurm-node");
}
