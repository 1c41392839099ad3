//! Parts of reports that `run` and `fleet` share.

use std::collections::BTreeMap;

use kvm_ops_machine::{End, RunReport, VcpuReport};
use serde::Serialize;

use crate::disassembly::{self, Place};

/// The part of a console that is kept for a report, in bytes.
pub(crate) const CONSOLE_LIMIT: usize = 64 << 10;

/// A guest's console output.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Console {
    /// The number of bytes.
    bytes: u64,
    /// The last line that is not empty.
    pub(crate) last_line: String,
    /// The first 64 KiB.
    pub(crate) text: String,
}

impl Console {
    /// The console of a guest that printed so many bytes, which begin with `text`.
    pub(crate) fn new(bytes: u64, text: String) -> Self {
        let last_line = text.lines().map(str::trim).rfind(|line| !line.is_empty());
        Self {
            bytes,
            last_line: last_line.map(printable).unwrap_or_default(),
            text,
        }
    }
}

/// Replaces control characters: guest output must not control the terminal.
fn printable(line: &str) -> String {
    line.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// The report of one vCPU.
#[derive(Debug, Serialize)]
pub(crate) struct Vcpu {
    id: u32,
    exits: u64,
    end: String,
    /// Where it stands; `None` if it runs no machine code, or that is the guest's secret.
    position: Option<Place>,
}

impl Vcpu {
    /// The reports of all vCPUs.
    pub(crate) fn of(run: &RunReport) -> Vec<Self> {
        let one = |vcpu: &VcpuReport| Self {
            id: vcpu.id.0,
            exits: vcpu.exits.total(),
            end: vcpu.end.to_string(),
            position: match &vcpu.position {
                Some(Ok(position)) => Some(Place::new(position)),
                _ => None,
            },
        };
        run.vcpus.iter().map(one).collect()
    }
}

/// The exits of all vCPUs, by kind.
pub(crate) fn exits_by_kind(run: &RunReport) -> BTreeMap<&'static str, u64> {
    let exits = run.exits();
    exits.iter().map(|(kind, n)| (kind.name(), n)).collect()
}

/// A line for each vCPU that failed, or that a limit stopped: where it stands. At most eight, because
/// the others are mostly in the same loop.
pub(crate) fn positions(run: &RunReport) -> Vec<String> {
    let unfinished = |end: &End| end.is_failure() || matches!(end, End::Deadline | End::ExitLimit);
    run.vcpus
        .iter()
        .filter(|vcpu| unfinished(&vcpu.end))
        .filter_map(|vcpu| Some((vcpu.id, vcpu.position.as_ref()?)))
        .map(|(id, position)| format!("vCPU {id}{}", disassembly::line(position)))
        .take(8)
        .collect()
}

/// The end of a run in a word or two.
pub(crate) fn outcome(end: &End) -> &'static str {
    match end {
        End::Halted => "halted",
        End::Shutdown => "shut down",
        End::TripleFault => "triple fault",
        End::Reset => "reset",
        End::PowerOff => "switched off",
        End::DebugExit(_) => "debug exit",
        End::Deadline => "timed out",
        End::Stopped => "stopped",
        End::Handler => "text seen",
        End::Left => "left",
        end if end.is_failure() => "crashed",
        _ => "ended",
    }
}
