//! The graph of a run as data, and the one rule that says how each of its nodes stands.
//!
//! [`table`] has a row for every kind of node: packing, the phases, assembly, export, the report, the user's scripts. A
//! config expands the rows into the nodes of a [`graph::Graph`]: one for each, or one for each module. Everything that
//! walks over a run walks over these nodes: the whole job, assembly, submission, the status, the summary, the bars.
//! [`state::state`] says how a node stands, from evidence that other rooms gather.
//! [`data`] is what a run knows of its images, and says how other images differ.

pub mod data;
pub mod graph;
pub mod start;
pub mod state;
pub mod table;
