//! The expected result of a VM's run, and the check of it.

use kvm_ops_machine::End;

/// The expected end of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum WantedEnd {
    /// Anything but a crash; a timeout is not a crash.
    #[default]
    Any,
    /// HLT with nothing to wake it.
    Halt,
    /// A shutdown or triple fault.
    Shutdown,
    /// A reset.
    Reset,
    /// A write to the debug-exit port.
    DebugExit,
    /// The timeout.
    Timeout,
    /// The expected text on the console, which ends the run.
    Console,
}

impl WantedEnd {
    /// Every end.
    pub(crate) const ALL: [Self; 7] = [
        Self::Any,
        Self::Halt,
        Self::Shutdown,
        Self::Reset,
        Self::DebugExit,
        Self::Timeout,
        Self::Console,
    ];

    /// The name in fleet files.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Halt => "halt",
            Self::Shutdown => "shutdown",
            Self::Reset => "reset",
            Self::DebugExit => "debug-exit",
            Self::Timeout => "timeout",
            Self::Console => "console",
        }
    }

    /// The end of that name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|end| end.name() == name)
    }

    fn fits(self, end: &End) -> bool {
        match self {
            Self::Any => !end.is_failure(),
            Self::Halt => *end == End::Halted,
            Self::Shutdown => matches!(end, End::Shutdown | End::TripleFault),
            Self::Reset => *end == End::Reset,
            Self::DebugExit => matches!(end, End::DebugExit(_)),
            Self::Timeout => *end == End::Deadline,
            Self::Console => *end == End::Handler,
        }
    }
}

/// The expected result of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expect {
    /// The expected end.
    pub(crate) end: WantedEnd,
    /// A text that the console must contain.
    pub(crate) console: Option<String>,
    /// The value that the guest must report through the result port.
    pub(crate) result: Option<u32>,
}

impl Expect {
    /// The text at which the run ends; empty if it goes on.
    pub(crate) fn ends_at(&self) -> &str {
        match self.end {
            WantedEnd::Console => self.console.as_deref().unwrap_or_default(),
            _ => "",
        }
    }

    /// Returns everything that is not as expected, one sentence each.
    pub(crate) fn check(&self, end: &End, console: &str, result: Option<u32>) -> Vec<String> {
        let mut wrong = Vec::new();
        if !self.end.fits(end) {
            wrong.push(match self.end {
                WantedEnd::Any => end.to_string(),
                wanted => format!("{end}, where {} was expected", wanted.name()),
            });
        }
        if let Some(text) = self
            .console
            .as_deref()
            .filter(|text| !console.contains(text))
        {
            wrong.push(format!("the console does not contain {text:?}"));
        }
        if let Some(wanted) = self.result.filter(|wanted| result != Some(*wanted)) {
            wrong.push(match result {
                Some(result) => format!("result {result:#x}, where {wanted:#x} was expected"),
                None => format!("no result, where {wanted:#x} was expected"),
            });
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ops::ExitKind;

    #[test]
    fn only_the_wanted_end_fits_and_any_fits_all_but_crashes() {
        let ends = [
            (End::Halted, Some(WantedEnd::Halt)),
            (End::Shutdown, Some(WantedEnd::Shutdown)),
            (End::TripleFault, Some(WantedEnd::Shutdown)),
            (End::Reset, Some(WantedEnd::Reset)),
            (End::DebugExit(3), Some(WantedEnd::DebugExit)),
            (End::Deadline, Some(WantedEnd::Timeout)),
            (End::Handler, Some(WantedEnd::Console)),
            (End::Unhandled(ExitKind::Unknown), None),
            (End::FailEntry(1), None),
        ];
        for (end, name) in ends {
            for wanted in WantedEnd::ALL {
                let expect = Expect {
                    end: wanted,
                    ..Expect::default()
                };
                let fits = match wanted {
                    WantedEnd::Any => !end.is_failure(),
                    wanted => name == Some(wanted),
                };
                assert_eq!(
                    expect.check(&end, "", None).is_empty(),
                    fits,
                    "{wanted:?} {end:?}"
                );
            }
        }
    }

    #[test]
    fn each_thing_that_is_wrong_is_told() {
        let expect = Expect {
            end: WantedEnd::Halt,
            console: Some("hello".into()),
            result: Some(7),
        };
        assert_eq!(
            expect.check(&End::Halted, "oh hello", Some(7)),
            Vec::<String>::new()
        );
        assert_eq!(expect.check(&End::Deadline, "hell", Some(8)).len(), 3);
        assert_eq!(expect.check(&End::Halted, "hello", None).len(), 1);
    }
}
