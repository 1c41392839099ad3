//! Reports of Genoa, signed by a VLEK.

use super::super::super::super::Kds;
use super::super::making::old_tcb;
use super::{Bad, list, put, revoked, signed};
use crate::snp::KeyKind;

/// The bad ones.
pub(in super::super) const BY_VLEK: [Bad; 6] = [
    signed(
        "vlek-tcb-of-another-key",
        "key-tcb",
        "a VLEK for an older TCB than the reported one",
        |m| {
            m.certified.0 = old_tcb(m.product);
            Ok(())
        },
    ),
    signed(
        "vlek-under-the-ask",
        "certificates",
        "the ASK in the place of the ASVK",
        |m| {
            let kds = Kds::new(m.product);
            m.chain = Some([kds.ask()?, kds.ark()?]);
            Ok(())
        },
    ),
    signed(
        "vlek-for-vcek",
        "certificates",
        "a VLEK's certificate for a report that names the VCEK",
        |m| {
            m.name_signer(KeyKind::Vcek);
            Ok(())
        },
    ),
    signed(
        "vcek-for-vlek",
        "certificates",
        "a VCEK's certificate for a report that names the VLEK",
        |m| {
            m.kind = KeyKind::Vcek;
            Ok(())
        },
    ),
    signed(
        "asvk-revoked",
        "revocation",
        "the root's list names the ASVK",
        |m| {
            m.crl = list(m.product, revoked(Kds::new(m.product).asvk()?))?;
            Ok(())
        },
    ),
    signed(
        "vlek-chip",
        "chip-id",
        "signed by the provider's key on another chip",
        |m| put(m, 0x1a0, &[1; 64]),
    ),
];
