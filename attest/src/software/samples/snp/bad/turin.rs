//! Reports of Turin.

use super::super::super::super::Kds;
use super::super::making::tcb;
use super::{Bad, put, signed};
use crate::snp::{Product, Tcb};

/// The bad ones.
pub(in super::super) const TURIN: [Bad; 7] = [
    signed(
        "turin-fmc-old",
        "tcb",
        "an FMC below the minimum, with the key of that TCB",
        |m| {
            let old = Tcb {
                fmc: 0,
                ..tcb(m.product)
            };
            m.put_tcb(old);
            m.certified.0 = old;
            Ok(())
        },
    ),
    signed(
        "turin-fmc-of-another-key",
        "key-tcb",
        "a certificate for an older FMC than the reported one",
        |m| {
            m.certified.0.fmc = 0;
            Ok(())
        },
    ),
    signed(
        "turin-tcb-layout",
        "key-tcb",
        "TCB versions in the layout of Genoa",
        |m| {
            let packed = tcb(m.product).to_bytes(Product::Genoa);
            [0x38, 0x180, 0x1e0, 0x1f0]
                .iter()
                .for_each(|at| m.put(*at, &packed));
            Ok(())
        },
    ),
    signed(
        "turin-chip-tail",
        "key-chip",
        "bytes behind the eight of the chip id",
        |m| put(m, 0x1a8, &[1]),
    ),
    signed(
        "turin-mitigations",
        "reserved",
        "mitigations in a report of version 3",
        |m| put(m, 0, &[3]),
    ),
    signed(
        "turin-processor",
        "product",
        "a processor of Genoa with a key of Turin",
        |m| put(m, 0x188, &[0x19, 0x11, 1]),
    ),
    signed(
        "turin-chain-of-genoa",
        "certificates",
        "ASK and ARK of Genoa",
        |m| {
            let kds = Kds::new(Product::Genoa);
            m.chain = Some([kds.ask()?, kds.ark()?]);
            Ok(())
        },
    ),
];
