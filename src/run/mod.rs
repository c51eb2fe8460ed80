//! The graph of a run as data, and the one rule that decides the state of each node.
//!
//! [`table`] has a row for every kind of node: packing, the phases, assembly, export, the report, the user's scripts. For a config,
//! each row becomes one node of a [`graph::Graph`], or one node for each module. The whole job, assembly, submission, the status, the
//! summary and the bars walk over these nodes. [`state::state`] decides the state of a node from evidence that other rooms gather.
//! [`data`] records the images of a run and says how other images differ from them.

pub mod data;
pub mod graph;
pub mod row;
pub mod start;
pub mod state;
pub mod table;
