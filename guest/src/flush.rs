//! What must leave caches and TLBs around a conversion, and who is to see to it.

use crate::Privacy;

/// What the guest has to flush before the host is told of a conversion.
///
/// The kernel comes to this point with the range **unmapped** on all its processors: neither alias,
/// private or shared, has a present page-table entry. It maps the new alias only when the
/// conversion is done. In between nothing can use the range, and nothing can bring it back into a
/// TLB or a cache.
///
/// | conversion | `caches` | `tlb` |
/// |---|---|---|
/// | private to shared | yes | yes |
/// | shared to private | no | yes |
///
/// `caches` is about CPU data caches (CLFLUSH, or WBINVD where the processor lets a guest execute
/// it), never about paging-structure caches: those belong to `tlb`.
///
/// **Private to shared, caches.** Lines of the private alias may be dirty. When one is written back
/// after the host has begun to use the page, it overwrites shared data with ciphertext. The guest
/// is the only one who has an interest in that data, and the only one who can write the lines back
/// by address: the host cannot form an address with a private key id.
///
/// **Shared to private, caches.** Nothing to do for the guest. Dirty lines of the shared alias
/// belong to the host's key id, and the host must write them back before it gives the page to the
/// guest. A malicious host that does not hurts only availability: a late write-back lands on
/// memory that is protected by now, so its next reader gets an integrity error (TDX: a machine
/// check, and the TD is dead) instead of altered data. The zeroing that accepting does goes through
/// the guest's own key.
///
/// **TLB, both ways.** Linear-to-physical translations of the alias that goes away are the guest's:
/// only the guest knows its page tables. To shared: another processor that still wrote through the
/// private alias would fault on a page that is gone. To private: one that still wrote through the
/// *shared* alias would show the host what is meant to be secret by now, and no later check can
/// find that. Translations from guest-physical to host-physical addresses are the host's to flush;
/// TDX and the RMP check that it did before a private page can be taken away (TDH.MEM.TRACK), and a
/// stale *shared* one leads only to memory that is the host's anyway.
#[must_use = "a conversion without its flush loses or reveals data"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// CPU caches of the range, through the alias that goes away.
    pub caches: bool,
    /// TLBs of all processors, of the alias that goes away.
    pub tlb: bool,
}

impl Flush {
    /// What a conversion of a page to `to` needs.
    pub const fn before(to: Privacy) -> Self {
        match to {
            Privacy::Shared => Self {
                caches: true,
                tlb: true,
            },
            Privacy::Private => Self {
                caches: false,
                tlb: true,
            },
        }
    }
}
