//! Problems of a fleet file, shown on its lines.

use std::cell::RefCell;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use crate::exit_code::Code;
use crate::failure::Failure;
use crate::term;

use super::source::Source;

/// A value and its place in the file.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    /// Its bytes in the file.
    pub(crate) span: Range<usize>,
}

/// One problem.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    title: String,
    span: Option<Range<usize>>,
    label: String,
    other: Option<(Range<usize>, String)>,
    notes: Vec<String>,
    hint: Option<String>,
    code: Code,
}

impl Problem {
    /// Creates a problem of the file as a whole.
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            span: None,
            label: String::new(),
            other: None,
            notes: Vec::new(),
            hint: None,
            code: Code::Usage,
        }
    }

    /// Sets the exit code of a problem that is not the file's.
    pub(crate) fn code(mut self, code: Code) -> Self {
        self.code = code;
        self
    }

    /// Sets the place of the problem, with a label that explains it.
    pub(crate) fn at(mut self, span: &Range<usize>, label: impl Into<String>) -> Self {
        self.span = Some(span.clone());
        self.label = label.into();
        self
    }

    /// Adds a second place that is involved.
    pub(crate) fn and(mut self, span: &Range<usize>, label: impl Into<String>) -> Self {
        self.other = Some((span.clone(), label.into()));
        self
    }

    /// Adds a note that explains the problem.
    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Adds a [`note`](Self::note) if `so` is true.
    pub(crate) fn note_if(self, so: bool, note: impl FnOnce() -> String) -> Self {
        if so { self.note(note()) } else { self }
    }

    /// Adds advice for the user.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn show<'a>(&'a self, source: &'a Source) -> Group<'a> {
        let title = Level::ERROR.primary_title(self.title.as_str());
        let mut group = match &self.span {
            Some(span) => {
                let mut snippet = Snippet::source(source.text.as_str())
                    .path(source.name.as_str())
                    .annotation(
                        AnnotationKind::Primary
                            .span(source.clamp(span))
                            .label(self.label.as_str()),
                    );
                if let Some((span, label)) = &self.other {
                    snippet = snippet.annotation(
                        AnnotationKind::Context
                            .span(source.clamp(span))
                            .label(label.as_str()),
                    );
                }
                title.element(snippet)
            }
            None => title.element(Origin::path(source.name.as_str())),
        };
        for note in &self.notes {
            group = group.element(Level::NOTE.with_name("caused by").message(note.as_str()));
        }
        if let Some(hint) = &self.hint {
            group = group.element(Level::HELP.with_name("hint").message(hint.as_str()));
        }
        group
    }
}

/// The problems found so far. Reading goes on after one, so that all are shown at once.
#[derive(Debug, Default)]
pub(crate) struct Problems(RefCell<Vec<Problem>>);

impl Problems {
    /// Adds a problem.
    pub(crate) fn add(&self, problem: Problem) {
        self.0.borrow_mut().push(problem);
    }

    /// Returns `Ok`, or all problems in the order of the file, formatted. The exit code is the first
    /// of the table that one of them has.
    pub(crate) fn check(&self, source: &Source) -> Result<(), Failure> {
        let mut problems = self.0.borrow_mut();
        let Some(code) = problems.iter().map(|problem| problem.code).min() else {
            return Ok(());
        };
        problems.sort_by_key(|problem| problem.span.as_ref().map_or(0, |span| span.start));
        let groups: Vec<_> = problems.iter().map(|p| p.show(source)).collect();
        let renderer = if term::colours_err() {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        let mut text = groups
            .into_iter()
            .map(|group| renderer.render(&[group]).to_string())
            .collect::<Vec<_>>()
            .join("\n\n");
        let errors = match problems.len() {
            1 => "1 error".to_owned(),
            n => format!("{n} errors"),
        };
        text.push_str(&format!("\n\n{errors}; no VM was started"));
        Err(Failure::Shown(text, code))
    }
}

/// `did you mean ...?`, for a name that is close to one of `names`.
pub(crate) fn did_you_mean(name: &str, names: &[&str]) -> Option<String> {
    names
        .iter()
        .map(|known| (strsim::jaro_winkler(name, known), known))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| format!("did you mean `{known}`?"))
}
