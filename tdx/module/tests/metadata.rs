//! Metadata fields and the CPU a TD sees, beyond what the transcripts show: whole chains, random writes, lists,
//! and the questions a processor model asks.

mod common;
#[path = "common/unreplayed.rs"]
mod unreplayed;

use common::{GIB, Td, machine};
use proptest::prelude::*;
use soft_tdx_module::{
    Code, CpuidAnswer, GuestEvent, GuestFlow, GuestLeaf, HostLeaf as L, MsrAccess, MsrAnswer,
    Platform, Regs, Status, VmExit,
};
use std::collections::BTreeSet;

const DEBUG: u64 = 1;
const NULL: u64 = u64::MAX;

fn td(p: &Platform, attributes: u64, l2_vms: u64) -> Td {
    let mut td = Td::partitioned(p, 0x4000_0000, 33, 0, attributes, l2_vms);
    td.tables(p, 0, 0);
    td.add(p, 0, 0);
    td.finalize(p);
    td
}

/// A call on the TD's or vCPU's fields; version 1 where there is one.
fn host(p: &Platform, leaf: L, object: u64, id: u64, value: u64, mask: u64) -> Regs {
    let version = u64::from(matches!(leaf, L::MngRd | L::VpRd)) << 16;
    let mut r = Regs {
        rax: leaf.number() | version,
        rcx: object,
        rdx: id,
        r8: value,
        r9: mask,
        ..Regs::default()
    };
    p.seamcall(0, &mut r).expect("processor");
    r
}

#[test]
fn sys_info_blames_its_operands_in_their_order_and_describes_the_machine() {
    const MOST_CMRS: u64 = 32;
    let p = machine();
    let page = GIB + (8 << 20);
    for ([buffer, bytes, cmrs, entries], expected) in unreplayed::SYS_INFO {
        let mut r = Regs {
            rax: L::SysInfo.number(),
            rcx: page + buffer,
            rdx: bytes,
            r8: page + cmrs,
            r9: entries,
            ..Regs::default()
        };
        let status = p.seamcall(0, &mut r).expect("processor");
        assert_eq!(status.to_string(), expected, "{r:x?}");
        let told = match status == Status::SUCCESS {
            true => (1024, MOST_CMRS),
            false => (0, 0),
        };
        assert_eq!((r.rdx, r.r9), told);
        if status == Status::SUCCESS {
            let word = |at: u64| {
                let mut bytes = [0; 8];
                p.read_memory(page + at, &mut bytes).expect("memory");
                u64::from_le_bytes(bytes)
            };
            assert_eq!(word(buffer + 4) as u32, 0x8086, "VENDOR_ID");
            let first = p.config().cmrs[0];
            assert_eq!((word(cmrs), word(cmrs + 8)), (first.base, first.size));
        }
    }
}

/// Every identifier from the first on, as `read` returns them.
fn chain(mut read: impl FnMut(u64) -> Regs) -> Vec<u64> {
    let first = read(NULL);
    assert_eq!(
        Status(first.rax).code(),
        Code::METADATA_FIRST_FIELD_ID_IN_CONTEXT
    );
    let mut ids = Vec::new();
    let mut id = first.rdx;
    while id != NULL {
        ids.push(id);
        let r = read(id);
        let unreadable = Status(r.rax).code() == Code::METADATA_FIELD_NOT_READABLE;
        assert!(r.rax == 0 || unreadable, "{id:#x}: {}", Status(r.rax));
        // CPUID values that a TD does not have are in the chain, and end it for a reader.
        id = if unreadable { skip(id) } else { r.rdx };
    }
    let unique: BTreeSet<u64> = ids.iter().copied().collect();
    assert_eq!(unique.len(), ids.len(), "an identifier twice");
    ids
}

/// Identifier after a CPUID value that cannot be read: the first one behind the CPUID values.
fn skip(id: u64) -> u64 {
    const MIG_DEC_KEY_SET: u64 = 0x9810_0000_0000_0001;
    assert_eq!(id >> 56 & 0x3F, 0x14, "{id:#x} is a cpuid value");
    MIG_DEC_KEY_SET
}

#[test]
fn chains_visit_every_field_once_and_are_longer_for_debug_tds_and_l2_vms() {
    let p = machine();
    let td = td(&p, DEBUG, 3);
    let debug = chain(|id| host(&p, L::VpRd, td.tdvpr, id, 0, 0)).len();
    let q = machine();
    let td = self::td(&q, 0, 3);
    let production = chain(|id| host(&q, L::VpRd, td.tdvpr, id, 0, 0)).len();
    let r = machine();
    let td = self::td(&r, DEBUG, 0);
    let without_l2 = chain(|id| host(&r, L::VpRd, td.tdvpr, id, 0, 0)).len();
    assert!(production < without_l2 && without_l2 < debug);
    assert!(chain(|id| host(&p, L::SysRd, 0, id, 0, 0)).len() > 300);
}

/// Enters the TD's guest; the caller then plays it.
fn enter(p: &Platform, td: &Td) {
    let mut r = Regs {
        rcx: td.tdvpr,
        ..Regs::leaf(L::VpEnter.number())
    };
    p.seamcall_step(0, &mut r).expect("processor");
}

fn tdcall(p: &Platform, regs: Regs) -> Regs {
    let event = GuestEvent::Tdcall { mode_64bit: true };
    match p.guest_event(0, regs, event, 0).expect("inside") {
        GuestFlow::Resume { guest, .. } => guest,
        GuestFlow::Exit { host } => panic!("left the td: {host:?}"),
    }
}

fn guest_read(p: &Platform, leaf: GuestLeaf, id: u64) -> Regs {
    let version = u64::from(leaf == GuestLeaf::VmRd) << 16;
    tdcall(
        p,
        Regs {
            rdx: id,
            ..Regs::leaf(leaf.number() | version)
        },
    )
}

#[test]
fn a_guests_chains_visit_every_field_once() {
    let p = machine();
    let td = td(&p, 0, 2);
    enter(&p, &td);
    for leaf in [GuestLeaf::VmRd, GuestLeaf::VpRd, GuestLeaf::SysRd] {
        assert!(chain(|id| guest_read(&p, leaf, id)).len() > 10, "{leaf:?}");
    }
}

/// Identifiers and values of a metadata list.
fn parse(list: &[u8]) -> Vec<(u64, u64)> {
    let word = |at: usize| u64::from_le_bytes(list[at..at + 8].try_into().expect("a word"));
    let (size, sequences) = (word(0) as usize & 0xFFFF, word(0) >> 16 & 0xFFFF);
    let (mut at, mut elements) = (8, Vec::new());
    for _ in 0..sequences {
        let header = word(at);
        let count = ((header >> 34 & 0xF) + 1) * ((header >> 38 & 0x1FF) + 1);
        at += 8;
        for i in 0..count {
            let class_and_code = header & !(0x1FFF << 34);
            elements.push((class_and_code + i, word(at)));
            at += 8;
        }
    }
    assert_eq!(at, size);
    elements
}

#[test]
fn a_guests_dump_has_the_values_it_reads_one_by_one() {
    let p = machine();
    let td = td(&p, 0, 0);
    enter(&p, &td);
    let dump = tdcall(
        &p,
        Regs {
            rdx: 0,
            r8: NULL,
            ..Regs::leaf(GuestLeaf::SysRdall.number())
        },
    );
    assert_eq!((dump.rax, dump.r8), (0, NULL));
    let read: Vec<u64> = chain(|id| guest_read(&p, GuestLeaf::SysRd, id))
        .into_iter()
        .map(|id| guest_read(&p, GuestLeaf::SysRd, id).r8)
        .collect();
    let page = *td.given.last().expect("the page of gpa 0");
    let mut list = [0; 4096];
    p.peek_memory(page, &mut list).expect("memory");
    // With encrypted memory a peek shows what the last writer, the TD, sees.
    let listed: Vec<u64> = parse(&list).into_iter().map(|(_, value)| value).collect();
    assert_eq!(listed, read);
}

#[test]
fn a_guests_dump_needs_a_private_page() {
    const SHARED: u64 = 1 << 47;
    let p = machine();
    let td = td(&p, 0, 0);
    enter(&p, &td);
    for gpa in [8, 0x800, SHARED, 1 << 48, 1 << 52] {
        let r = tdcall(
            &p,
            Regs {
                rdx: gpa,
                r8: NULL,
                ..Regs::leaf(GuestLeaf::SysRdall.number())
            },
        );
        let refused = Code::OPERAND_INVALID.on(soft_tdx_module::Operand::RDX);
        assert_eq!(Status(r.rax), refused, "{gpa:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_refused_write_changes_nothing(
        debug in 0..=DEBUG,
        l2_vms in 0u64..4,
        writes in proptest::collection::vec((any::<u32>(), any::<u64>(), any::<u64>(), 0u8..6), 1..200),
    ) {
        let p = machine();
        let td = td(&p, debug, l2_vms);
        let fields: Vec<(L, L, u64, u64)> = [
            (L::MngRd, L::MngWr, td.tdr),
            (L::VpRd, L::VpWr, td.tdvpr),
        ]
        .into_iter()
        .flat_map(|(rd, wr, object)| {
            chain(|id| host(&p, rd, object, id, 0, 0))
                .into_iter()
                .map(move |id| (rd, wr, object, id))
        })
        .collect();
        for (pick, value, mask, shape) in writes {
            let (rd, wr, object, id) = fields[pick as usize % fields.len()];
            let value = match shape { 0 => 0, 1 => NULL, 2 => value & 0x000F_FFFF_FFFF_F000, _ => value };
            let mask = if shape % 2 == 0 { NULL } else { mask };
            let before = host(&p, rd, object, id, 0, 0);
            let written = host(&p, wr, object, id, value, mask);
            let after = host(&p, rd, object, id, 0, 0);
            if written.rax == 0 {
                prop_assert_eq!(written.r8, before.r8, "{:#x} was", id);
            } else {
                prop_assert_eq!(after, before, "{:#x} after {}", id, Status(written.rax));
            }
        }
    }

    #[test]
    fn any_identifier_is_answered(ids in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..200)) {
        let p = machine();
        let td = td(&p, DEBUG, 3);
        for (id, value, mask) in &ids {
            for (rd, wr, object) in [(L::MngRd, L::MngWr, td.tdr), (L::VpRd, L::VpWr, td.tdvpr)] {
                // Few bits of an identifier may be anything.
                let id = id & 0xBF70_0003_00FF_FFFF;
                host(&p, rd, object, id, 0, 0);
                host(&p, wr, object, id, *value, *mask);
            }
        }
        enter(&p, &td);
        for (id, value, mask) in ids {
            for leaf in [GuestLeaf::VmWr, GuestLeaf::VpWr, GuestLeaf::VmRd, GuestLeaf::VpRd] {
                tdcall(&p, Regs { rdx: id & 0xBF70_0003_00FF_FFFF, r8: value, r9: mask, ..Regs::leaf(leaf.number()) });
            }
        }
    }
}

const CR4: u64 = 0x0024_0003_0000_6804;
const RIP: u64 = 0x0024_0003_0000_681E;
const XCR0: u64 = 0x1120_0003_0000_0020;
const VCPU_STATE: u64 = 0xA020_0000_0000_0000;

#[test]
fn a_processor_model_gets_the_cpuid_values_an_exit_leads_to() {
    let p = machine();
    let td = td(&p, 0, 0);
    enter(&p, &td);
    for leaf in (0..0x30)
        .chain(0x4000_0000..0x4000_0004)
        .chain(0x8000_0000..0x8000_000A)
    {
        for subleaf in 0..4u32 {
            let regs = Regs {
                rax: leaf,
                rcx: subleaf.into(),
                ..Regs::default()
            };
            let exit = GuestEvent::Exit(VmExit {
                reason: 10,
                ilen: 2,
                ..VmExit::default()
            });
            let flow = p.guest_event(0, regs, exit, 0).expect("inside");
            let GuestFlow::Resume {
                guest, injected, ..
            } = flow
            else {
                panic!("cpuid {leaf:#x} left the td");
            };
            let answer = p.guest_cpuid(td.tdvpr, leaf as u32, subleaf, 0);
            match answer.expect("a vcpu") {
                CpuidAnswer::Values(v) => {
                    let values = [guest.rax, guest.rbx, guest.rcx, guest.rdx];
                    assert_eq!(values, v.map(u64::from), "{leaf:#x}.{subleaf}");
                }
                CpuidAnswer::VirtualizationException => {
                    assert!(injected.is_some(), "{leaf:#x}.{subleaf}");
                    tdcall(&p, Regs::leaf(GuestLeaf::VpVeinfoGet.number()));
                }
            }
        }
    }
}

#[test]
fn cpuid_follows_the_state_the_processor_saves() {
    const OSXSAVE: u32 = 1 << 27;
    let p = machine();
    let td = td(&p, 0, 0);
    let values = |leaf, subleaf| match p.guest_cpuid(td.tdvpr, leaf, subleaf, 0) {
        Some(CpuidAnswer::Values(v)) => v,
        other => panic!("{leaf:#x}: {other:?}"),
    };
    assert_eq!(values(1, 0)[2] & OSXSAVE, 0);
    let cr4 = p.processor_state(td.tdvpr, CR4).expect("cr4");
    assert!(p.set_processor_state(td.tdvpr, CR4, cr4 | 1 << 18));
    assert_ne!(values(1, 0)[2] & OSXSAVE, 0);
    assert_eq!(values(0xD, 0)[1], 576);
    assert!(p.set_processor_state(td.tdvpr, XCR0, 7));
    assert_eq!(values(0xD, 0)[1], 832, "with avx");
}

#[test]
fn a_processor_model_reads_and_saves_the_guests_state_and_nothing_of_the_modules() {
    let p = machine();
    let td = td(&p, 0, 0);
    assert_eq!(p.processor_state(td.tdvpr, RIP), Some(0xFFFF_FFF0));
    assert!(p.set_processor_state(td.tdvpr, RIP, 0x1234));
    assert_eq!(p.processor_state(td.tdvpr, RIP), Some(0x1234));
    assert!(!p.set_processor_state(td.tdvpr, VCPU_STATE, 8));
    assert!(!p.set_processor_state(td.tdvpr, NULL, 8));
    assert_eq!(p.processor_state(td.tdr, RIP), None, "no vcpu");
    // The TSC of the default TD runs at half the native frequency, from 0 at TDH.MNG.INIT.
    assert_eq!(p.guest_tsc(td.tdvpr), Some(0));
    enter(&p, &td);
    tdcall(&p, Regs::leaf(GuestLeaf::VpInfo.number()));
    assert_eq!(p.guest_tsc(td.tdvpr), Some(500_000));
}

#[test]
fn an_msr_is_direct_exactly_when_its_access_does_not_exit() {
    let p = machine();
    let td = td(&p, 0, 0);
    let mut direct = 0;
    for address in (0..0x2100).chain(0xC000_0000..0xC000_2100) {
        let exits = p.guest_msr_exits(td.tdvpr, address, MsrAccess::Read);
        let answer = p.guest_rdmsr(td.tdvpr, address).expect("a vcpu");
        assert_eq!(exits, Some(answer != MsrAnswer::Direct), "{address:#x}");
        direct += u32::from(answer == MsrAnswer::Direct);
    }
    assert!(
        (10..500).contains(&direct),
        "{direct} msrs are the guest's own"
    );
    let ask = |address| p.guest_rdmsr(td.tdvpr, address).expect("a vcpu");
    assert_eq!(ask(0x1B), MsrAnswer::VirtualizationException, "apic base");
    assert_eq!(ask(0x98), MsrAnswer::GeneralProtection, "wbinvd");
    assert!(
        matches!(ask(0x10A), MsrAnswer::Completed(_)),
        "capabilities"
    );
    assert_eq!(ask(0xC000_0100), MsrAnswer::Direct, "fs base");
}
