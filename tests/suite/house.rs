//! The floors: a file imports only from lower floors, and rooms on one floor do not see each other.

use std::path::{Path, PathBuf};

/// Floor and room of a module.
fn place(module: &str) -> (u32, &str) {
    let floor = match module {
        "main" | "cli" => 6,
        "pipeline" | "export" | "import" | "downstream" | "cluster" | "bench" | "pack" => 5,
        "train" => 4,
        "task" => 3,
        "data" | "model" | "collective" | "device" | "store" => 2,
        "plan" | "driver" | "launcher" | "libtorch" | "random" | "run" | "seal" | "svg" | "weights" => 1,
        "bounds" | "config" | "error" | "family" => 0,
        other => panic!("which floor is {other} on? Say it here and in the documentation of lib.rs"),
    };
    (floor, module)
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
            // A macro in passing.
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
        let (floor, _) = place(&own);
        let text = std::fs::read_to_string(path).unwrap();
        for used in imports(&text).iter().filter(|used| **used != own) {
            let (below, _) = place(used);
            // Floors 0 and 1 hold several words each that may use one another.
            let same_base = floor == below && floor <= 1;
            assert!(below < floor || same_base, "{}: imports crate::{used}", path.display());
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
        ("clap::", &["cli/args.rs", "cli/bench.rs", "cli/mod.rs", "main.rs"]),
        ("hotcoco::", &["downstream/coco.rs"]),
        ("indicatif::", &["pipeline/bars.rs"]),
    ] {
        for path in sources(&root) {
            let inside = std::fs::read_to_string(&path).unwrap().contains(needle);
            assert!(!inside || rooms.iter().any(|room| path.ends_with(room)), "{needle} in {}", path.display());
        }
    }
}
