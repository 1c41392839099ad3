//! Flushes of caches and TLBs around a conversion, and the side that does them.

use crate::Privacy;

/// The flush that the guest must do before it asks the host for a conversion.
///
/// The kernel comes to this point with the range **unmapped** on all its processors: neither alias,
/// private or shared, has a present page-table entry. It maps the new alias only when the
/// conversion is done. In between nothing can use the range, and nothing can bring it back into a
/// TLB or a cache. (PVALIDATE takes a linear address. The port maps the page for the one
/// instruction, which reads and writes the RMP and not the page.)
///
/// | conversion | `caches` | `tlb` |
/// |---|---|---|
/// | TDX, private to shared | yes | yes |
/// | TDX, shared to private | no | yes |
/// | SEV, SEV-ES, SNP, either way | unless the processor keeps the aliases coherent | yes |
///
/// `caches` is about CPU data caches (CLFLUSH of the range, through the alias that goes away), never
/// about paging-structure caches: those belong to `tlb`.
///
/// **Private to shared, caches.** Lines of the private alias may be dirty. When one is written back
/// after the host has begun to use the page, it overwrites shared data with ciphertext. In a TD
/// only the guest can write such lines back by address: the host cannot form an address with
/// the TD's key id.
///
/// **Shared to private, caches.** In a TD nothing is left for the guest: dirty lines of the shared
/// alias belong to the host's key id, and the host must write them back before it gives the page.
/// A malicious host may omit it. A late write-back lands on memory that is protected by now, so
/// that its next reader gets an integrity error (a machine check, and the TD is dead) instead of
/// altered data. The host could have stopped the TD anyway: nothing is hurt but the guest's
/// availability, which is the host's to give. The shared alias is subject to no such check, so the
/// host has no need to flush for its own sake. Under SEV the guest turns a page over by its own
/// C-bit, the host flushes nothing, and nothing checks: so the guest flushes both ways, unless
/// SME_COHERENT (CPUID 8000001Fh, EAX bit 10) says that the processor keeps the aliases coherent.
///
/// **TLB, both ways.** Linear-to-physical translations of the alias that goes away are the guest's:
/// only the guest knows its page tables. To shared: another processor that still wrote through the
/// private alias would fault on a page that is gone. To private: one that still wrote through the
/// *shared* alias would show the host what is meant to be secret by now, and no later check can
/// find that. Translations from guest-physical to host-physical addresses are the host's to flush;
/// the TDX module and the RMP check that it did before a private page goes elsewhere, and a stale
/// *shared* one leads only to memory that is the host's anyway.
#[must_use = "a conversion without its flush loses or reveals data"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// CPU caches of the range, through the alias that goes away.
    pub caches: bool,
    /// TLBs of all processors, of the alias that goes away.
    pub tlb: bool,
}

impl Flush {
    /// The flush for a conversion to `to` in a TD.
    pub const fn tdx(to: Privacy) -> Self {
        Self {
            caches: matches!(to, Privacy::Shared),
            tlb: true,
        }
    }

    /// The flush for a conversion in an SEV guest; `coherent` is SME_COHERENT.
    pub const fn sev(coherent: bool) -> Self {
        Self {
            caches: !coherent,
            tlb: true,
        }
    }
}
