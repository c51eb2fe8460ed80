//! Distributes modules over ranks, and the samples of a step over replicas. Also divides the samples of a replica into
//! micro-batches.

use std::ops::Range;

/// The modules that one rank trains, and the ranks with which it trains them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The modules that this rank's group trains, one after another.
    pub modules: Vec<usize>,
    /// The ranks of the group. They train each of the group's modules with data parallelism.
    pub group: Range<usize>,
}

/// Distributes K modules over R ranks. If R ≤ K, every rank trains alone, and rank r trains the modules r, r + R, r + 2R and so on.
/// If R > K, each module has a group of consecutive ranks, so that a group spans as few nodes as possible.
pub fn assignment(rank: usize, ranks: usize, modules: usize) -> Assignment {
    if ranks <= modules {
        Assignment { modules: (rank..modules).step_by(ranks).collect(), group: rank..rank + 1 }
    } else {
        let module =
            (0..modules).find(|&m| members(m, ranks, modules).contains(&rank)).expect("groups cover all ranks");
        Assignment { modules: vec![module], group: members(module, ranks, modules) }
    }
}

/// The number of ranks that train a module.
pub fn ranks_of(module: usize, ranks: usize, modules: usize) -> usize {
    if ranks <= modules { 1 } else { members(module, ranks, modules).len() }
}

fn members(module: usize, ranks: usize, modules: usize) -> Range<usize> {
    module * ranks / modules..(module + 1) * ranks / modules
}

/// The share of one replica: the positions of its samples in a global batch. Samples are mixed in pairs (mixup and CutMix), so
/// every share has an even number of samples. The shares of two replicas may differ by one pair. The gradient is exact all the
/// same, because the loss is divided by the global batch.
pub fn share(global_batch: usize, replica: usize, replicas: usize) -> Range<usize> {
    let pairs = global_batch / 2;
    2 * (pairs * replica / replicas)..2 * (pairs * (replica + 1) / replicas)
}

/// Splits a share into micro-batches of at most `micro_batch` samples.
pub fn micro_batches(share: Range<usize>, micro_batch: usize) -> Vec<Range<usize>> {
    share.clone().step_by(micro_batch).map(|start| start..(start + micro_batch).min(share.end)).collect()
}

/// Writes increasing numbers as ranges such as `0-3,7`, the form that sbatch's `--array` takes.
pub fn ranges(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let run = |&(from, to): &(usize, usize)| if from == to { from.to_string() } else { format!("{from}-{to}") };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_is_trained_by_exactly_one_group() {
        for modules in 1..9 {
            for ranks in 1..20 {
                let mut trained = vec![None; modules];
                for rank in 0..ranks {
                    let assignment = assignment(rank, ranks, modules);
                    assert!(assignment.group.contains(&rank));
                    for module in assignment.modules {
                        let group = trained[module].get_or_insert(assignment.group.clone());
                        assert_eq!(*group, assignment.group, "two groups train module {module}");
                    }
                }
                assert!(trained.iter().all(Option::is_some), "{ranks} ranks leave out a module of {modules}");
                for (module, group) in trained.into_iter().flatten().enumerate() {
                    assert_eq!(ranks_of(module, ranks, modules), group.len());
                }
            }
        }
    }

    #[test]
    fn shares_cover_the_batch_in_even_pieces() {
        for replicas in 1..9 {
            let shares: Vec<_> = (0..replicas).map(|r| share(130, r, replicas)).collect();
            assert_eq!(shares[0].start, 0);
            assert_eq!(shares[replicas - 1].end, 130);
            assert!(shares.windows(2).all(|w| w[0].end == w[1].start));
            let micro: Vec<_> = shares.iter().flat_map(|s| micro_batches(s.clone(), 8)).collect();
            assert!(micro.iter().all(|m| m.len() % 2 == 0 && m.len() <= 8));
            assert_eq!(micro.iter().map(|m| m.len()).sum::<usize>(), 130);
        }
    }
}
