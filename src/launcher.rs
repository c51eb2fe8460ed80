//! Finds the rank of this process, the number of ranks on its node, and its cores, before MPI is initialised. The launcher (mpirun
//! or Slurm) gives the ranks in environment variables. The cores follow from the affinity masks of this process and its launcher.

use std::sync::OnceLock;

/// The number of cores on which this rank may compute. They are the cores to which the rank is bound, or an equal share if the
/// ranks of the node share cores. The first call fixes the number, because a thread that is pinned later sees fewer cores.
pub fn cores_of_this_rank() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let cores_on_node = std::env::var("SLURM_CPUS_ON_NODE").ok().and_then(|text| text.parse().ok());
        share(cores, ranks_on_this_node(), launchers_cores(), cores_on_node)
    })
}

/// The number of cores on which this rank may compute, if it sees `cores` cores and its node has `ranks` ranks. A rank that is
/// bound to these cores has all of them. Otherwise the ranks divide the cores, and each rank has at least one core. The rank is
/// bound if its launcher sees more than `cores`, or if `cores` × `ranks` is at most `cores_on_node`, the number of cores that Slurm
/// has given the job on this node.
fn share(cores: usize, ranks: usize, launchers_cores: Option<usize>, cores_on_node: Option<usize>) -> usize {
    let is_bound =
        launchers_cores.is_some_and(|all| all > cores) || cores_on_node.is_some_and(|all| cores * ranks <= all);
    if is_bound { cores } else { (cores / ranks.max(1)).max(1) }
}

/// The number of cores that the launcher may use on this node. The launcher, such as mpirun, is an ancestor of this process. None
/// if no ancestor is a known launcher, or if `/proc` does not tell.
fn launchers_cores() -> Option<usize> {
    const LAUNCHERS: [&str; 8] =
        ["mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "slurmstepd", "hydra_pmi_proxy"];
    let mut pid = std::os::unix::process::parent_id();
    while pid > 1 {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if LAUNCHERS.contains(&field("Name:")?) {
            let masks = field("Cpus_allowed:")?.split(',');
            return masks.map(|mask| Some(u64::from_str_radix(mask, 16).ok()?.count_ones() as usize)).sum();
        }
        pid = field("PPid:")?.parse().ok()?;
    }
    None
}

/// The rank that the launcher has given this process; 0 without a launcher. It is known before MPI is initialised, so that a single
/// rank can print a message.
pub fn launched_rank() -> usize {
    ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok()?.parse().ok())
        .unwrap_or(0)
}

/// How many ranks the launcher has started; 1 without a launcher.
pub fn launched_ranks() -> usize {
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok()?.parse().ok())
        .unwrap_or(1)
}

/// This process's rank among the ranks of its node; 0 without a launcher.
pub fn rank_on_this_node() -> usize {
    ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok()?.parse().ok())
        .unwrap_or(0)
}

/// How many ranks of this job are on this node; 1 without a launcher.
pub fn ranks_on_this_node() -> usize {
    ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok())
        .and_then(|text| text.parse().ok())
        .or_else(|| {
            let node = std::env::var("SLURM_NODEID").ok()?.parse().ok()?;
            tasks_on_node(&std::env::var("SLURM_STEP_TASKS_PER_NODE").ok()?, node)
        })
        .unwrap_or(1)
}

/// The number of tasks on a node, from Slurm's list of tasks per node. `2(x3),1` means two tasks on each of three nodes, and one
/// task on the fourth node.
fn tasks_on_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    list.split(',').find_map(|item| {
        let (tasks, nodes) = item.split_once("(x").unwrap_or((item, "1)"));
        before += nodes.strip_suffix(')')?.parse::<usize>().ok()?;
        (node < before).then(|| tasks.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_of_this_node_are_counted_if_nodes_have_unequal_numbers() {
        assert_eq!([0, 1].map(|node| tasks_on_node("2,1", node)), [Some(2), Some(1)]);
        assert_eq!([0, 2, 3, 4].map(|node| tasks_on_node("4(x3),2", node)), [Some(4), Some(4), Some(2), None]);
        assert_eq!(tasks_on_node("8", 0), Some(8));
    }

    #[test]
    fn cores_that_a_rank_is_bound_to_are_not_divided_again() {
        // With mpirun --bind-to none, all ranks share the launcher's cores.
        assert_eq!(share(8, 4, Some(8), None), 2);
        assert_eq!(share(1, 4, Some(1), None), 1);
        // mpirun, or Slurm's step daemon, has bound the rank.
        assert_eq!(share(2, 4, Some(8), None), 2);
        assert_eq!(share(16, 4, None, Some(64)), 16);
        // The job has all 64 cores of the node, but its ranks are not bound.
        assert_eq!(share(64, 4, Some(64), Some(64)), 16);
        // mpirun runs in a container whose number of cores is the number of ranks.
        assert_eq!(share(4, 4, Some(4), None), 1);
    }
}
