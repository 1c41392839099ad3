//! The tokens of the teardown are minted here, and nowhere else.
#![allow(unsafe_code)]

use kvm_ops::{Drained, Host, KeyReleased};

use crate::td::{Key, Td};

/// Proof that the TD's key is gone, `None` while it is not.
pub(crate) fn key_released<H: Host>(td: &Td<H>) -> Option<KeyReleased> {
    match td.lock(&td.control).key {
        // SAFETY: `Key::None` is the state before the lease and after TDH.MNG.KEY.FREEID succeeded
        // (or after an unassigned lease went back): the module holds no key of this TD. It leaves
        // that state in `vm_init` only, which needs a step that the TD never returns to.
        Key::None => Some(unsafe { KeyReleased::assert_released(td.id) }),
        _ => None,
    }
}

/// Proof that no private page is left. `Err` gives the token back while the mirror lists any.
pub(crate) fn drained<H: Host>(td: &Td<H>, released: KeyReleased) -> Result<Drained, KeyReleased> {
    let stats = td.write_private().mirror.stats();
    if stats.pages_4k + stats.pages_2m + stats.tables != 0 || released.vm() != td.id {
        return Err(released);
    }
    // SAFETY: the mirror lists every page that the TD's Secure-EPT mapped and every page of the
    // Secure-EPT itself, and it is empty: each page that left it was reclaimed and freed, or was
    // counted as leaked, and leaked pages are never given to the page port.
    Ok(unsafe { released.assert_drained() })
}
