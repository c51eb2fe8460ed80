//! Checks the layout of `src`: a file imports only from lower floors, rooms of one floor from 2 on do not import each other, no imports
//! form a circle, each heavy dependency stays in its own files, and no file is longer than 400 lines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn floor_of(module: &str) -> u32 {
    match module {
        "main" | "cli" => 6,
        "pipeline" | "export" | "import" | "downstream" | "cluster" | "bench" | "pack" | "report" | "study" => 5,
        "train" => 4,
        "task" => 3,
        "data" | "model" | "collective" | "device" | "store" => 2,
        "plan" | "coco" | "driver" | "launcher" | "libtorch" | "random" | "run" | "seal" | "svg" | "weights" => 1,
        "bounds" | "config" | "error" | "family" | "stop" | "thread" => 0,
        other => panic!("which floor is {other} on? Add it here and to the documentation of lib.rs"),
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

fn module_of(path: &Path, root: &Path) -> String {
    let first = path.strip_prefix(root).unwrap().components().next().unwrap();
    Path::new(&first).file_stem().unwrap().to_string_lossy().into_owned()
}

/// The modules that a text names as `crate::word::…`, `use crate::word;` or in the list of a `use crate::{…};`.
fn imports(text: &str) -> Vec<String> {
    let word = |text: &str| -> String { text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    let macros = ["require", "usage"];
    let mut found = Vec::new();
    for (before, after) in text.match_indices("crate::").map(|(at, found)| (&text[..at], &text[at + found.len()..])) {
        match after.strip_prefix('{') {
            Some(list) => {
                let list = &list[..list.find("};").expect("the list has an end")];
                assert!(!list.contains('{'), "a list within a list: {list}");
                found.extend(list.split(',').map(|item| word(item.trim())));
            }
            None if after[word(after).len()..].starts_with("::") || before.ends_with("use ") => found.push(word(after)),
            // The word names a macro of the crate.
            None => {}
        }
    }
    found.retain(|word| !word.is_empty() && !macros.contains(&word.as_str()));
    found
}

#[test]
fn a_file_imports_only_from_lower_floors() {
    let forms = "use crate::a;\nuse crate::{b, usage};\ncrate::c::act(crate::require!(true))";
    assert_eq!(imports(forms), ["a", "b", "c"]);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&root).iter().filter(|p| !p.ends_with("lib.rs")) {
        let own = module_of(path, &root);
        let floor = floor_of(&own);
        for used in imports(&without_tests(path)).iter().filter(|used| **used != own) {
            let below = floor_of(used);
            // The modules of floors 0 and 1 may import others of their floor.
            let is_same_base = floor == below && floor <= 1;
            assert!(below < floor || is_same_base, "{}: imports crate::{used}", path.display());
        }
    }
}

#[test]
fn a_room_of_data_imports_only_from_the_rooms_before_it() {
    let rooms = ["source", "image", "feed"];
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/data");
    for (number, room) in rooms.iter().enumerate() {
        for path in sources(&data.join(room)) {
            let text = std::fs::read_to_string(&path).unwrap();
            for later in &rooms[number + 1..] {
                assert!(!text.contains(&format!("data::{later}::")), "{}: imports data::{later}", path.display());
            }
        }
    }
}

#[test]
fn heavy_dependencies_have_one_room_each() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (needle, rooms) in [
        ("use mpi::", &["collective/mpi.rs"][..]),
        ("hdf5::", &["store/artefact.rs", "data/source/shard.rs", "main.rs", "cluster/doctor.rs"]),
        ("clap::", &["cli/args.rs", "cli/bench.rs", "cli/mod.rs", "cli/overrides.rs", "main.rs"]),
        (
            "hotcoco::",
            &[
                "coco/annotations.rs",
                "coco/figures.rs",
                "coco/outlines.rs",
                "coco/results.rs",
                "data/image/scale_jitter/tests.rs",
                "downstream/coco_files.rs",
                "task/detection/paste.rs",
            ],
        ),
        ("indicatif::", &["pipeline/bars.rs"]),
        ("plotters::", &["svg/mod.rs", "svg/chart.rs", "svg/bars.rs"]),
        ("resvg::", &["svg/png.rs"]),
        ("maud::", &["report/page.rs"]),
        ("base64::", &["report/downstream.rs"]),
        ("csv::", &["report/table.rs"]),
    ] {
        for path in sources(&root) {
            let inside = std::fs::read_to_string(&path).unwrap().contains(needle);
            assert!(!inside || rooms.iter().any(|room| path.ends_with(room)), "{needle} in {}", path.display());
        }
    }
}

/// The text of a file without the tests at its end, which may import anything.
fn without_tests(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    text.split("#[cfg(test)]\nmod tests").next().unwrap().to_string()
}

/// The modules that a file's paths name, from the crate on: `["data", "image", "crop"]` for `crate::data::image::crop::…`, and
/// for `super::crop::…` in a file of `data/image`.
fn paths(file: &Path, root: &Path) -> Vec<Vec<String>> {
    let text = without_tests(file);
    let own = module_path(file, root);
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for start in ["crate::", "super::"] {
            for (at, _) in line.match_indices(start) {
                let before = &line[..at];
                if start == "super::" && before.ends_with("super::") {
                    continue;
                }
                let mut base = own.clone();
                let mut rest = &line[at..];
                while let Some(after) = rest.strip_prefix("super::") {
                    base.pop();
                    rest = after;
                }
                if let Some(after) = rest.strip_prefix("crate::") {
                    (base, rest) = (Vec::new(), after);
                }
                let heads: Vec<&str> = match rest.strip_prefix('{') {
                    Some(list) => list.split('}').next().unwrap().split(',').map(str::trim).collect(),
                    None => vec![rest],
                };
                let is_module = |word: &&str| word.chars().next().is_some_and(|c| c.is_ascii_lowercase());
                for head in heads {
                    let words =
                        head.split("::").map(|word| word.split(|c: char| !c.is_alphanumeric() && c != '_').next());
                    let words: Vec<&str> = words.map_while(|word| word.filter(|word| is_module(word))).collect();
                    found.push(base.iter().cloned().chain(words.iter().map(|word| word.to_string())).collect());
                }
            }
        }
    }
    found
}

/// `["data", "image", "crop"]` for `src/data/image/crop.rs`, `["data", "image"]` for `src/data/image/mod.rs`.
fn module_path(file: &Path, root: &Path) -> Vec<String> {
    let path = file.strip_prefix(root).unwrap().with_extension("");
    let words = path.components().map(|word| word.as_os_str().to_string_lossy().into_owned());
    words.filter(|word| word != "mod").collect()
}

/// A circle in a graph of imports; none if there is none.
fn circle(graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn walk<'a>(
        graph: &'a BTreeMap<String, BTreeSet<String>>,
        node: &'a str,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> Option<Vec<String>> {
        if let Some(start) = path.iter().position(|seen| *seen == node) {
            return Some(path[start..].iter().map(|word| word.to_string()).collect());
        }
        if !done.contains(node) {
            path.push(node);
            for next in graph.get(node).into_iter().flatten() {
                if let Some(found) = walk(graph, next, path, done) {
                    return Some(found);
                }
            }
            path.pop();
            done.insert(node);
        }
        None
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|node| walk(graph, node, &mut Vec::new(), &mut done))
}

#[test]
fn no_rooms_import_each_other_in_a_circle_nor_do_subjects_of_one_room() {
    let known = BTreeMap::from([("a", "b"), ("b", "c"), ("c", "b")]);
    let graph = known.iter().map(|(from, to)| (from.to_string(), BTreeSet::from([to.to_string()]))).collect();
    assert_eq!(circle(&graph), Some(vec!["b".to_string(), "c".to_string()]));

    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    let files: Vec<&PathBuf> =
        files.iter().filter(|p| p.extension().is_some_and(|e| e == "rs") && !p.ends_with("lib.rs")).collect();
    let modules: BTreeSet<Vec<String>> = files.iter().map(|file| module_path(file, &root)).collect();
    // Each folder is checked on its own. Its files and folders are the nodes of its graph, except its mod.rs, which all of them may use.
    let folders: BTreeSet<Vec<String>> = modules.iter().map(|module| module[..module.len() - 1].to_vec()).collect();
    let mut edges = 0;
    for folder in folders {
        let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let inside = |path: &[String]| path.len() > folder.len() && path.starts_with(&folder);
        for file in &files {
            let own = module_path(file, &root);
            for path in paths(file, &root) {
                let is_subject = inside(&path) && modules.contains(&path[..=folder.len()]);
                if inside(&own) && is_subject && own[folder.len()] != path[folder.len()] {
                    edges += 1;
                    graph.entry(own[folder.len()].clone()).or_default().insert(path[folder.len()].clone());
                }
            }
        }
        let found = circle(&graph);
        assert!(found.is_none(), "a circle in src/{}: {}", folder.join("/"), found.unwrap().join(" → "));
    }
    assert!(edges > 300, "too few imports were found: {edges}");
}

#[test]
fn no_source_file_is_longer_than_four_hundred_lines() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&root).iter().filter(|path| path.extension().is_some_and(|end| end == "rs")) {
        let lines = std::fs::read_to_string(path).unwrap().lines().count();
        assert!(lines <= 400, "{}: {lines} lines; split it by its subjects", path.display());
    }
}
