//! The graph of a run as data, and the one rule that decides the state of each node.
//!
//! A node is one piece of a run. [`table`] has a row for every kind of node: packing, the phases, assembly, export, the report, the
//! user's scripts. For a given config, most rows become one node of a [`graph::Graph`]. The row of the modules becomes a node for
//! each module, and the row of the scripts a node for each script. The whole job, assembly, submission, the status, the summary and
//! the progress bars walk over these nodes. [`state::state`] decides the state of a node from evidence that other parts of the
//! program gather. [`data`] records the images of a run and describes how other images differ from them. [`start`] records a start
//! of a phase.

pub mod data;
pub mod graph;
pub mod row;
pub mod start;
pub mod state;
pub mod table;
