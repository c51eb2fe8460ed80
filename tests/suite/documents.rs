//! Checks README.md, CONTRIBUTING.md and the pages of docs/. The program must accept their command lines and configs. The config
//! keys that they name and the targets of their links must exist.

use clap::{CommandFactory, Parser};
use incubate::cli::Cli;
use incubate::config::{Config, DEFAULTS, PHASE_TABLES};
use std::path::{Path, PathBuf};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every page with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let listed = std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages = listed.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let heads = ["README.md", "CONTRIBUTING.md"].map(|name| root().join(name));
    let paths: Vec<PathBuf> = heads.into_iter().chain(pages).collect();
    assert!(paths.len() > 10);
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap())).collect()
}

/// The fenced blocks in these languages.
pub fn blocks<'a>(text: &'a str, languages: &[&str]) -> Vec<&'a str> {
    let fenced = text.split("```").skip(1).step_by(2);
    let of_language = |block: &&str| languages.contains(&block.lines().next().unwrap_or_default());
    fenced.filter(of_language).map(|block| block.split_once('\n').unwrap().1).collect()
}

/// The texts between single backticks.
fn spans(text: &str) -> Vec<&str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

/// The words of a command line from `incubate` on, without its comment.
fn words(line: &str) -> Option<Vec<&str>> {
    let line = line.split(" #").next().unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let start = words.iter().position(|word| *word == "incubate")?;
    // In command lines of programs other than mpirun, `incubate` may be an argument, such as the name of a package.
    (start == 0 || words[0] == "mpirun").then(|| words[start..].to_vec())
}

/// Whether the words are only `incubate` and the names of nested subcommands, without arguments or options.
fn is_name(words: &[&str]) -> bool {
    let mut command = &Cli::command();
    words[1..].iter().all(|word| {
        let found = command.find_subcommand(word);
        command = found.unwrap_or(command);
        found.is_some()
    })
}

#[test]
fn every_command_line_of_the_pages_is_one_that_the_program_takes() {
    let mut seen = 0;
    for (path, text) in pages() {
        let lines = blocks(&text, &["sh"]).into_iter().flat_map(str::lines).filter_map(words);
        let in_prose = spans(&text).into_iter().filter_map(words).filter(|words| !is_name(words));
        for words in lines.chain(in_prose) {
            // `incubate` alone and lines with the placeholder COMMAND, such as `incubate COMMAND --help`, are not parsed.
            if words.get(1).is_some_and(|word| *word != "COMMAND") {
                let parsed = Cli::try_parse_from(&words);
                assert!(parsed.is_ok(), "{}: {}\n{}", path.display(), words.join(" "), parsed.unwrap_err());
                seen += 1;
            }
        }
    }
    assert!(seen > 50, "{seen} command lines");
}

#[test]
fn every_config_of_the_pages_is_one_that_the_program_takes() {
    let mut seen = 0;
    for (path, text) in pages() {
        for block in blocks(&text, &["toml"]) {
            Config::parse(block, &[]).unwrap_or_else(|error| panic!("{}: {error:#}\n{block}", path.display()));
            seen += 1;
        }
    }
    assert!(seen >= 3, "{seen} configs");
}

#[test]
fn every_config_key_that_the_pages_name_exists() {
    let defaults: toml::Table = DEFAULTS.parse().unwrap();
    let is_word = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let mut seen = 0;
    for (path, text) in pages() {
        for span in spans(&text) {
            let key = span.split([' ', '=']).next().unwrap();
            let Some((table, name)) = key.split_once('.').filter(|(table, name)| is_word(table) && is_word(name))
            else {
                continue;
            };
            if let Some(own) = defaults.get(table) {
                let shared = PHASE_TABLES.contains(&table).then(|| &defaults["train"]);
                let exists = own.get(name).or_else(|| shared?.get(name)).is_some();
                assert!(exists, "{}: `{key}` is not a key of the config", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 20, "{seen} keys");
}

/// The anchor of a heading: the text by which a link refers to the heading.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn every_link_of_the_pages_leads_to_a_file_and_a_heading() {
    let mut seen = 0;
    for (path, text) in pages() {
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if link.starts_with("http") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            assert!(target.exists(), "{}: {link} leads nowhere", path.display());
            if !heading.is_empty() {
                let text = std::fs::read_to_string(&target).unwrap();
                let exists = text.lines().filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading);
                assert!(exists, "{}: {link} names no heading", path.display());
            }
            seen += 1;
        }
    }
    assert!(seen > 50, "{seen} links");
}
