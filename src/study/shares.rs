//! Shares of a study: each process of a Slurm array or of an mpirun world trains the cells of its own share.

use super::Cell;
use crate::usage;

/// One of several shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The number of the share, counted from 0.
    pub index: usize,
    /// The number of all shares.
    pub of: usize,
}

impl std::str::FromStr for Share {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Share, anyhow::Error> {
        let numbers = text.split_once('/').and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        let share = numbers.map(|(index, of)| Share { index, of }).filter(|share| share.index < share.of);
        share.ok_or_else(|| usage!("{text}: give I/N with I from 0 to N − 1, such as 0/4"))
    }
}

impl Share {
    /// The cells of this share, in the order of `cells`. The shares have about the same cost: the cells are assigned in order of
    /// falling cost, each to the share with the lowest cost so far.
    pub fn of<'a>(self, cells: &[&'a Cell]) -> Vec<&'a Cell> {
        let costs: Vec<f64> = cells.iter().map(|cell| cell.flops).collect();
        self.positions(&costs).into_iter().map(|position| cells[position]).collect()
    }

    fn positions(self, costs: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..costs.len()).collect();
        order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]));
        let mut sums = vec![0.0; self.of];
        let mut own = Vec::new();
        for position in order {
            let least = (0..self.of).min_by(|&a, &b| f64::total_cmp(&sums[a], &sums[b])).unwrap_or(0);
            sums[least] += costs[position];
            if least == self.index {
                own.push(position);
            }
        }
        own.sort_unstable();
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_in_one_share_and_the_shares_cost_about_the_same() {
        let costs = [1.0, 8.0, 1.0, 1.0, 4.0, 1.0];
        let share = |text: &str| text.parse::<Share>().unwrap().positions(&costs);
        assert_eq!((share("0/2"), share("1/2")), (vec![1], vec![0, 2, 3, 4, 5]));
        assert_eq!(share("0/1"), [0, 1, 2, 3, 4, 5]);
        assert!(["2/2", "1", "a/2", "0/0", "-1/2"].iter().all(|text| text.parse::<Share>().is_err()));
    }
}
