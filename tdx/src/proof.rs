//! The file that makes the tokens of the teardown. The hooks of the mirror are the only other unsafe
//! code of the crate.
#![allow(unsafe_code)]

use kvm_ops::{Drained, Error, Host, KeyReleased};

use crate::td::{KeyState, Td};

/// Proof that the TD's key is gone, `None` while it is not.
pub(crate) fn key_released<H: Host>(td: &Td<H>) -> Option<KeyReleased> {
    match td.lock(&td.control).key {
        // SAFETY: `KeyState::None` is the state before the lease and after TDH.MNG.KEY.FREEID
        // succeeded (or after an unassigned lease went back): the module holds no key of this TD. Only
        // `vm_init` leaves it, in a step that the TD never returns to.
        KeyState::None => Some(unsafe { td.life.key_released() }),
        _ => None,
    }
}

/// Proof that no private page is left. The token comes back while the mirror maps any.
pub(crate) fn drained<H: Host>(
    td: &Td<H>,
    released: KeyReleased,
) -> Result<Drained, (Error, KeyReleased)> {
    let stats = td.write_private().mirror.stats();
    if stats.pages_4k + stats.pages_2m + stats.tables != 0 {
        return Err((Error::Poisoned, released));
    }
    // SAFETY: the mirror lists every page that the TD's Secure-EPT mapped and every page of the
    // Secure-EPT itself, and it is empty: each page that left it was reclaimed and freed, or was
    // counted as leaked. A `Page` that is leaked exists no more, so it is never freed.
    unsafe { td.life.drained(released) }
}
