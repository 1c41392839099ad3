//! The account of a software platform's firmware: the resources that confidential VMs took, and a
//! check that all came back.
//!
//! Three counts are independent of each other: the firmware's count of its calls, the allocator's
//! count of its pages, and the teardowns' reports of freed and leaked resources. Their sums must
//! agree.

use std::collections::BTreeMap;

use kvm_ops::{FreeReport, Leaked, Tech};
use serde::Serialize;

/// The sums of teardown reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leaks {
    /// Pages returned to the host.
    pub(crate) pages_freed: u64,
    /// Pages that the firmware kept.
    pub(crate) pages: u64,
    /// KeyIDs or ASIDs returned to the pool.
    pub(crate) keys_freed: u64,
    /// KeyIDs or ASIDs that are lost.
    pub(crate) keys: u64,
    /// VMs whose teardown reports no numbers.
    pub(crate) unknown: u64,
}

impl Leaks {
    /// Adds another sum to this one.
    pub(crate) fn join(&mut self, other: &Self) {
        self.pages_freed += other.pages_freed;
        self.pages += other.pages;
        self.keys_freed += other.keys_freed;
        self.keys += other.keys;
        self.unknown += other.unknown;
    }

    /// Adds a teardown report.
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

/// A snapshot of the counts of a firmware and its allocator.
#[derive(Clone, Debug, Default)]
pub(crate) struct Books {
    /// Calls by name and status.
    calls: BTreeMap<(String, String), u64>,
    /// Pages that the allocator has ever handed out.
    pages_taken: u64,
    /// Pages that have not come back.
    pages_out: u64,
    /// KeyIDs or ASIDs that are in use.
    keys_out: u64,
}

impl Books {
    /// Takes a snapshot for a firmware; `None` if the platform does not have it.
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

    /// Returns the calls since `then` by name, and the failed ones by name and status.
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

    /// Returns the number of successful calls of these names since `then`.
    fn successes(&self, then: &Self, names: &[&str]) -> u64 {
        let of = |books: &Self| -> u64 {
            let calls = books.calls.iter();
            let succeeded = calls
                .filter(|((name, status), _)| status == SUCCESS && names.contains(&name.as_str()));
            succeeded.map(|(_, n)| n).sum()
        };
        of(self) - of(then)
    }

    /// Returns the SEAMCALLs, or the commands to the AMD SP, since `then`.
    pub(crate) fn host_calls_since(&self, then: &Self) -> u64 {
        let (by_name, _) = self.calls_since(then);
        let is_host = |name: &str| [SEAMCALL, COMMAND].contains(&kind(name));
        let host = by_name.iter().filter(|(name, _)| is_host(name));
        host.map(|(_, n)| n).sum()
    }
}

const SUCCESS: &str = "SUCCESS";
const SEAMCALL: &str = "SEAMCALL";
const COMMAND: &str = "command";

/// Returns the kind of the call with this name.
fn kind(name: &str) -> &'static str {
    match name {
        name if name.starts_with("TDH.") => SEAMCALL,
        name if name.starts_with("TDG.") => "TDCALL",
        name if name.starts_with(|c: char| c.is_ascii_lowercase()) => "instruction",
        _ => COMMAND,
    }
}

/// A firmware that confidential VMs depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Firmware {
    /// The TDX module, for TDs.
    TdxModule,
    /// The AMD SP, for SEV, SEV-ES and SEV-SNP guests.
    AmdSp,
}

impl Firmware {
    /// Returns the firmware for VMs of a technology; `None` for normal VMs.
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

    /// Returns the calls that take a key into use, and those that release one.
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

/// Calls that take one page from the host on success.
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
/// Calls that return one page to the host on success.
const TAKES: [&str; 4] = [
    "TDH.MEM.PAGE.REMOVE",
    "TDH.MEM.SEPT.REMOVE",
    "TDH.MEM.PAGE.PROMOTE",
    "TDH.PHYMEM.PAGE.RECLAIM",
];

/// The account of one firmware over a period, by all three counts.
#[derive(Debug, Serialize)]
pub(crate) struct Account {
    /// The name of the firmware.
    pub(crate) firmware: &'static str,
    /// The technologies of the VMs that are counted.
    pub(crate) techs: Vec<&'static str>,
    /// The number of calls, as the firmware counted them.
    pub(crate) calls: u64,
    /// Calls by name, of the host and of the guests.
    pub(crate) calls_by_name: BTreeMap<String, u64>,
    /// Calls that failed, by name and status.
    pub(crate) refused: BTreeMap<String, u64>,
    pub(crate) pages: Pages,
    pub(crate) keys: Keys,
    /// VMs whose teardown reports no numbers, so that the sums cannot be compared.
    pub(crate) unknown: u64,
    /// Sums that disagree, one sentence each.
    pub(crate) disagreements: Vec<String>,
}

/// The account of pages of 4 KiB.
#[derive(Debug, Serialize)]
pub(crate) struct Pages {
    /// Pages taken from the host, by the allocator's count.
    pub(crate) taken: u64,
    /// Pages given to the firmware, by its count of calls. `None` for the AMD SP: its calls do not
    /// carry this number.
    pub(crate) given: Option<u64>,
    /// Pages that the firmware returned, by its count of calls.
    pub(crate) returned: Option<u64>,
    /// Pages returned to the host, by the teardowns' count.
    pub(crate) freed: u64,
    /// Pages leaked, by the teardowns' count.
    pub(crate) leaked: u64,
    /// Pages not returned, by the allocator's count.
    pub(crate) out: u64,
}

/// The account of KeyIDs or ASIDs.
#[derive(Debug, Serialize)]
pub(crate) struct Keys {
    /// Keys taken into use, by the firmware's count of calls.
    pub(crate) leased: u64,
    /// Keys released, by the firmware's count of calls.
    pub(crate) returned: u64,
    /// Keys returned to the pool, by the teardowns' count.
    pub(crate) freed: u64,
    /// Keys leaked, by the teardowns' count.
    pub(crate) leaked: u64,
    /// Keys in use, by the pool's count.
    pub(crate) out: u64,
}

impl Account {
    /// Computes the account of a firmware from two snapshots and the teardown reports.
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
            // A page whose cache lines could not be written back is leaked after the firmware has
            // released it, so the firmware may keep fewer pages than are leaked.
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
