//! Gathers the evidence about the states of the nodes of a run's graph: the nodes' files, and Slurm's reports about their jobs.

use super::queue::Queue;
use crate::config::Config;
use crate::data::source::packed;
use crate::run::graph::{Graph, Node};
use crate::run::state::{Evidence, Found};
use crate::run::table::Kind;
use anyhow::Result;

/// The evidence about each node, without heartbeats. `find` looks at the file of a node. Packing is done if the config asks for it
/// and the pack is complete. A user's script is done if its job has succeeded.
pub fn gather(
    graph: &Graph,
    config: &Config,
    queue: &Queue,
    mut find: impl FnMut(&Node) -> Result<Found>,
) -> Result<Vec<Evidence>> {
    let exists_if = |is_done: bool| if is_done { Found::Exists } else { Found::Nothing };
    let evidence = graph.nodes().iter().map(|node| {
        let found = match node.row.kind {
            Kind::Pack => exists_if(node.is_wanted && packed::open(&config.data.path).is_ok()),
            Kind::Script => exists_if(queue.has_done(node)),
            _ => find(node)?,
        };
        Ok(Evidence { found, heartbeat: None, queued: queue.about(node).cloned() })
    });
    evidence.collect()
}

/// Whether the target was imported, so that the run needs none of the nodes up to the assembly.
pub fn is_imported(graph: &Graph, evidence: &[Evidence]) -> bool {
    graph.nodes().iter().zip(evidence).any(|(node, evidence)| evidence.found.is_imported(node))
}
