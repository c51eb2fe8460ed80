//! The nodes of a run: the rows of the table, expanded for a config.

use super::table::{Depths, Kind, Origin, Row};
use crate::config::Config;
use crate::family::Model;
use std::path::{Path, PathBuf};

/// The nodes of all rows of the table, in the order in which a run executes them. They include nodes that the config does not ask
/// for, because a command can ask for them.
#[derive(Debug, Clone)]
pub struct Graph {
    nodes: Vec<Node>,
}

/// One piece of a run's work, such as the training of one module.
#[derive(Debug, Clone)]
pub struct Node {
    /// The name of the node's checkpoints, heartbeats, leases and logs, such as `meta`, `module-2` or `downstream-detect`.
    pub name: String,
    pub row: &'static Row,
    /// The stage that the node trains, if its row trains modules.
    pub index: Option<usize>,
    /// The positions in the graph of the nodes that must be done before this node. Nodes that the run leaves out do not matter.
    pub needs: Vec<usize>,
    /// Whether the config asks for the node.
    pub is_wanted: bool,
    /// The name of the file in the run directory that shows by its existence that the node is done. If the file is an artefact, it
    /// must also be undamaged and have the attributes of `expected`. Empty if no file shows that the node is done.
    pub file: String,
    /// The required attributes of the node's artefact, if the node writes one.
    pub expected: Option<Expected>,
    /// The user's script, if the node runs one.
    pub script: Option<PathBuf>,
}

/// The attributes that the artefact of a node must have.
#[derive(Debug, Clone)]
pub struct Expected {
    /// The number of blocks of each stage of the network.
    pub depths: Vec<usize>,
    /// The hash of the config keys that change the artefact.
    pub recipe: String,
}

impl Graph {
    /// Expands the rows of `table`. Each row must come after the rows that it needs.
    pub fn new(config: &Config, table: &[&'static Row]) -> Graph {
        let mut nodes: Vec<Node> = Vec::new();
        for row in table {
            for mut node in Node::of_row(config, row) {
                node.needs = needs(&node, &nodes);
                nodes.push(node);
            }
        }
        Graph { nodes }
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The file names of the artefacts that the nodes write.
    pub fn artefacts(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().filter(|node| node.expected.is_some()).map(|node| node.file.as_str())
    }

    /// The nodes of a row.
    pub fn nodes_of<'a>(&'a self, row: &Row) -> impl Iterator<Item = &'a Node> + use<'a> {
        let name = row.name;
        self.nodes.iter().filter(move |node| node.row.name == name)
    }

    /// The node of a row that has exactly one node.
    pub fn one(&self, row: &Row) -> &Node {
        self.nodes_of(row).next().expect("every row but that of the scripts has a node")
    }

    /// The nodes that a node needs.
    pub fn needs<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Node> {
        node.needs.iter().map(|&position| &self.nodes[position])
    }

    /// The node from whose weights a phase starts; none if the phase starts from new weights.
    pub fn start<'a>(&'a self, node: &'a Node) -> Option<&'a Node> {
        match node.row.phase()?.start {
            Origin::Fresh => None,
            Origin::From(row) => self.needs(node).find(|need| need.row.name == row),
        }
    }

    /// The position of the node from whose artefact this node's artefact derives; none if it derives from no artefact.
    pub fn original(&self, node: &Node) -> Option<usize> {
        let row = node.row.model?.derives_from?;
        self.nodes.iter().position(|other| other.row.name == row)
    }

    /// The rows that a run executes, in order. If the target was imported (`is_imported`), a run skips the rows that make it
    /// ([`Row::until_assembled`]).
    pub fn rows(&self, is_imported: bool) -> Vec<&'static Row> {
        let mut rows: Vec<&'static Row> =
            self.nodes.iter().filter(|node| node.is_needed(is_imported)).map(|node| node.row).collect();
        rows.dedup_by_key(|row| row.name);
        rows
    }
}

impl Node {
    /// Makes the node of a row, or of the row's module `index`, with empty `needs`.
    pub fn new(config: &Config, row: &'static Row, index: Option<usize>) -> Node {
        let number = index.map_or(String::new(), |index| index.to_string());
        let expected = row.model.as_ref().map(|model| Expected {
            depths: depths(&config.model, model.depths, index),
            recipe: recipe(config, model.recipe),
        });
        Node {
            name: index.map_or(row.name.to_string(), |index| format!("{}-{index}", row.name)),
            row,
            index,
            needs: Vec::new(),
            is_wanted: (row.is_wanted)(config),
            file: row.writes.replace("{index}", &number),
            expected,
            script: None,
        }
    }

    /// Makes all nodes of a row.
    fn of_row(config: &Config, row: &'static Row) -> Vec<Node> {
        if row.is_for_each_module() {
            return (0..config.model.stages()).map(|index| Node::new(config, row, Some(index))).collect();
        }
        match row.kind {
            Kind::Script => config.slurm.downstream.iter().map(|path| Node::of_script(config, row, path)).collect(),
            _ => vec![Node::new(config, row, None)],
        }
    }

    fn of_script(config: &Config, row: &'static Row, path: &Path) -> Node {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let node = Node::new(config, row, None);
        Node { name: format!("{}-{stem}", row.name), script: Some(path.into()), ..node }
    }

    /// Whether a run executes this node. If the target was imported (`is_imported`), a run skips the nodes that make it.
    pub fn is_needed(&self, is_imported: bool) -> bool {
        self.is_wanted && !(is_imported && self.row.until_assembled)
    }

    /// The arguments with which `incubate` executes this node, such as `module CONFIG --index 2`.
    pub fn command(&self) -> String {
        let index = self.index.map_or(String::new(), |index| format!(" --index {index}"));
        format!("{} CONFIG{index}", self.row.name)
    }

    /// The name of the node's model in the summary, if the node writes a model.
    pub fn label(&self) -> Option<String> {
        let number = self.index.map_or(String::new(), |index| index.to_string());
        self.row.model.map(|model| model.label.replace("{index}", &number))
    }
}

/// The positions of the nodes that a node needs, among the nodes before it. If both rows have a node for each module, a node needs
/// only the node of the same module.
fn needs(node: &Node, before: &[Node]) -> Vec<usize> {
    let is_needed = |other: &Node| {
        node.row.needs.contains(&other.row.name)
            && (node.index.is_none() || other.index.is_none() || node.index == other.index)
    };
    (0..before.len()).filter(|&position| is_needed(&before[position])).collect()
}

/// The number of blocks of each stage. `index` is the stage of a module.
fn depths(model: &Model, depths: Depths, index: Option<usize>) -> Vec<usize> {
    let is_deep = |stage: usize| match depths {
        Depths::Thin => false,
        Depths::DeepAtModule => index == Some(stage),
        Depths::Deep => true,
    };
    let thin_and_deep = model.meta_depths().into_iter().zip(model.depths()).enumerate();
    thin_and_deep.map(|(stage, (thin, deep))| if is_deep(stage) { *deep } else { thin }).collect()
}

/// The hash, in hexadecimal, of the seed and of the config keys in `tables` that change the result.
fn recipe(config: &Config, tables: &[&str]) -> String {
    let text = format!("seed = {}\n{}", config.run.seed, config.recipe(tables));
    blake3::hash(text.as_bytes()).to_hex().to_string()
}
