//! Reports: the table at the end of a run (`summary`), and a page about one run or several. The page shows how the accuracy grows
//! with the cost for each method, and the facts that a reader needs to judge this.
//!
//! `gather` reads run directories. `course` and `groups` compute the comparisons. `words`, `tables` and `figures` present them, and
//! `page` joins everything into one page.

mod course;
mod downstream;
mod figures;
mod gather;
mod groups;
mod page;
pub mod summary;
mod table;
mod tables;
mod time;
mod words;

use crate::store::{ArtefactCache, durable};
use crate::{require, svg, usage};
use anyhow::Result;
use page::Page;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The name of the page in the run directory of a concluded run. Its existence shows that the run is concluded.
const CONCLUDED: &str = "report.html";
/// The name of the page in the run directory of a run that is not concluded.
const SO_FAR: &str = "report-so-far.html";

/// The files that were written.
#[derive(Debug, Serialize)]
pub struct Written {
    pub page: PathBuf,
    /// The first sentences of the page.
    pub summary: Vec<String>,
    /// The files of the figures and tables.
    pub files: Vec<PathBuf>,
}

/// Concludes a run: writes its page into its run directory. `artefacts` caches the headers of artefacts.
pub fn conclude(run: &Path, artefacts: &mut ArtefactCache) -> Result<PathBuf> {
    let page = make(&[run.into()], None, artefacts)?;
    let file = run.join(CONCLUDED);
    durable::replace_bytes(&file, page.html.as_bytes())?;
    Ok(file)
}

/// Writes a page about runs to `out`. `paths` are run directories or folders of run directories. If there is only one path, the
/// default for `out` is a file in the folder of this path. If the folder `figures` is given, each picture is also written into it
/// as SVG and PNG, and each table as CSV.
///
/// # Errors
/// A usage error if a path is no run directory, if there are several paths without `out`, or if the runs have different headline
/// metrics. A usage error also if `out` would falsely mark a run as concluded.
pub fn write(paths: &[PathBuf], out: Option<&Path>, figures: Option<&Path>) -> Result<Written> {
    let mut runs = Vec::new();
    for path in paths {
        runs.extend(gather::run_dirs(path)?);
    }
    let folder = match paths {
        [folder] => Some(folder.as_path()),
        _ => None,
    };
    let out = match (out, folder) {
        (Some(out), _) => out.to_path_buf(),
        (None, Some(folder)) => folder.join(default_name(folder)),
        (None, None) => return Err(usage!("several run directories: say where to write their page, --out FILE")),
    };
    let owner = out.parent().unwrap_or(Path::new(""));
    let marks_end = out.file_name().is_some_and(|name| name == CONCLUDED) && default_name(owner) == SO_FAR;
    require!(
        !marks_end,
        "{}: a run writes this file at its end, and `submit` takes it as the sign of that; choose another --out",
        out.display()
    );
    let page = make(&runs, folder.filter(|folder| runs[0] != *folder), &mut ArtefactCache::default())?;
    let cannot = |error: anyhow::Error| usage!("{error:#}; the folder must exist and be writable");
    durable::replace_bytes(&out, page.html.as_bytes()).map_err(cannot)?;
    let files = figures.map_or(Ok(Vec::new()), |folder| write_files(&page, folder))?;
    Ok(Written { page: out, summary: page.lead, files })
}

/// The name of a page in this folder: [`SO_FAR`] in the run directory of a run that is not concluded, else [`CONCLUDED`].
fn default_name(folder: &Path) -> &'static str {
    let is_run = folder.join("config.toml").exists();
    if is_run && !folder.join(CONCLUDED).exists() { SO_FAR } else { CONCLUDED }
}

/// Makes the page about run directories. If all are from one folder, `study` is this folder, which gives the page its title.
fn make(run_dirs: &[PathBuf], study: Option<&Path>, artefacts: &mut ArtefactCache) -> Result<Page> {
    let runs = gather::runs(run_dirs, artefacts)?;
    let first = runs[0].task();
    let other = runs.iter().find(|run| run.task().headline() != first.headline());
    if let Some(other) = other {
        return Err(usage!(
            "{}: {} is measured there, but {} in {}; report on runs of one kind",
            other.dir.path.display(),
            other.task().headline().name,
            first.headline().name,
            runs[0].dir.path.display()
        ));
    }
    let settings = groups::settings(&runs);
    let title = match (study.and_then(Path::file_name), runs.as_slice()) {
        (Some(name), _) => name.to_string_lossy().into_owned(),
        (None, [run]) => run.name.clone(),
        (None, several) if several.len() > 4 => format!("{} runs", several.len()),
        (None, several) => several.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(", "),
    };
    Ok(page::page(&runs, &settings, &title))
}

/// Writes each picture as SVG and PNG, and each table as CSV.
fn write_files(page: &Page, folder: &Path) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).map_err(|e| usage!("{}: {e}; give a folder to write into", folder.display()))?;
    let mut files = Vec::new();
    let mut write = |name: String, bytes: &[u8]| -> Result<()> {
        let file = folder.join(name);
        durable::replace_bytes(&file, bytes)?;
        files.push(file);
        Ok(())
    };
    for figure in &page.figures {
        write(format!("{}.svg", figure.slug), figure.svg.as_bytes())?;
        write(format!("{}.png", figure.slug), &svg::png(&figure.svg))?;
    }
    for table in &page.tables {
        write(format!("{}.csv", table.slug), &table.csv())?;
    }
    Ok(files)
}
