//! The page: one HTML file that needs no network and no script.

use super::course::{METHODS, Method};
use super::downstream::{SECTIONS, Section};
use super::figures::{self, Figure, MOST_CURVES};
use super::gather::Run;
use super::groups::Setting;
use super::table::Table;
use super::{tables, words};
use crate::svg::chart::Colour;
use maud::{DOCTYPE, Markup, PreEscaped, html};

const STYLE: &str = include_str!("page.css");

/// A report: the page, and its figures and tables, which can also be written as files.
pub struct Page {
    pub html: String,
    pub figures: Vec<Figure>,
    pub tables: Vec<Table>,
    /// The first sentences.
    pub lead: Vec<String>,
}

/// The content of the page.
struct Content<'a> {
    runs: &'a [Run],
    settings: &'a [Setting],
    lead: Vec<String>,
    efficiency: Vec<Vec<Figure>>,
    curves: Vec<Figure>,
    times: Vec<Figure>,
}

/// Makes the page of the runs.
pub fn page(runs: &[Run], settings: &[Setting], title: &str) -> Page {
    let efficiency = settings.iter().enumerate().map(|(number, s)| figures::efficiency(runs, s, number)).collect();
    let lead = words::lead(runs, settings);
    let (curves, times) = (figures::curves(runs), figures::times(runs));
    let content = Content { runs, settings, lead, efficiency, curves, times };
    let (html, tables) = content.html(title);
    let figures = content.efficiency.into_iter().flatten().chain(content.curves).chain(content.times).collect();
    Page { html, figures, tables, lead: content.lead }
}

impl Content<'_> {
    fn html(&self, title: &str) -> (String, Vec<Table>) {
        let mut shown = Vec::new();
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { (title) }
                    style { (PreEscaped(STYLE)) (PreEscaped(dark())) }
                }
                body { main {
                    h1 { (title) }
                    div.lead { @for sentence in &self.lead { p { (sentence) } } }
                    (self.missing())
                    (self.accuracy(&mut shown))
                    (self.models(&mut shown))
                    @for section in &SECTIONS { (self.downstream(section, &mut shown)) }
                    (self.preview(&mut shown))
                    (self.learning())
                    (self.time(&mut shown))
                    (self.memory(&mut shown))
                    (self.configs(&mut shown))
                    (self.machines(&mut shown))
                    footer { (self.origin()) }
                } }
            }
        };
        (page.into_string(), shown)
    }

    /// A list of the data that the report lacks, and of the numbers of skipped images. Nothing if the list is empty.
    fn missing(&self) -> Markup {
        let of_run = |run: &Run| -> Vec<String> {
            let name = if self.runs.len() > 1 { format!("{}: ", run.name) } else { String::new() };
            let skipped = (run.unreadable > 0)
                .then(|| format!("{} image(s) could not be read and were skipped; the log names them", run.unreadable));
            run.missing.iter().cloned().chain(skipped).map(|text| format!("{name}{text}.")).collect()
        };
        let all: Vec<String> = self.runs.iter().flat_map(of_run).collect();
        html! {
            @if !all.is_empty() {
                div.missing { p { "What this report lacks" } ul { @for text in &all { li { (text) } } } }
            }
        }
    }

    fn accuracy(&self, shown: &mut Vec<Table>) -> Markup {
        let metric = self.runs[0].task().headline();
        let comparison = tables::verdicts(metric, self.settings);
        let groups = tables::groups(metric, self.runs, self.settings);
        let has_pictures = self.efficiency.iter().any(|all| !all.is_empty());
        html! {
            h2 { (figures::capital(metric.name)) " against cost" }
            @if !has_pictures {
                p.note { "There is no picture yet: at most one model was evaluated." }
            }
            @for (setting, pictures) in self.settings.iter().zip(&self.efficiency) {
                @if !setting.name.is_empty() { h3 { (figures::capital(&setting.name)) } }
                (gallery(pictures))
            }
            @if has_pictures {
                p.note {
                    "Each point is the network at a cost: all that was computed for it up to then, with all restarts. Deep Incubation begins "
                    "where its modules are assembled, after the meta model and all modules are paid for. The meta model is a smaller network."
                    @if self.runs.len() > 1 { " Lines join the models of a method's Pareto front; bars are one standard deviation over seeds." }
                }
            }
            @if !comparison.rows.is_empty() {
                (table(&comparison, |_| ""))
                @if let Some(note) = words::note_on_multiples(metric, self.settings) { p.note { (note) } }
            }
            @if self.runs.len() > 1 && !groups.rows.is_empty() {
                h3 { "Finished models, averaged over seeds" }
                (table(&groups, |row| row_class(METHODS.into_iter().find(|method| row.iter().any(|cell| cell.shown == method.name())))))
            }
            @if !comparison.rows.is_empty() { (keep(shown, comparison)) }
            @if self.runs.len() > 1 && !groups.rows.is_empty() { (keep(shown, groups)) }
        }
    }

    fn models(&self, shown: &mut Vec<Table>) -> Markup {
        let models = tables::models(self.runs);
        let parts: Vec<_> = self
            .runs
            .iter()
            .flat_map(|run| run.shown(self.runs.len() == 1))
            .map(|part| format!("{}{}", row_class(Some(part.method())), if part.is_target() { " result" } else { "" }))
            .collect();
        let mut classes = parts.iter();
        let drawn = table(&models, |_| classes.next().map_or("", String::as_str));
        html! {
            h2 { "Models" }
            @if self.runs.len() > 4 { details { summary { (models.rows.len()) " models of " (self.runs.len()) " runs" } (drawn) } }
            @else { (drawn) }
            p.note {
                "Images, FLOPs, time and device-hours are what was really computed, over all starts. A device is a GPU, or the cores of a "
                "replica. A hybrid is the meta model with one module in place."
            }
            (keep(shown, models))
        }
    }

    fn preview(&self, shown: &mut Vec<Table>) -> Markup {
        let note = html! {
            "What the modules have learnt so far, from the newest " code { "incubate status --preview" } ". Each module is in the meta "
            "model; a module far behind the others holds the assembled network back."
        };
        self.section("Preview of the assembly", tables::previews(self.runs), Some(note), shown)
    }

    /// The models of a downstream task, with pictures if there is only one run.
    fn downstream(&self, section: &Section, shown: &mut Vec<Table>) -> Markup {
        let (models, classes) = (tables::downstream(self.runs, section), tables::classes(self.runs, section));
        let own = |run: &Run| {
            let own = run.downstream.iter().filter(|one| one.kind == section.kind);
            own.flat_map(|one| one.pictures.clone()).collect::<Vec<_>>()
        };
        let pictures = if let [run] = self.runs { own(run) } else { Vec::new() };
        html! {
            @if !models.rows.is_empty() {
                h2 { (section.title) }
                (table(&models, |_| ""))
                @if !classes.rows.is_empty() { details { summary { "The figures of each class" } (table(&classes, |_| "")) } }
                @if !pictures.is_empty() {
                    div.figures { @for address in &pictures { figure { img src=(address) alt="predictions and annotations" style="max-width:100%"; } } }
                    p.note { (section.pictures) }
                }
                (keep(shown, models))
                @if !classes.rows.is_empty() { (keep(shown, classes)) }
            }
        }
    }

    fn learning(&self) -> Markup {
        html! {
            @if !self.curves.is_empty() { h2 { "Learning curves" } (gallery(&self.curves)) }
            @else if self.runs.len() > MOST_CURVES {
                h2 { "Learning curves" }
                p.note { "Of so many runs they are not drawn here; each run's own report has them." }
            }
        }
    }

    fn time(&self, shown: &mut Vec<Table>) -> Markup {
        let times = tables::times(self.runs);
        html! {
            @if !times.rows.is_empty() {
                h2 { "Where the time went" }
                (gallery(&self.times))
                (folded(&times, self.runs.len()))
                p.note {
                    "Seconds of each phase over all its starts, as the first replica spent them; phases of different modules may have run at "
                    "the same time. GPUs sum gradients (all-reduce) while they compute, so there both count as computing. The time of steps "
                    "done again is estimated from their number."
                }
                (keep(shown, times))
            }
        }
    }

    fn memory(&self, shown: &mut Vec<Table>) -> Markup {
        let note = html! {
            "The estimate is that of " code { "incubate plan" } " for the micro-batch that was used. The host's peak is the resident memory of "
            "the first rank's process, the GPU's peak the memory in use on its first GPU."
        };
        self.section("Memory", tables::memories(self.runs), Some(note), shown)
    }

    fn configs(&self, shown: &mut Vec<Table>) -> Markup {
        if let [run] = self.runs {
            let own = tables::settings_of(run);
            return html! {
                h2 { "Config" }
                details { summary { (own.rows.len()) " keys differ from the defaults" } (table(&own, |_| "")) }
                details { summary { "The whole config" } pre { (run.plan.config.to_toml()) } }
                (keep(shown, own))
            };
        }
        let differences = tables::differences(self.runs);
        html! {
            h2 { "What differs between the configs" }
            @if differences.rows.is_empty() { p { "Nothing but the names and the run directories." } }
            @else { (table(&differences, |_| "")) (keep(shown, differences)) }
        }
    }

    fn machines(&self, shown: &mut Vec<Table>) -> Markup {
        self.section("Software and hardware", tables::machines(self.runs), None, shown)
    }

    /// A heading, a table, and the note if there is a note. Nothing if the table is empty.
    fn section(&self, title: &str, table: Table, note: Option<Markup>, shown: &mut Vec<Table>) -> Markup {
        html! {
            @if !table.rows.is_empty() {
                h2 { (title) }
                (folded(&table, self.runs.len()))
                @if let Some(note) = note { p.note { (note) } }
                (keep(shown, table))
            }
        }
    }

    fn origin(&self) -> String {
        let now = jiff::Timestamp::now().strftime("%F %H:%M UTC");
        let folders: Vec<String> = self.runs.iter().map(|run| run.dir.path.display().to_string()).collect();
        let from = if folders.len() > 4 { format!("{} run directories", folders.len()) } else { folders.join(", ") };
        format!("Written by incubate {} at {now} from {from}.", env!("CARGO_PKG_VERSION"))
    }
}

fn row_class(method: Option<Method>) -> &'static str {
    match method {
        Some(Method::Incubation) => "incubation",
        Some(Method::E2e) => "e2e",
        _ => "other",
    }
}

/// Adds a table to the tables that become files. Adds nothing to the page.
fn keep(shown: &mut Vec<Table>, table: Table) -> Markup {
    shown.push(table);
    html! {}
}

fn gallery(figures: &[Figure]) -> Markup {
    html! {
        @if !figures.is_empty() {
            div.figures.one[figures.len() == 1] { @for figure in figures { figure { (PreEscaped(&figure.svg)) } } }
        }
    }
}

/// A table. If there are more than two runs, the table is folded until the reader opens it.
fn folded(data: &Table, runs: usize) -> Markup {
    let drawn = table(data, |_| "");
    if runs > 2 {
        html! { details { summary { (data.rows.len()) " rows" } (drawn) } }
    } else {
        drawn
    }
}

/// If a cell's text has more characters, the page may break it into lines.
const LONG: usize = 40;

/// A table whose rows have the CSS classes that `class` gives them.
fn table<'a>(table: &'a Table, mut class: impl FnMut(&'a [super::table::Cell]) -> &'a str) -> Markup {
    let numeric: Vec<bool> = (0..table.head.len()).map(|column| table.is_numeric(column)).collect();
    let kind = |column: usize, text: &str| match (numeric[column], text.chars().count() > LONG) {
        (true, _) => Some("n"),
        (false, true) => Some("wrap"),
        (false, false) => None,
    };
    html! {
        div.scroll { table {
            thead { tr { @for (column, title) in table.head.iter().enumerate() { th class=[kind(column, "")] { (title) } } } }
            tbody {
                @for row in &table.rows {
                    @let name = class(row);
                    tr class=[(!name.is_empty()).then_some(name)] {
                        @for (column, cell) in row.iter().enumerate() {
                            td class=[kind(column, &cell.shown)] {
                                (cell.shown)
                                @if let Some(share) = cell.meter { span.meter { i style=(format!("width:{:.1}%", 100.0 * share)) {} } }
                            }
                        }
                    }
                }
            }
        } }
    }
}

/// The CSS rules that replace the colours of the pictures on a dark page. A rule of a style sheet overrides the attribute of an SVG
/// element.
fn dark() -> String {
    let replaced = [
        (Colour::Incubation, "var(--incubation)"),
        (Colour::EndToEnd, "var(--e2e)"),
        (Colour::Neutral, "var(--neutral)"),
        (Colour::Ink, "var(--ink)"),
        (Colour::Faint, "var(--soft)"),
        (Colour::Grid, "var(--rule)"),
        (Colour::Of(0), "#4aa3e0"),
        (Colour::Of(1), "#f28a3c"),
        (Colour::Of(2), "#35c79a"),
        (Colour::Of(3), "#dd8fbd"),
        (Colour::Of(4), "#cbb04a"),
        (Colour::Of(5), "#8fcdf0"),
    ];
    let rule = |(colour, value): (Colour, &str)| {
        let hex = colour.hex();
        format!("svg [fill=\"{hex}\"]{{fill:{value}}}svg [stroke=\"{hex}\"]{{stroke:{value}}}")
    };
    format!("@media (prefers-color-scheme: dark){{{}}}", replaced.map(rule).concat())
}
