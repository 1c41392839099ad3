//! The error that the user sees: the failed action, its cause, and hints.

use std::error::Error;
use std::fmt;
use std::io;

use kvm_ops_machine::MachineError;

use crate::exit_code::Code;
use crate::term::{self, BOLD, ERROR, HINT};

/// The reason why a command gave up.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An error with its causes and hints.
    Said {
        /// The action that failed.
        what: String,
        /// The underlying error.
        cause: Option<Box<dyn Error + Send + Sync>>,
        /// Advice for the user.
        hints: Vec<String>,
        /// The exit code.
        code: Code,
    },
    /// Preformatted text: the problems of a fleet file, with its lines.
    Shown(String, Code),
    /// The reader of standard output is gone.
    BrokenPipe,
}

/// The result of a command.
pub(crate) type Outcome<T = Code> = Result<T, Failure>;

impl Failure {
    /// Creates a refusal by the host or the system.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self::Said {
            what: what.into(),
            cause: None,
            hints: Vec::new(),
            code: Code::Host,
        }
    }

    /// Creates a refusal caused by `error`.
    pub(crate) fn because(
        what: impl Into<String>,
        error: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        let mut failure = Self::new(what);
        if let Self::Said { cause, .. } = &mut failure {
            *cause = Some(error.into());
        }
        failure
    }

    /// Creates a refusal caused by an error of the machine library, with its hint and the code that
    /// such a mistake has.
    pub(crate) fn of_machine(what: impl Into<String>, error: MachineError) -> Self {
        let (hint, code) = (error.hint(), code_of(&error));
        let failure = Self::because(what, error).code(code);
        hint.into_iter().fold(failure, Self::hint)
    }

    /// Adds a hint, unless the causes say the same.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        let (hint, said) = (hint.into(), self.in_a_line());
        if let Self::Said { hints, .. } = &mut self
            && !said.contains(&hint)
        {
            hints.push(hint);
        }
        self
    }

    /// Sets the exit code.
    pub(crate) fn code(mut self, new: Code) -> Self {
        if let Self::Said { code, .. } | Self::Shown(_, code) = &mut self {
            *code = new;
        }
        self
    }

    /// The action and its causes in one line without colours, for use inside another message.
    pub(crate) fn in_a_line(&self) -> String {
        let Self::Said { what, cause, .. } = self else {
            return String::new();
        };
        let mut line = what.clone();
        for cause in causes(cause.as_deref()) {
            line.push_str(&format!(": {cause}"));
        }
        line
    }

    /// The first hint.
    pub(crate) fn first_hint(&self) -> Option<String> {
        match self {
            Self::Said { hints, .. } => hints.first().cloned(),
            Self::Shown(..) | Self::BrokenPipe => None,
        }
    }

    /// Writes the failure to standard error and returns its exit code.
    pub(crate) fn report(&self) -> Code {
        match self {
            Self::Said { code, .. } => {
                term::complain(self);
                *code
            }
            Self::Shown(text, code) => {
                term::complain(text);
                *code
            }
            Self::BrokenPipe => Code::Fine,
        }
    }
}

/// The exit code of an error of the machine library.
pub(crate) fn code_of(error: &MachineError) -> Code {
    match error {
        MachineError::Read { .. }
        | MachineError::NotAFile { .. }
        | MachineError::FileTooLarge { .. }
        | MachineError::EmptyImage { .. }
        | MachineError::BlankImage { .. }
        | MachineError::NotAnImage { .. }
        | MachineError::BadHeader { .. }
        | MachineError::BadImage { .. }
        | MachineError::Disk { .. }
        | MachineError::DiskSize { .. }
        | MachineError::Overlap { .. } => Code::Input,
        // Linked where no machine has RAM, whatever the options.
        MachineError::ImageTooLarge { at, .. } if at.get() >= 0xb000_0000 => Code::Input,
        // The image does not go with the options.
        MachineError::ImageTooLarge { .. }
        | MachineError::EntryOutside { .. }
        | MachineError::EntryAboveRealMode { .. }
        | MachineError::InitrdTooLarge { .. }
        | MachineError::CmdlineTooLong { .. }
        | MachineError::Cmdline { .. }
        | MachineError::OptionNotUsed { .. }
        | MachineError::MemorySize { .. }
        | MachineError::Slots { .. }
        | MachineError::TooManyPrograms { .. } => Code::Usage,
        _ => Code::Host,
    }
}

/// The texts of an error and its causes, without those that the one before says already.
fn causes(error: Option<&(dyn Error + Send + Sync + 'static)>) -> Vec<String> {
    let mut texts: Vec<String> = Vec::new();
    let mut next = error.map(|error| error as &(dyn Error + 'static));
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.last().is_some_and(|last| last.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    texts
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Said {
            what, cause, hints, ..
        } = self
        else {
            return Ok(());
        };
        write!(f, "{ERROR}error{ERROR:#}{BOLD}: {what}{BOLD:#}")?;
        for cause in causes(cause.as_deref()) {
            write!(f, "\n  caused by: {cause}")?;
        }
        for hint in hints {
            write!(f, "\n{HINT}hint{HINT:#}: {hint}")?;
        }
        Ok(())
    }
}

/// Errors of standard output. Errors of files that a command reads are converted with the file's
/// name.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::BrokenPipe
        } else {
            Self::because("cannot write to standard output", error)
        }
    }
}
