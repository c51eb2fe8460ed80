//! MPI through rsmpi. MPI is called from the main thread only.

use super::{Collective, Solo};
use crate::weights::floats_mut;
use crate::{require, usage};
use anyhow::Result;
use mpi::Threading;
use mpi::collective::{CommunicatorCollectives, SystemOperation};
use mpi::environment::Universe;
use mpi::topology::{Color, Communicator, SimpleCommunicator};
use std::cell::RefCell;
use std::time::Duration;
use tch::Tensor;

/// The world this process was started in. Dropping it finalises MPI, so it outlives every communicator.
pub struct World {
    universe: Option<Universe>,
    whole: Box<dyn Collective>,
}

impl World {
    /// Joins the world that mpirun or srun started, or a world of one without them. Refuses a launch that gives N
    /// worlds of one, the commonest silent mistake on a cluster (open-mpi/ompi#13523).
    pub fn join() -> Result<World> {
        let Some(launched) = launched_size()? else {
            return Ok(World::alone());
        };
        let (universe, _) =
            mpi::initialize_with_threading(Threading::Funneled).ok_or_else(|| usage!("MPI is initialised already"))?;
        let comm = universe.world();
        let size = comm.size() as usize;
        require!(
            size == launched.size,
            "{} says {} ranks, but MPI sees a world of {size}: the launcher and this binary's MPI do not speak the same \
             language. Start it with the mpirun of the MPI it was built with ({}), or with `srun --mpi=pmix`",
            launched.variable,
            launched.size,
            library_version()
        );
        Ok(World { universe: Some(universe), whole: Box::new(Mpi::new(comm)) })
    }

    /// A world of one, without MPI.
    pub fn alone() -> World {
        World { universe: None, whole: Box::new(Solo) }
    }

    /// All ranks.
    pub fn whole(&self) -> &dyn Collective {
        self.whole.as_ref()
    }

    /// The ranks that name the same group. Collective over the world.
    pub fn split(&self, group: usize) -> Box<dyn Collective> {
        match &self.universe {
            None => Box::new(Solo),
            Some(universe) => {
                let color = Color::with_value(group as i32);
                let comm = universe.world().split_by_color(color).expect("a defined colour has a communicator");
                Box::new(Mpi::new(comm))
            }
        }
    }

    /// The ranks of rank zero's node, for those. Collective over the world.
    pub fn node_of_zero(&self) -> Result<Option<Box<dyn Collective>>> {
        let Some(universe) = &self.universe else { return Ok(Some(Box::new(Solo))) };
        let node = Mpi::new(universe.world().split_shared(self.whole.rank() as i32));
        let mut zeros = [f64::from(u8::from(self.whole.is_zero()))];
        node.all_reduce_f64(&mut zeros)?;
        Ok(if zeros[0] > 0.0 { Some(Box::new(node)) } else { None })
    }

    /// Ends every rank of the world with this exit code, at once: nobody is left waiting in a collective call.
    pub fn abort(&self, code: u8) -> ! {
        if self.whole.size() > 1 {
            World::abort_all(code);
        }
        std::process::exit(code.into())
    }

    /// As [`World::abort`], from a panic anywhere in the process.
    pub fn abort_all(code: u8) {
        if mpi::environment::is_initialized() {
            SimpleCommunicator::world().abort(code.into());
        }
    }
}

/// The MPI library's own version line.
pub fn library_version() -> String {
    let version = mpi::environment::library_version().unwrap_or_default();
    version.split(['\n', ',']).next().unwrap_or_default().trim().to_string()
}

struct Launched {
    variable: &'static str,
    size: usize,
}

/// What the launcher says, if there is one.
///
/// A Slurm step without PMI is refused here, as Open MPI would abort in its own words or start N worlds of one. Slurm's
/// variables count only within a step: a batch script has most of them too.
fn launched_size() -> Result<Option<Launched>> {
    let number = |variable: &str| -> Option<usize> { std::env::var(variable).ok()?.parse().ok() };
    let is_set = |variable: &str| std::env::var_os(variable).is_some();
    let pmi = number("PMI_SIZE").filter(|_| is_set("SLURM_STEP_ID") && !is_set("PMIX_RANK"));
    if let (Some(size), None) = (pmi, number("OMPI_COMM_WORLD_SIZE"))
        && library_version().contains("Open MPI")
    {
        // It would abort, in words about how Slurm was built.
        require!(
            size == 1,
            "srun started {size} tasks with PMI-2, which {} does not speak; start them with `srun --mpi=pmix`",
            library_version()
        );
        return Ok(None);
    }
    let by_mpi = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].into_iter();
    if let Some(launched) = by_mpi.filter_map(|variable| Some(Launched { variable, size: number(variable)? })).next() {
        return Ok(Some(launched));
    }
    let variable = "SLURM_STEP_NUM_TASKS";
    let (Some(size), true) = (number(variable), std::env::var_os("SLURM_STEP_ID").is_some()) else { return Ok(None) };
    let pmix = std::env::var_os("PMIX_RANK").is_some();
    require!(
        pmix || size == 1,
        "srun started {size} tasks without PMIx, so each would be a world of one; start them with `srun --mpi=pmix`"
    );
    Ok(pmix.then_some(Launched { variable, size }))
}

/// How this process was started.
///
/// # Errors
/// A usage error if Slurm has given the job more tasks than the world has ranks: those would idle.
pub fn launch() -> Result<String> {
    let tasks = std::env::var("SLURM_NTASKS").ok().and_then(|text| text.parse::<usize>().ok()).unwrap_or(1);
    let launched = launched_size()?;
    require!(
        tasks <= 1 || launched.as_ref().is_some_and(|launched| launched.size > 1),
        "a world of one in a job of {tasks} tasks; to train on all start it with `srun --mpi=pmix`, or mpirun"
    );
    Ok(match launched {
        Some(launched) => format!("a world of {} ({})", launched.size, launched.variable),
        None => "a world of one; mpirun or `srun --mpi=pmix` starts more".into(),
    })
}

/// The cores that this rank may compute on: those it is bound to, or its part of those that the node's ranks share.
pub fn cores_of_this_rank() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let on_node = std::env::var("SLURM_CPUS_ON_NODE").ok().and_then(|text| text.parse().ok());
    share(cores, ranks_on_this_node(), launchers_cores(), on_node)
}

/// Whose cores are they? A launcher that has more itself has bound this rank to its own. So has Slurm, if such shares are
/// all that the job has on the node.
fn share(cores: usize, ranks: usize, launchers: Option<usize>, on_node: Option<usize>) -> usize {
    let own = launchers.is_some_and(|launchers| launchers > cores) || on_node.is_some_and(|all| cores * ranks <= all);
    if own { cores } else { (cores / ranks.max(1)).max(1) }
}

/// The cores of the launcher on this node, which is among this process's ancestors.
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

/// This process's rank as the launcher says it, before MPI is up: for messages that one rank should print.
pub fn launched_rank() -> usize {
    ["OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok()?.parse().ok())
        .unwrap_or(0)
}

/// This process's rank among those of its node.
pub fn rank_on_this_node() -> usize {
    ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok()?.parse().ok())
        .unwrap_or(0)
}

/// How many ranks of this job share this node.
pub fn ranks_on_this_node() -> usize {
    ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"]
        .iter()
        .find_map(|variable| std::env::var(variable).ok())
        .or_else(|| std::env::var("SLURM_STEP_TASKS_PER_NODE").ok()?.split(['(', ',']).next().map(str::to_string))
        .and_then(|text| text.parse().ok())
        .unwrap_or(1)
}

struct Mpi {
    comm: SimpleCommunicator,
    /// MPI_IN_PLACE has no binding in rsmpi, so the input is copied.
    scratch: RefCell<Vec<f32>>,
}

impl Mpi {
    fn new(comm: SimpleCommunicator) -> Mpi {
        Mpi { comm, scratch: RefCell::default() }
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.comm.rank() as usize
    }

    fn size(&self) -> usize {
        self.comm.size() as usize
    }

    fn all_reduce(&self, values: &mut Tensor) -> Result<()> {
        if self.size() > 1 {
            let values = floats_mut(values);
            let mut scratch = self.scratch.borrow_mut();
            scratch.clear();
            scratch.extend_from_slice(values);
            self.comm.all_reduce_into(&scratch[..], values, SystemOperation::sum());
        }
        Ok(())
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        if self.size() > 1 {
            let input = values.to_vec();
            self.comm.all_reduce_into(&input[..], values, SystemOperation::sum());
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        let mut request = self.comm.immediate_barrier();
        while let Err(pending) = request.test() {
            request = pending;
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_that_a_rank_is_bound_to_are_not_divided_again() {
        // mpirun --bind-to none: all share what the launcher has.
        assert_eq!(share(8, 4, Some(8), None), 2);
        assert_eq!(share(1, 4, Some(1), None), 1);
        // Bound by mpirun, or by Slurm's step daemon.
        assert_eq!(share(2, 4, Some(8), None), 2);
        assert_eq!(share(16, 4, None, Some(64)), 16);
        // A job with all cores of the node and no binding; a container's cores under mpirun.
        assert_eq!(share(64, 4, Some(64), Some(64)), 16);
        assert_eq!(share(4, 4, Some(4), None), 1);
    }
}
