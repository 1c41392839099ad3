//! Observation: counts per leaf and status, and a trace of calls.

use crate::arena::lock;
use crate::guest::{GuestEvent, GuestFlow};
use crate::leaf::{GuestLeaf, HostLeaf};
use crate::platform::Platform;
use crate::regs::Regs;
use crate::status::{Code, Status};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// Host leaf numbers below this have separate counters.
const HOST_LEAVES: usize = 128;
const GUEST_LEAVES: usize = 32;

type Counters = OnceLock<Box<[AtomicU64]>>;

/// Counters of one processor. Only that processor writes them.
#[derive(Debug)]
#[repr(align(128))]
struct LpCounters {
    host: Box<[Counters]>,
    guest: Box<[Counters]>,
    trace: Mutex<VecDeque<TraceEntry>>,
}

fn bump(counters: &Counters, status: Status) {
    let counters =
        counters.get_or_init(|| (0..=Code::ALL.len()).map(|_| AtomicU64::new(0)).collect());
    // The last counter is for statuses a test has forced that are none of the module's.
    let slot = &counters[status.code().index().unwrap_or(Code::ALL.len())];
    // One writer: a load and a store are enough, and cheaper than an atomic addition.
    slot.store(slot.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// Counts and trace of a platform.
#[derive(Debug)]
pub(crate) struct Observer {
    lps: Box<[LpCounters]>,
    depth: usize,
    sequence: AtomicU64,
}

/// Action of a traced processor.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum TraceEvent {
    /// A SEAMCALL: registers in, registers out; `None` if it entered a TD.
    Seamcall {
        /// Before.
        input: Regs,
        /// After.
        output: Option<Regs>,
    },
    /// An event of a guest and its result.
    Guest {
        /// The guest's registers before.
        input: Regs,
        /// The event.
        event: GuestEvent,
        /// The result.
        flow: GuestFlow,
    },
}

/// One line of the trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TraceEntry {
    /// Order among all processors.
    pub sequence: u64,
    /// The processor.
    pub lp: usize,
    /// Its action.
    pub event: TraceEvent,
}

impl fmt::Display for TraceEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>8} lp{:<3} ", self.sequence, self.lp)?;
        match &self.event {
            TraceEvent::Seamcall { input, output } => {
                let name = HostLeaf::from_number(input.rax as u16).map_or("LEAF.?", HostLeaf::name);
                write!(f, "{name} {input:?} -> ")?;
                match output {
                    Some(out) => write!(f, "{} {out:?}", Status(out.rax)),
                    None => f.write_str("entered"),
                }
            }
            TraceEvent::Guest { input, event, flow } => {
                match event {
                    GuestEvent::Tdcall { .. } => {
                        let leaf = GuestLeaf::from_number(input.rax as u16);
                        write!(f, "{} {input:?}", leaf.map_or("LEAF.?", GuestLeaf::name))?;
                    }
                    GuestEvent::Exit(e) => write!(f, "exit {} gpa {:#x}", e.reason, e.gpa)?,
                }
                match flow {
                    GuestFlow::Resume {
                        guest,
                        injected: None,
                        ..
                    } => {
                        write!(f, " -> resume {guest:?}")
                    }
                    GuestFlow::Resume {
                        injected: Some(e), ..
                    } => {
                        write!(f, " -> inject #{}", e.vector)
                    }
                    GuestFlow::Exit { host } => {
                        write!(f, " -> TD exit {} {host:?}", Status(host.rax))
                    }
                }
            }
        }
    }
}

impl Observer {
    pub(crate) fn new(lps: usize, depth: usize) -> Self {
        let counters = |n: usize| (0..n).map(|_| Counters::new()).collect();
        Observer {
            lps: (0..lps)
                .map(|_| LpCounters {
                    host: counters(HOST_LEAVES + 1),
                    guest: counters(GUEST_LEAVES + 1),
                    trace: Mutex::default(),
                })
                .collect(),
            depth,
            sequence: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_tracing(&self) -> bool {
        self.depth != 0
    }

    /// Counts a SEAMCALL, and traces it if its input registers have been kept for that.
    pub(crate) fn record(&self, lp: usize, rax: u64, input: Option<Regs>, output: Option<&Regs>) {
        let Some(this) = self.lps.get(lp) else { return };
        let leaf = usize::from(rax as u16).min(HOST_LEAVES);
        bump(
            &this.host[leaf],
            output.map_or(Status::SUCCESS, |o| Status(o.rax)),
        );
        if let Some(input) = input {
            self.trace(
                this,
                lp,
                TraceEvent::Seamcall {
                    input,
                    output: output.copied(),
                },
            );
        }
    }

    pub(crate) fn record_guest(
        &self,
        lp: usize,
        from_l2: bool,
        input: &Regs,
        event: &GuestEvent,
        flow: &GuestFlow,
    ) {
        let Some(this) = self.lps.get(lp) else { return };
        // TDCALL of an L2 VM that exits to L1 is no call of the module.
        let to_l1 = from_l2 && matches!(flow, GuestFlow::Resume { vm: 0, .. });
        if let (GuestEvent::Tdcall { .. }, false) = (event, to_l1) {
            let leaf = usize::from(input.rax as u16).min(GUEST_LEAVES);
            let status = match flow {
                GuestFlow::Resume {
                    guest,
                    completed: true,
                    vm: 0,
                    ..
                } => Status(guest.rax),
                GuestFlow::Resume { .. } => Status::SUCCESS,
                GuestFlow::Exit { host } => Status(host.rax),
            };
            bump(&this.guest[leaf], status);
        }
        if self.depth != 0 {
            let event = TraceEvent::Guest {
                input: *input,
                event: *event,
                flow: *flow,
            };
            self.trace(this, lp, event);
        }
    }

    fn trace(&self, this: &LpCounters, lp: usize, event: TraceEvent) {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let mut trace = lock(&this.trace);
        if trace.len() == self.depth {
            trace.pop_front();
        }
        trace.push_back(TraceEntry {
            sequence,
            lp,
            event,
        });
    }

    fn sum(
        &self,
        pick: impl Fn(&LpCounters) -> &[Counters],
        name: impl Fn(usize) -> &'static str,
        into: &mut BTreeMap<(&'static str, &'static str), u64>,
    ) {
        for (leaf, counters) in self.lps.iter().flat_map(|lp| pick(lp).iter().enumerate()) {
            for (i, n) in counters
                .get()
                .into_iter()
                .flat_map(|c| c.iter().enumerate())
            {
                let n = n.load(Ordering::Relaxed);
                if n != 0 {
                    let status = Code::ALL.get(i).and_then(|c| c.name()).unwrap_or("OTHER");
                    *into.entry((name(leaf), status)).or_default() += n;
                }
            }
        }
    }
}

/// Calls per leaf and status. Prints as a table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts(pub BTreeMap<(&'static str, &'static str), u64>);

impl Counts {
    /// Calls of a leaf (`"TDH.…"` or `"TDG.…"`) that ended with a status (its name without `TDX_`).
    #[must_use]
    pub fn of(&self, leaf: &str, status: &str) -> u64 {
        self.0
            .iter()
            .filter(|((l, s), _)| *l == leaf && *s == status)
            .map(|(_, n)| n)
            .sum()
    }

    /// All calls.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((leaf, status), n) in &self.0 {
            writeln!(f, "{leaf:<28} {status:<36} {n:>12}")?;
        }
        Ok(())
    }
}

impl Platform {
    /// Calls so far, per leaf and status.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = BTreeMap::new();
        let host = |n: usize| HostLeaf::from_number(n as u16).map_or("TDH.?", HostLeaf::name);
        let guest = |n: usize| GuestLeaf::from_number(n as u16).map_or("TDG.?", GuestLeaf::name);
        self.observer.sum(|lp| &lp.host, host, &mut counts);
        self.observer.sum(|lp| &lp.guest, guest, &mut counts);
        Counts(counts)
    }

    /// The last calls of all processors in order; empty unless the builder asked for a trace.
    #[must_use]
    pub fn trace(&self) -> Vec<TraceEntry> {
        let mut all: Vec<TraceEntry> = self
            .observer
            .lps
            .iter()
            .flat_map(|lp| lock(&lp.trace).clone())
            .collect();
        all.sort_by_key(|e| e.sequence);
        all
    }
}
