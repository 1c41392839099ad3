//! The account of the firmware of a software platform: what confidential VMs took from it, and
//! whether all of it came back.
//!
//! Three parties keep count, none of which asks the others: the firmware counts its calls, the
//! allocator the pages that are out, and the teardowns what they freed and leaked. Their sums must
//! agree.

use std::collections::BTreeMap;
use std::fmt;

use kvm_ops::{FreeReport, Leaked, Tech};
use serde::Serialize;

use crate::term::{BOLD, ERROR};
use crate::units::plural;

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
    calls: BTreeMap<(&'static str, &'static str), u64>,
    /// Pages that the allocator ever gave out.
    pages_taken: u64,
    /// Those of them that did not come back.
    pages_out: u64,
    /// KeyIDs or ASIDs that are leased.
    keys_out: u64,
}

impl Books {
    /// As they stand for the firmware below VMs of that technology; `None` where there is none.
    #[cfg(feature = "sim")]
    pub(crate) fn of(host: &kvm_ops::sim::SimHost, tech: Tech) -> Option<Self> {
        match tech {
            #[cfg(feature = "tdx")]
            Tech::Tdx => Self::of_tdx(host),
            _ => {
                let _ = host;
                None
            }
        }
    }

    #[cfg(all(feature = "sim", feature = "tdx"))]
    fn of_tdx(host: &kvm_ops::sim::SimHost) -> Option<Self> {
        use kvm_ops::{Host, SeamPort};
        Some(Self {
            calls: host.tdx_platform()?.counts().0,
            pages_taken: host.pages()?.frames_taken(),
            pages_out: host.pages()?.frames_out(),
            keys_out: host.seam()?.key_ids().in_use().into(),
        })
    }

    /// The calls since then, by name; which of them did not succeed, by name and status.
    fn calls_since(&self, then: &Self) -> (BTreeMap<&'static str, u64>, BTreeMap<String, u64>) {
        let (mut by_name, mut refused) = (BTreeMap::new(), BTreeMap::new());
        for ((name, status), now) in &self.calls {
            let before = then.calls.get(&(*name, *status)).copied().unwrap_or(0);
            let n = now - before;
            if n == 0 {
                continue;
            }
            *by_name.entry(*name).or_default() += n;
            if *status != "SUCCESS" {
                *refused.entry(format!("{name} {status}")).or_default() += n;
            }
        }
        (by_name, refused)
    }

    /// How often these calls have succeeded since then.
    fn successes(&self, then: &Self, names: &[&str]) -> u64 {
        let of = |books: &Self| -> u64 {
            let succeeded = |((name, status), _): &(&(&str, &str), &u64)| {
                *status == "SUCCESS" && names.contains(name)
            };
            books.calls.iter().filter(succeeded).map(|(_, n)| n).sum()
        };
        of(self) - of(then)
    }

    /// The calls of the host since then: all, without the guests'.
    pub(crate) fn host_calls_since(&self, then: &Self) -> u64 {
        let (by_name, _) = self.calls_since(then);
        let host = by_name.iter().filter(|(name, _)| name.starts_with("TDH."));
        host.map(|(_, n)| n).sum()
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
    pub(crate) calls_by_name: BTreeMap<&'static str, u64>,
    /// Those that did not succeed, by name and status.
    pub(crate) refused: BTreeMap<String, u64>,
    /// Pages.
    pub(crate) pages: Pages,
    /// KeyIDs.
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
    /// Taken by the firmware, by its own count of calls.
    pub(crate) given: u64,
    /// Given back by it, likewise.
    pub(crate) returned: u64,
    /// Back with the host, by the teardowns' count.
    pub(crate) freed: u64,
    /// Lost, by the teardowns' count.
    pub(crate) leaked: u64,
    /// Out, by the allocator's count.
    pub(crate) out: u64,
}

/// The account of KeyIDs.
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
    /// Draws up the account of the TDX module from before and after, and from the teardowns.
    pub(crate) fn of_tdx(before: &Books, after: &Books, leaks: Leaks) -> Self {
        let (calls_by_name, refused) = after.calls_since(before);
        let mut account = Self {
            firmware: "TDX module",
            techs: vec![Tech::Tdx.name()],
            calls: calls_by_name.values().sum(),
            calls_by_name,
            refused,
            pages: Pages {
                taken: after.pages_taken - before.pages_taken,
                given: after.successes(before, &GIVES),
                returned: after.successes(before, &TAKES),
                freed: leaks.pages_freed,
                leaked: leaks.pages,
                out: after.pages_out.saturating_sub(before.pages_out),
            },
            keys: Keys {
                leased: after.successes(before, &["TDH.MNG.CREATE"]),
                returned: after.successes(before, &["TDH.MNG.KEY.FREEID"]),
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
        // A page whose cache lines could not be written back is leaked although the module has
        // let it go, so that the module may keep fewer than are leaked.
        let kept = pages.given.saturating_sub(pages.returned);
        must(
            pages.returned <= pages.given && kept <= pages.leaked,
            format!(
                "the module took {} pages and gave {} back, but {} leaked",
                pages.given, pages.returned, pages.leaked
            ),
        );
        must(
            pages.taken == pages.freed + pages.leaked,
            format!(
                "{} pages were taken from the host, {} were freed and {} leaked",
                pages.taken, pages.freed, pages.leaked
            ),
        );
        must(
            pages.given <= pages.taken,
            format!(
                "the module took {} pages of the {} that were taken from the host",
                pages.given, pages.taken
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

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, keys, .. } = self;
        write!(
            f,
            "{BOLD}{}{BOLD:#}: {} taken = {} freed + {} leaked, of which it got {} and gave {} \
             back; {} leased = {} given back + {} leaked",
            self.firmware,
            plural(pages.taken, "page"),
            pages.freed,
            pages.leaked,
            pages.given,
            pages.returned,
            plural(keys.leased, "key"),
            keys.freed,
            keys.leaked,
        )?;
        for (kind, prefix) in KINDS {
            let of_kind = |(name, _): &(&&str, &u64)| name.starts_with(prefix);
            let calls = || self.calls_by_name.iter().filter(of_kind);
            let total: u64 = calls().map(|(_, n)| n).sum();
            if total != 0 {
                let listed = wrapped(calls().map(|(name, n)| format!("{name} {n}")));
                write!(f, "\n{}:\n{listed}", plural(total, kind))?;
            }
        }
        if !self.refused.is_empty() {
            let refused = self.refused.iter().map(|(what, n)| format!("{what} {n}"));
            write!(f, "\nof these not successful:\n{}", wrapped(refused))?;
        }
        for what in &self.disagreements {
            write!(f, "\n{ERROR}does not add up{ERROR:#}: {what}")?;
        }
        Ok(())
    }
}

/// What calls are called, by how their names begin.
const KINDS: [(&str, &str); 2] = [("SEAMCALL", "TDH."), ("TDCALL", "TDG.")];

/// A list in lines of moderate length.
fn wrapped(items: impl Iterator<Item = String>) -> String {
    let mut lines = vec![String::from(" ")];
    for item in items {
        let line = lines.len() - 1;
        if lines[line].len() > 1 && lines[line].len() + item.len() > WIDTH {
            lines.push(String::from(" "));
        }
        if let Some(line) = lines.last_mut() {
            line.push_str(&format!(" {item},"));
        }
    }
    if let Some(line) = lines.last_mut() {
        line.pop();
    }
    lines.join("\n")
}

/// The most columns of such a line.
const WIDTH: usize = 96;

#[cfg(test)]
mod tests {
    use super::*;

    fn books(calls: &[(&'static str, &'static str, u64)], pages_out: u64, keys_out: u64) -> Books {
        Books {
            pages_taken: 13,
            calls: calls
                .iter()
                .map(|(leaf, status, n)| ((*leaf, *status), *n))
                .collect(),
            pages_out,
            keys_out,
        }
    }

    fn calls(aug: u64, removed: u64) -> Vec<(&'static str, &'static str, u64)> {
        vec![
            ("TDH.MNG.CREATE", "SUCCESS", 3),
            ("TDH.MNG.CREATE", "OPERAND_BUSY", 2),
            ("TDH.MNG.KEY.FREEID", "SUCCESS", 3),
            ("TDH.MEM.PAGE.AUG", "SUCCESS", aug),
            ("TDH.MEM.PAGE.REMOVE", "SUCCESS", removed),
            ("TDH.PHYMEM.PAGE.RECLAIM", "SUCCESS", 3),
        ]
    }

    const CLEAN: Leaks = Leaks {
        pages_freed: 13,
        pages: 0,
        keys_freed: 3,
        keys: 0,
        unknown: 0,
    };

    #[test]
    fn sums_that_agree_are_no_matter_and_what_was_before_does_not_count() {
        let after = books(&calls(10, 10), 0, 0);
        let account = Account::of_tdx(&Books::default(), &after, CLEAN);
        assert_eq!(account.disagreements, [""; 0]);
        assert_eq!(
            (account.calls, account.pages.given, account.keys.leased),
            (31, 13, 3)
        );
        assert_eq!(
            account.refused,
            [("TDH.MNG.CREATE OPERAND_BUSY".into(), 2)].into()
        );
        let nothing = Account::of_tdx(&after, &after, Leaks::default());
        assert_eq!(
            (nothing.calls, nothing.pages.given, nothing.keys.leased),
            (0, 0, 0)
        );
        assert!(nothing.disagreements.is_empty() && nothing.calls_by_name.is_empty());
    }

    #[test]
    fn each_sum_that_does_not_agree_is_told() {
        let account = |books: &Books, leaks| {
            let account = Account::of_tdx(&Books::default(), books, leaks);
            account.disagreements.join("; ")
        };
        let kept = books(&calls(10, 9), 1, 0);
        // Told by nobody, and told by the teardown.
        assert!(account(&kept, CLEAN).contains("1 pages are out"));
        assert!(account(&kept, CLEAN).contains("gave 12 back, but 0 leaked"));
        let told = Leaks {
            pages: 1,
            pages_freed: 12,
            ..CLEAN
        };
        assert_eq!(account(&kept, told), "");
        let forgot = Leaks {
            pages_freed: 4,
            ..CLEAN
        };
        assert!(
            account(&books(&calls(10, 10), 0, 0), forgot)
                .contains("13 pages were taken from the host, 4 were freed and 0 leaked")
        );
        let lost = Leaks {
            keys_freed: 2,
            ..CLEAN
        };
        assert!(account(&books(&calls(10, 10), 0, 1), lost).contains("3 keys were put into use"));
        assert!(account(&books(&calls(10, 10), 0, 1), CLEAN).contains("1 keys are out"));
    }
}
