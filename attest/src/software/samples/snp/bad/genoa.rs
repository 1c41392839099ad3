//! Reports of Genoa.

use super::super::super::super::Kds;
use super::super::super::super::Revocation;
use super::super::super::TIME;
use super::super::making::old_tcb;
use super::{Bad, later, list, put, revoked, signed};
use crate::snp::{Product, SIGNED_LEN};

const DAY: u64 = 86_400;

/// The bad ones.
pub(in super::super) const GENOA: [Bad; 30] = [
    signed("measurement", "measurement", "another launch digest", |m| {
        put(m, 0x90, &[1])
    }),
    signed(
        "report-data",
        "report-data",
        "other report data: an answer to another nonce",
        |m| put(m, 0x50, &[1]),
    ),
    signed("host-data", "host-data", "other host data", |m| {
        put(m, 0xc0, &[1])
    }),
    signed("vmpl", "vmpl", "asked by VMPL 3", |m| put(m, 0x30, &[3])),
    signed(
        "policy",
        "policy",
        "a policy that allows a migration agent",
        |m| put(m, 0x0a, &[7]),
    ),
    signed(
        "debug",
        "debugging",
        "a policy that allows debugging",
        |m| put(m, 0x0a, &[0xb]),
    ),
    signed(
        "tcb-old",
        "tcb",
        "a TCB below the minimum, with the key of that TCB",
        |m| {
            m.put_tcb(old_tcb(m.product));
            m.certified.0 = old_tcb(m.product);
            Ok(())
        },
    ),
    signed(
        "tcb-of-another-key",
        "key-tcb",
        "a certificate for an older TCB than the reported one",
        |m| {
            m.certified.0 = old_tcb(m.product);
            Ok(())
        },
    ),
    signed(
        "tcb-reserved",
        "key-tcb",
        "reserved bytes of the launch TCB are not zero",
        |m| put(m, 0x1f3, &[1]),
    ),
    signed(
        "chip",
        "chip-id",
        "another chip, with its own certificate",
        |m| {
            m.put(0x1a0, &[1; 64]);
            m.certified.1 = [1; 64];
            Ok(())
        },
    ),
    signed(
        "chip-of-another-key",
        "key-chip",
        "a certificate for another chip",
        |m| {
            m.certified.1 = [1; 64];
            Ok(())
        },
    ),
    signed(
        "chip-masked",
        "key-chip",
        "the host masks the chip id",
        |m| put(m, 0x1a0, &[0; 64]),
    ),
    later(
        "changed",
        "signature",
        "a bit of the launch digest changed after signing",
        |m| put(m, 0x90, &[0x5b]),
    ),
    later("signature-r", "signature", "R is another number", |m| {
        put(m, SIGNED_LEN, &[1, 2, 3])
    }),
    later("signature-zero", "signature", "R and S are zero", |m| {
        put(m, SIGNED_LEN, &[0; 144])
    }),
    later(
        "signature-tail",
        "reserved",
        "bytes behind S are not zero",
        |m| put(m, SIGNED_LEN + 144, &[1]),
    ),
    signed(
        "reserved",
        "reserved",
        "a reserved byte of the report is not zero, and signed",
        |m| put(m, 0x18c, &[1]),
    ),
    Bad {
        name: "unsigned",
        fails: "algorithm",
        about: "the host asked the firmware not to sign",
        before: |m| put(m, 0x48, &[0x1e]),
        after: |m| put(m, SIGNED_LEN, &[0; 144]),
    },
    signed(
        "algorithm",
        "algorithm",
        "another number of the signature's algorithm",
        |m| put(m, 0x34, &[2]),
    ),
    signed(
        "vcek-expired",
        "validity",
        "the VCEK's certificate is expired",
        |m| {
            m.valid = Some((TIME - 2 * DAY, TIME - DAY));
            Ok(())
        },
    ),
    signed("ask-expired", "validity", "the ASK is expired", |m| {
        let kds = Kds::new(m.product);
        m.chain = Some([kds.ask_valid((TIME - 2 * DAY, TIME - DAY))?, kds.ark()?]);
        Ok(())
    }),
    signed(
        "ask-revoked",
        "revocation",
        "the root's list names the ASK",
        |m| {
            let kds = Kds::new(m.product);
            m.crl = list(m.product, revoked(kds.ask()?))?;
            Ok(())
        },
    ),
    signed(
        "crl-old",
        "revocation",
        "the root's list is out of date",
        |m| {
            let validity = (TIME - 2 * DAY, TIME - DAY);
            let old = Revocation {
                validity,
                ..Revocation::default()
            };
            m.crl = list(m.product, old)?;
            Ok(())
        },
    ),
    signed(
        "crl-of-another-root",
        "revocation",
        "the list of another product's root",
        |m| {
            m.crl = list(Product::Milan, Revocation::default())?;
            Ok(())
        },
    ),
    signed(
        "chain-of-another-product",
        "certificates",
        "ASK and ARK of another product",
        |m| {
            let kds = Kds::new(Product::Milan);
            m.chain = Some([kds.ask()?, kds.ark()?]);
            Ok(())
        },
    ),
    signed(
        "processor",
        "product",
        "a processor of another product than the key",
        |m| put(m, 0x188, &[0x1a, 2, 1]),
    ),
    signed(
        "root-forged",
        "root",
        "a root with the right name and another key",
        |m| {
            m.chain = Some(Kds::new(m.product).forged()?);
            Ok(())
        },
    ),
    signed(
        "ask-forged",
        "ask",
        "an ASK that another key than the root's signed",
        |m| {
            let kds = Kds::new(m.product);
            let [ask, _] = kds.forged()?;
            m.chain = Some([ask, kds.ark()?]);
            Ok(())
        },
    ),
    signed(
        "vcek-changed",
        "key",
        "a bit of the signature of the VCEK's certificate changed",
        |m| {
            m.broken_leaf = true;
            Ok(())
        },
    ),
    signed("version", "form", "a version that does not exist", |m| {
        put(m, 0, &[9])
    }),
];
