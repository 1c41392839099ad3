//! The account of the firmware of a software platform: what confidential VMs took from it, and
//! whether all of it came back.
//!
//! Three parties keep count, none of which asks the others: the firmware counts its calls, the
//! allocator the pages that are out, and the teardowns what they freed and leaked. Their sums must
//! agree.

use std::collections::BTreeMap;

use kvm_ops::{FreeReport, Leaked, Tech};
use serde::Serialize;

/// What teardowns say, summed up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leaks {
    /// Pages that went back to the host.
    pub(crate) pages_freed: u64,
    /// Pages that the firmware kept.
    pub(crate) pages: u64,
    /// KeyIDs or ASIDs that went back.
    pub(crate) keys_freed: u64,
    /// Those that are lost.
    pub(crate) keys: u64,
    /// VMs whose teardown says nothing.
    pub(crate) unknown: u64,
}

impl Leaks {
    /// Adds another sum.
    pub(crate) fn join(&mut self, other: &Self) {
        self.pages_freed += other.pages_freed;
        self.pages += other.pages;
        self.keys_freed += other.keys_freed;
        self.keys += other.keys;
        self.unknown += other.unknown;
    }

    /// Adds what a teardown says.
    pub(crate) fn add(&mut self, report: &FreeReport) {
        self.pages_freed += report.pages_freed;
        self.keys_freed += u64::from(report.keys_freed);
        for leak in &report.leaks {
            match leak.what {
                Leaked::Page(_) => self.pages += 1,
                Leaked::Key(_) => self.keys += 1,
                _ => {}
            }
        }
    }
}

/// The state of the firmware's and the allocator's counts at a moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Books {
    /// Calls by name and status.
    calls: BTreeMap<(String, String), u64>,
    /// Pages that the allocator ever gave out.
    pages_taken: u64,
    /// Those of them that did not come back.
    pages_out: u64,
    /// KeyIDs or ASIDs that are leased.
    keys_out: u64,
}

impl Books {
    /// As they stand for a firmware; `None` where the platform has none.
    pub(crate) fn of(host: &kvm_ops::sim::SimHost, firmware: Firmware) -> Option<Self> {
        match firmware {
            Firmware::TdxModule => Self::of_tdx(host),
            Firmware::AmdSp => Self::of_sev(host),
        }
    }

    fn of_tdx(host: &kvm_ops::sim::SimHost) -> Option<Self> {
        use kvm_ops::{Host, SeamPort};
        let counts = host.tdx_platform()?.counts().0.into_iter();
        let calls = counts.map(|((leaf, status), n)| ((leaf.to_owned(), status.to_owned()), n));
        let pages = host.pages()?;
        Some(Self {
            calls: calls.collect(),
            pages_taken: pages.frames_taken(),
            pages_out: pages.frames_out(),
            keys_out: host.seam()?.key_ids().in_use().into(),
        })
    }
    fn of_sev(host: &kvm_ops::sim::SimHost) -> Option<Self> {
        use kvm_ops::{Host, PspPort};
        use soft_amd_sp::{Operation, Status};
        let counters = host.sev_platform()?.counters();
        let mut calls = BTreeMap::new();
        for (operation, code, n) in counters.iter() {
            let status = match (operation, u16::try_from(code).ok()) {
                (_, Some(0)) => SUCCESS.to_owned(),
                (Operation::Command(_), Some(code)) => Status(code).to_string(),
                _ => format!("code {code}"),
            };
            *calls.entry((operation.to_string(), status)).or_default() += n;
        }
        let pages = host.pages()?;
        Some(Self {
            calls,
            pages_taken: pages.frames_taken(),
            pages_out: pages.frames_out(),
            keys_out: host.psp()?.asid_pools().in_use().into(),
        })
    }

    /// The calls since then, by name; which of them did not succeed, by name and status.
    fn calls_since(&self, then: &Self) -> (BTreeMap<String, u64>, BTreeMap<String, u64>) {
        let (mut by_name, mut refused) = (BTreeMap::new(), BTreeMap::new());
        for (call, now) in &self.calls {
            let n = now - then.calls.get(call).copied().unwrap_or(0);
            if n == 0 {
                continue;
            }
            let (name, status) = call;
            *by_name.entry(name.clone()).or_default() += n;
            if status != SUCCESS {
                *refused.entry(format!("{name} {status}")).or_default() += n;
            }
        }
        (by_name, refused)
    }

    /// How often these calls have succeeded since then.
    fn successes(&self, then: &Self, names: &[&str]) -> u64 {
        let of = |books: &Self| -> u64 {
            let calls = books.calls.iter();
            let succeeded = calls
                .filter(|((name, status), _)| status == SUCCESS && names.contains(&name.as_str()));
            succeeded.map(|(_, n)| n).sum()
        };
        of(self) - of(then)
    }

    /// The SEAMCALLs since then: all calls without the guests'.
    pub(crate) fn seamcalls_since(&self, then: &Self) -> u64 {
        let (by_name, _) = self.calls_since(then);
        let host = by_name.iter().filter(|(name, _)| kind(name) == SEAMCALL);
        host.map(|(_, n)| n).sum()
    }
}

const SUCCESS: &str = "SUCCESS";
const SEAMCALL: &str = "SEAMCALL";

/// What kind of call has that name.
fn kind(name: &str) -> &'static str {
    match name {
        name if name.starts_with("TDH.") => SEAMCALL,
        name if name.starts_with("TDG.") => "TDCALL",
        name if name.starts_with(|c: char| c.is_ascii_lowercase()) => "instruction",
        _ => "command",
    }
}

/// A firmware below confidential VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Firmware {
    /// Of TDs.
    TdxModule,
    /// Of SEV, SEV-ES and SEV-SNP guests.
    AmdSp,
}

impl Firmware {
    /// The one below VMs of that technology; `None` of normal VMs.
    pub(crate) const fn below(tech: Tech) -> Option<Self> {
        match tech {
            Tech::Tdx => Some(Self::TdxModule),
            Tech::Sev | Tech::SevEs | Tech::SevSnp => Some(Self::AmdSp),
            _ => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::TdxModule => "TDX module",
            Self::AmdSp => "AMD SP",
        }
    }

    fn techs(self) -> Vec<&'static str> {
        let all = Tech::ALL.into_iter();
        let own = all.filter(|tech| Self::below(*tech) == Some(self));
        own.map(Tech::name).collect()
    }

    /// The calls that put a key into use, and those that take one out of use.
    const fn key_calls(self) -> [&'static [&'static str]; 2] {
        match self {
            Self::TdxModule => [&["TDH.MNG.CREATE"], &["TDH.MNG.KEY.FREEID"]],
            Self::AmdSp => [
                &["ACTIVATE", "SNP_ACTIVATE"],
                &["DECOMMISSION", "SNP_DECOMMISSION"],
            ],
        }
    }
}

/// Each takes a page from the host on success.
const GIVES: [&str; 8] = [
    "TDH.MNG.CREATE",
    "TDH.MNG.ADDCX",
    "TDH.VP.CREATE",
    "TDH.VP.ADDCX",
    "TDH.MEM.SEPT.ADD",
    "TDH.MEM.PAGE.ADD",
    "TDH.MEM.PAGE.AUG",
    "TDH.MEM.PAGE.DEMOTE",
];
/// Each gives a page back to the host on success.
const TAKES: [&str; 4] = [
    "TDH.MEM.PAGE.REMOVE",
    "TDH.MEM.SEPT.REMOVE",
    "TDH.MEM.PAGE.PROMOTE",
    "TDH.PHYMEM.PAGE.RECLAIM",
];

/// What one firmware was asked for in a while, by all counts.
#[derive(Debug, Serialize)]
pub(crate) struct Account {
    /// Which firmware.
    pub(crate) firmware: &'static str,
    /// The technologies whose VMs are counted.
    pub(crate) techs: Vec<&'static str>,
    /// Calls that it counted.
    pub(crate) calls: u64,
    /// The same by name: the host's, and the guests'.
    pub(crate) calls_by_name: BTreeMap<String, u64>,
    /// Those that did not succeed, by name and status.
    pub(crate) refused: BTreeMap<String, u64>,
    /// Pages.
    pub(crate) pages: Pages,
    /// KeyIDs or ASIDs.
    pub(crate) keys: Keys,
    /// VMs whose teardown says nothing, so that the sums cannot be held against each other.
    pub(crate) unknown: u64,
    /// Sums that do not agree, each a sentence.
    pub(crate) disagreements: Vec<String>,
}

/// The account of pages of 4 KiB.
#[derive(Debug, Serialize)]
pub(crate) struct Pages {
    /// Taken from the host, by the allocator's count.
    pub(crate) taken: u64,
    /// Handed to the firmware, by its own count of calls. The calls of the AMD SP do not tell.
    pub(crate) given: Option<u64>,
    /// Given back by it, likewise.
    pub(crate) returned: Option<u64>,
    /// Back with the host, by the teardowns' count.
    pub(crate) freed: u64,
    /// Lost, by the teardowns' count.
    pub(crate) leaked: u64,
    /// Out, by the allocator's count.
    pub(crate) out: u64,
}

/// The account of KeyIDs or ASIDs.
#[derive(Debug, Serialize)]
pub(crate) struct Keys {
    /// Put into use, by the firmware's count of calls.
    pub(crate) leased: u64,
    /// Out of use, likewise.
    pub(crate) returned: u64,
    /// Back in the pool, by the teardowns' count.
    pub(crate) freed: u64,
    /// Lost, by the teardowns' count.
    pub(crate) leaked: u64,
    /// Leased, by the pool's count.
    pub(crate) out: u64,
}

impl Account {
    /// Draws up the account of a firmware from before and after, and from the teardowns.
    pub(crate) fn draw(firmware: Firmware, before: &Books, after: &Books, leaks: Leaks) -> Self {
        let (calls_by_name, refused) = after.calls_since(before);
        let is_tdx = firmware == Firmware::TdxModule;
        let pages_by = |names| is_tdx.then(|| after.successes(before, names));
        let [lease, give_back] = firmware.key_calls();
        let mut account = Self {
            firmware: firmware.name(),
            techs: firmware.techs(),
            calls: calls_by_name.values().sum(),
            calls_by_name,
            refused,
            pages: Pages {
                taken: after.pages_taken - before.pages_taken,
                given: pages_by(&GIVES),
                returned: pages_by(&TAKES),
                freed: leaks.pages_freed,
                leaked: leaks.pages,
                out: after.pages_out.saturating_sub(before.pages_out),
            },
            keys: Keys {
                leased: after.successes(before, lease),
                returned: after.successes(before, give_back),
                freed: leaks.keys_freed,
                leaked: leaks.keys,
                out: after.keys_out.saturating_sub(before.keys_out),
            },
            unknown: leaks.unknown,
            disagreements: Vec::new(),
        };
        if leaks.unknown == 0 {
            account.disagreements = account.disagree();
        }
        account
    }

    fn disagree(&self) -> Vec<String> {
        let Self { pages, keys, .. } = self;
        let mut found = Vec::new();
        let mut must = |holds: bool, what: String| {
            if !holds {
                found.push(what);
            }
        };
        must(
            pages.out == pages.leaked,
            format!(
                "{} pages are out by the allocator's count, {} leaked by the teardowns'",
                pages.out, pages.leaked
            ),
        );
        if let (Some(given), Some(returned)) = (pages.given, pages.returned) {
            // A page whose cache lines could not be written back is leaked although the firmware
            // has let it go, so that it may keep fewer than are leaked.
            must(
                returned <= given && given - returned <= pages.leaked && given <= pages.taken,
                format!(
                    "of {} pages the firmware got {given} and gave {returned} back, but {} leaked",
                    pages.taken, pages.leaked
                ),
            );
        }
        must(
            pages.taken == pages.freed + pages.leaked,
            format!(
                "{} pages were taken from the host, {} were freed and {} leaked",
                pages.taken, pages.freed, pages.leaked
            ),
        );
        must(
            keys.leased == keys.freed + keys.leaked,
            format!(
                "{} keys were put into use, {} came back and {} leaked",
                keys.leased, keys.freed, keys.leaked
            ),
        );
        must(
            keys.out == keys.leaked,
            format!(
                "{} keys are out by the pool's count, {} leaked by the teardowns'",
                keys.out, keys.leaked
            ),
        );
        found
    }
}

mod print;
#[cfg(test)]
mod tests;
