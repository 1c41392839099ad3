//! Privileged behaviour against tables: page rights, error codes, control registers, MSRs,
//! self-modifying code, exits.

mod common;

use std::sync::Arc;

use common::{Ram, TestBus};
use kvm_ops_cpu::{
    Cause, CodePages, Cpu, CpuidTable, Dispatch, Event, Exit, Segment, Stopped, SvmExit, VmxExit,
};

const CODE: u64 = 0x8000;
const PML4: u64 = 0x10000;
/// Page of the last level that tests change; it maps linear 20_0000H.
const TABLE: u64 = 0x14000;
const TARGET: u64 = 0x20_0000;
const FRAME: u64 = 0x30000;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;

/// A processor in 64-bit mode whose exceptions all exit.
struct Machine {
    cpu: Cpu,
    ram: Arc<Ram>,
    pages: Arc<CodePages>,
}

impl Machine {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut TestBus)) -> Self {
        let ram = Ram::new(0x10_0000);
        let mut bus = TestBus::new(&ram);
        change(&mut bus);
        let pages = CodePages::new(256);
        let mut cpu = Cpu::new(Box::new(bus), pages.clone(), CpuidTable::intel());
        for (at, value) in [
            (PML4, 0x11007),
            (0x11000, 0x12007),
            // Linear 0 to 2 MiB by small supervisor pages, 2 to 4 MiB by the table of the tests.
            (0x12000, 0x13007),
            (0x12008, TABLE | 7),
        ] {
            ram.write_u64(at, value);
        }
        for n in 0..256 {
            ram.write_u64(0x13000 + n * 8, n << 12 | P | W);
        }
        let mut r = cpu.registers();
        let flat = |selector, rights| Segment {
            selector,
            base: 0,
            limit: u32::MAX,
            rights,
        };
        r.segments = [flat(0x10, 0xc093); 6];
        r.segments[1] = flat(0x8, 0xa09b);
        r.cr0 = 0x8001_0033;
        r.cr3 = PML4;
        r.cr4 = 0x620;
        r.efer = 0xd01;
        r.rip = CODE;
        r.gpr[3] = TARGET;
        r.gpr[4] = 0x7000;
        cpu.set_registers(&r);
        cpu.controls_mut().exceptions = u32::MAX;
        Self { cpu, ram, pages }
    }

    fn user(&mut self) {
        let mut r = self.cpu.registers();
        for s in &mut r.segments {
            s.rights |= 0x60;
            s.selector |= 3;
        }
        // A task state segment at 0 whose I/O bitmap begins after its end.
        r.tr.limit = 0x67;
        self.ram.write(0x66, &[0x68, 0]);
        self.cpu.set_registers(&r);
        for n in 0..256 {
            self.ram.write_u64(0x13000 + n * 8, n << 12 | P | W | U);
        }
    }

    fn cr4(&mut self, bits: u64) {
        let mut r = self.cpu.registers();
        r.cr4 |= bits;
        self.cpu.set_registers(&r);
    }

    fn code(&mut self, bytes: &[u8]) {
        self.ram.write(CODE, bytes);
        self.pages.written(CODE, bytes.len());
        self.cpu.set_rip(CODE);
    }

    fn exception(&mut self, instructions: u64) -> Option<Event> {
        match self.cpu.run(instructions) {
            Stopped::Budget => None,
            Stopped::Exit(Exit {
                cause: Cause::Exception(e),
                ..
            }) => Some(e),
            other => panic!("{other:?}"),
        }
    }

    fn exit(&mut self) -> Exit {
        match self.cpu.run(1000) {
            Stopped::Exit(exit) => exit,
            other => panic!("{other:?}"),
        }
    }
}

/// mov al, [rbx]; mov [rbx], al; jmp rbx
const READ: &[u8] = &[0x8a, 0x03];
const WRITE: &[u8] = &[0x88, 0x03];
const FETCH: &[u8] = &[0xff, 0xe3];

const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;

#[test]
fn page_rights_give_the_error_codes_of_the_manuals() {
    // Entry, CPL 3, CR4 bits, access, error code of the page fault.
    type Row = (u64, bool, u64, &'static [u8], Option<u32>);
    let rows: &[Row] = &[
        (0, false, 0, READ, Some(0)),
        (0, false, 0, WRITE, Some(2)),
        (0, false, 0, FETCH, Some(0x10)),
        (0, true, 0, READ, Some(4)),
        (0, true, 0, WRITE, Some(6)),
        (0, true, 0, FETCH, Some(0x14)),
        (P, false, 0, READ, None),
        (P, false, 0, WRITE, Some(3)),
        (P | W, false, 0, WRITE, None),
        (P | W, false, 0, FETCH, None),
        (P | W, true, 0, READ, Some(5)),
        (P | W, true, 0, WRITE, Some(7)),
        (P | U, true, 0, READ, None),
        (P | U, true, 0, WRITE, Some(7)),
        (P | W | U, true, 0, WRITE, None),
        (P | W | U | NX, true, 0, WRITE, None),
        (P | W | U | NX, true, 0, FETCH, Some(0x15)),
        (P | W | NX, false, 0, FETCH, Some(0x11)),
        (P | W | U, false, 0, FETCH, None),
        (P | W | U, false, SMEP, FETCH, Some(0x11)),
        (P | W | U, false, SMAP, READ, Some(1)),
        (P | W | U, false, SMAP, WRITE, Some(3)),
        (P | W | U, false, SMAP, FETCH, None),
        (P | W | U, true, SMAP | SMEP, WRITE, None),
        (P | W | U | 1 << 51, false, 0, READ, Some(9)),
        (P | W | U | 1 << 51, true, 0, WRITE, Some(0xf)),
        // Keys: PKRU denies writes to key 1 and all to key 2.
        (P | W | U | 1 << 59, true, PKE, READ, None),
        (P | W | U | 1 << 59, true, PKE, WRITE, Some(0x27)),
        (P | W | U | 2 << 59, true, PKE, READ, Some(0x25)),
        (P | W | U | 2 << 59, true, PKE, FETCH, None),
        (P | W | 2 << 59, false, PKE, READ, None),
    ];
    for (row, (entry, user, cr4, access, code)) in rows.iter().enumerate() {
        let mut m = Machine::new();
        if *user {
            m.user();
        }
        m.cr4(*cr4);
        if cr4 & PKE != 0 {
            // xor ecx, ecx; xor edx, edx; mov eax, 18H; wrpkru
            m.code(&[
                0x31, 0xc9, 0x31, 0xd2, 0xb8, 0x18, 0, 0, 0, 0x0f, 0x01, 0xef,
            ]);
            assert_eq!(m.exception(4), None, "row {row}: wrpkru");
        }
        m.ram
            .write_u64(TABLE, if *entry == 0 { 0 } else { FRAME | entry });
        m.ram.write(FRAME, &[0x90; 16]);
        m.code(access);
        // A jump faults when its target is fetched.
        let found = m.exception(if *access == FETCH { 2 } else { 1 });
        assert_eq!(
            found.and_then(|e| e.code),
            *code,
            "row {row}: {entry:#x} {cr4:#x} {access:x?}"
        );
        if let Some(e) = found {
            assert_eq!((e.vector, e.address), (14, Some(TARGET)), "row {row}");
        }
        let marked = m.ram.read_u64(TABLE) & 0x60;
        let expected = match (code, *access == WRITE) {
            (None, false) => 0x20,
            (None, true) => 0x60,
            _ => 0,
        };
        assert_eq!(marked, expected, "row {row}: accessed and dirty");
    }
}

#[test]
fn a_read_does_not_set_dirty_and_a_later_write_does() {
    let mut m = Machine::new();
    m.ram.write_u64(TABLE, FRAME | P | W);
    m.code(READ);
    assert_eq!(m.exception(1), None);
    assert_eq!(m.ram.read_u64(TABLE) & 0x60, 0x20);
    m.code(WRITE);
    assert_eq!(m.exception(1), None);
    assert_eq!(m.ram.read_u64(TABLE) & 0x60, 0x60);
}

#[test]
fn five_levels_reach_what_four_do_not() {
    let mut m = Machine::new();
    m.ram.write_u64(TABLE, FRAME | P | W);
    m.ram.write(FRAME, &[0x5a]);
    // Entry 0 keeps the code; entry 1 maps the same 512 GiB at 2^48.
    m.ram.write_u64(0x15000, PML4 | 7);
    m.ram.write_u64(0x15008, PML4 | 7);
    m.cpu.set_gpr(3, TARGET + (1 << 48));
    m.code(READ);
    assert_eq!(
        m.exception(1).map(|e| (e.vector, e.code)),
        Some((13, Some(0))),
        "not canonical"
    );
    let mut r = m.cpu.registers();
    r.cr4 |= 1 << 12;
    r.cr3 = 0x15000;
    m.cpu.set_registers(&r);
    assert_eq!(m.exception(1), None);
    assert_eq!(m.cpu.gpr(0) & 0xff, 0x5a);
}

/// A processor in flat 32-bit code with paging, a page of 4 KiB at `TARGET`.
fn protected(pae: bool, entry: u64) -> Machine {
    let mut m = Machine::new();
    let wide = |at: u64, value: u64| m.ram.write_u64(at, value);
    if pae {
        wide(PML4, 0x11001);
        wide(0x11000, 0x13000 | P | W | U);
        wide(0x11008, TABLE | P | W | U);
        wide(TABLE, entry);
    } else {
        // 4 KiB pages; the table serves the first 4 MiB.
        for n in (0..1024u64).step_by(2) {
            let page = |n: u64| if n < 256 { n << 12 | P | W } else { 0 };
            wide(0x16000 + n * 4, page(n) | page(n + 1) << 32);
        }
        wide(PML4, 0x16000 | P | W | U);
        wide(0x16000 + (TARGET >> 12) * 4, entry);
    }
    let mut r = m.cpu.registers();
    r.segments[1].rights = 0xc09b;
    r.efer = if pae { 0x800 } else { 0 };
    r.cr4 = if pae { 0x620 } else { 0x610 };
    m.cpu.set_registers(&r);
    m
}

#[test]
fn two_and_three_levels_translate_and_fault_in_32_bit_code() {
    for pae in [false, true] {
        for (entry, access, code) in [
            (FRAME | P | W, WRITE, None),
            (FRAME | P, READ, None),
            (FRAME | P, WRITE, Some(3)),
            (0, READ, Some(0)),
        ] {
            let mut m = protected(pae, entry);
            m.ram.write(FRAME, &[7]);
            m.cpu.set_gpr(0, 9);
            m.code(access);
            let e = m.exception(1);
            assert_eq!(e.and_then(|e| e.code), code, "pae {pae}, entry {entry:#x}");
            if code.is_none() && access == READ {
                assert_eq!(m.cpu.gpr(0), 7);
            } else if code.is_none() {
                assert_eq!(m.ram.read_u64(FRAME) & 0xff, 9);
            }
        }
    }
    let mut m = protected(true, FRAME | P | NX);
    m.code(FETCH);
    assert_eq!(m.exception(2).and_then(|e| e.code), Some(0x11));
}

#[test]
fn real_mode_segments_lead_to_their_own_code() {
    let mut m = Machine::new();
    m.cpu.reset();
    // 0500:0000 and 0600:0000 differ; each is reached twice through the same IP.
    // inc bx; jmp 0600:0000 / inc cx; cmp cx, 2; je +5; jmp 0500:0000; hlt
    m.ram.write(0x5000, &[0x43, 0xea, 0, 0, 0, 6]);
    m.ram.write(
        0x6000,
        &[0x41, 0x83, 0xf9, 2, 0x74, 5, 0xea, 0, 0, 0, 5, 0xf4],
    );
    let mut r = m.cpu.registers();
    r.segments[1].selector = 0x500;
    r.segments[1].base = 0x5000;
    r.rip = 0;
    m.cpu.set_registers(&r);
    assert_eq!(m.cpu.run(100), Stopped::Halted);
    assert_eq!((m.cpu.gpr(3), m.cpu.gpr(1)), (2, 2));
}

#[test]
fn a_changed_entry_counts_after_invlpg() {
    let mut m = Machine::new();
    m.ram.write_u64(TABLE, FRAME | P);
    m.ram.write(FRAME, &[1]);
    m.ram.write(FRAME + 0x1000, &[2]);
    m.code(READ);
    assert_eq!(m.exception(1), None);
    m.ram.write_u64(TABLE, (FRAME + 0x1000) | P);
    // invlpg [rbx]; mov al, [rbx]
    m.code(&[0x0f, 0x01, 0x3b, 0x8a, 0x03]);
    assert_eq!(m.exception(2), None);
    assert_eq!(m.cpu.gpr(0) & 0xff, 2);
}

#[test]
fn stac_opens_user_pages_and_clac_closes_them() {
    let mut m = Machine::new();
    m.cr4(SMAP);
    m.ram.write_u64(TABLE, FRAME | P | W | U);
    // stac; mov al, [rbx]; clac; mov al, [rbx]
    m.code(&[0x0f, 0x01, 0xcb, 0x8a, 0x03, 0x0f, 0x01, 0xca, 0x8a, 0x03]);
    assert_eq!(m.exception(3), None);
    assert_eq!(m.exception(1).and_then(|e| e.code), Some(1));
}

#[test]
fn control_registers_refuse_what_the_manuals_reserve() {
    // Register, value.
    let rows: &[(u8, u64)] = &[
        (0, 0x8000_0010),
        (0, 0xa001_0033),
        (0, 1 << 32),
        (0, 0x33),
        (4, 0x600),
        (4, 0x620 | 1 << 31),
        (4, 0x620 | 1 << 12),
        (3, 1 << 50),
        (8, 16),
    ];
    for (register, value) in rows {
        let mut m = Machine::new();
        m.cpu.set_gpr(0, *value);
        // mov crN, rax
        let bytes: &[u8] = match register {
            8 => &[0x44, 0x0f, 0x22, 0xc0],
            n => &[0x0f, 0x22, 0xc0 | n << 3],
        };
        m.code(bytes);
        let e = m
            .exception(1)
            .unwrap_or_else(|| panic!("cr{register} took {value:#x}"));
        assert_eq!((e.vector, e.code), (13, Some(0)), "cr{register} {value:#x}");
        assert_eq!(m.cpu.rip(), CODE);
    }
}

#[test]
fn msrs_that_take_addresses_refuse_those_that_are_not_canonical() {
    let mut m = Machine::new();
    for msr in [
        0x175,
        0x176,
        0xc000_0082,
        0xc000_0083,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
    ] {
        assert_eq!(m.cpu.write_msr(msr, 1 << 56), None, "{msr:#x}");
        // The width that counts is the processor's, and not that of the paging mode.
        assert_eq!(m.cpu.write_msr(msr, 1 << 47), Some(()), "{msr:#x}");
        assert_eq!(
            m.cpu.write_msr(msr, 0xffff_8000_0000_0000),
            Some(()),
            "{msr:#x}"
        );
        assert_eq!(m.cpu.read_msr(msr), Some(0xffff_8000_0000_0000), "{msr:#x}");
    }
    assert_eq!(m.cpu.read_msr(0x1234), None);
    assert_eq!(m.cpu.write_msr(0xc000_0080, 1 << 20), None);
}

#[test]
fn privileged_instructions_fault_at_cpl_3_without_effect() {
    let rows: &[&[u8]] = &[
        &[0xf4],
        &[0x0f, 0x30],
        &[0x0f, 0x32],
        &[0x0f, 0x20, 0xc0],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x01, 0x13],
        &[0x0f, 0x01, 0x1b],
        &[0x0f, 0x00, 0xd8],
        &[0x0f, 0x01, 0x3b],
        &[0x0f, 0x06],
        &[0x0f, 0x09],
        &[0x0f, 0x01, 0xf8],
        &[0xfa],
        &[0xe4, 0x80],
        &[0xee],
    ];
    for bytes in rows {
        let mut m = Machine::new();
        m.user();
        m.ram.write_u64(TABLE, FRAME | P | W | U);
        m.code(bytes);
        let before = m.cpu.registers();
        let e = m.exception(1);
        assert_eq!(
            e.map(|e| (e.vector, e.code)),
            Some((13, Some(0))),
            "{bytes:x?}"
        );
        assert_eq!(m.cpu.registers(), before, "{bytes:x?}");
    }
}

fn amd() -> Machine {
    let mut m = Machine::new();
    m.cpu.set_cpuid(CpuidTable::amd());
    m
}

#[test]
fn amds_processors_keep_the_low_half_of_sysenters_addresses_and_of_tsc_aux() {
    const VALUE: u64 = 0xaaaa_5555_1234_5678;
    for msr in [0x175, 0x176, 0xc000_0103] {
        let mut m = amd();
        assert_eq!(m.cpu.write_msr(msr, VALUE), Some(()), "{msr:#x}");
        assert_eq!(m.cpu.read_msr(msr), Some(0x1234_5678), "{msr:#x}");
        assert_eq!(Machine::new().cpu.write_msr(msr, VALUE), None, "{msr:#x}");
    }
}

#[test]
fn tsc_aux_is_there_for_rdtscp_or_rdpid_and_from_outside_in_any_case() {
    const TSC_AUX: u32 = 0xc000_0103;
    for (rdtscp, rdpid) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut table = CpuidTable::intel();
        let (mut extended, mut structured) = (table.get(0x8000_0001, 0), table.get(7, 0));
        if !rdtscp {
            extended.edx &= !(1 << 27);
        }
        if !rdpid {
            structured.ecx &= !(1 << 22);
        }
        table.set(0x8000_0001, 0, extended);
        table.set(7, 0, structured);
        let mut m = Machine::new();
        m.cpu.set_cpuid(table);
        m.cpu.set_tsc_aux(5);
        let there = rdtscp || rdpid;
        assert_eq!(m.cpu.read_msr(TSC_AUX), there.then_some(5));
        assert_eq!(m.cpu.write_msr(TSC_AUX, 6), there.then_some(()));
        assert_eq!(m.cpu.tsc_aux(), if there { 6 } else { 5 });
    }
}

/// KVM's values of HWCR: two bits can be set, three are ignored, and all others are refused.
#[test]
fn hwcr_takes_the_bits_that_kvm_takes_on_amds_processors() {
    const HWCR: u32 = 0xc001_0015;
    assert_eq!(Machine::new().cpu.read_msr(HWCR), None, "Intel's has none");
    for bit in 0..64 {
        let mut m = amd();
        let (taken, kept) = match bit {
            3 | 6 | 8 => (true, 0),
            18 | 24 => (true, 1 << bit),
            _ => (false, 0),
        };
        assert_eq!(m.cpu.write_msr(HWCR, 1 << bit).is_some(), taken, "{bit}");
        assert_eq!(m.cpu.read_msr(HWCR), Some(kept), "{bit}");
    }
}

#[test]
fn a_bank_of_machine_checks_takes_a_status_where_hwcr_says_so() {
    let mut m = amd();
    m.cpu.set_mce(1);
    assert_eq!(m.cpu.write_msr(0x401, 5), None);
    assert_eq!(m.cpu.write_msr(0xc001_0015, 1 << 18), Some(()));
    assert_eq!(m.cpu.write_msr(0x401, 5), Some(()));
    assert_eq!(m.cpu.read_msr(0x401), Some(5));
}

/// KVM refuses a guest's write that would change what is unavailable.
#[test]
fn misc_enable_keeps_what_is_unavailable() {
    let mut m = Machine::new();
    for (value, taken) in [(0x1800, true), (0x1801, true), (1, false), (0x800, false)] {
        assert_eq!(m.cpu.write_msr(0x1a0, value).is_some(), taken, "{value:#x}");
    }
    assert_eq!(m.cpu.read_msr(0x1a0), Some(0x1801));
}

/// AMD64 Architecture Programmer's Manual, volume 3, RDPMC: four counters, which have 48 bits and which CR4.PCE opens to
/// programs. Processors without counters refuse each number.
#[test]
fn rdpmc_reads_amds_counters_and_refuses_numbers_that_there_are_not() {
    const RDPMC: &[u8] = &[0x0f, 0x33];
    const PCE: u64 = 1 << 8;
    const VALUE: u64 = 0x1_89ab_cdef_0123;
    let read = |table: CpuidTable, number: u32, user: bool, cr4: u64| {
        let mut m = Machine::new();
        m.cpu.set_cpuid(table);
        assert_eq!(
            m.cpu.write_msr(0xc001_0005, VALUE).is_some(),
            m.cpu.cpuid(0, 0).ebx == 0x6874_7541
        );
        m.cr4(cr4);
        if user {
            m.user();
        }
        m.code(RDPMC);
        m.cpu.set_gpr(1, number.into());
        m.cpu.set_gpr(0, u64::MAX);
        match m.exception(1) {
            None => Ok(m.cpu.gpr(2) << 32 | m.cpu.gpr(0)),
            Some(e) => Err((e.vector, e.code)),
        }
    };
    let gp = Err((13, Some(0)));
    let amd = CpuidTable::amd;
    assert_eq!(read(amd(), 1, false, 0), Ok(VALUE & 0xffff_ffff_ffff));
    assert_eq!(read(amd(), 0, false, 0), Ok(0));
    assert_eq!(read(amd(), 1, true, PCE), Ok(VALUE & 0xffff_ffff_ffff));
    assert_eq!(read(amd(), 1, true, 0), gp);
    assert_eq!(read(amd(), 4, false, 0), gp);
    assert_eq!(read(amd(), u32::MAX, false, 0), gp);
    assert_eq!(read(CpuidTable::intel(), 1, false, 0), gp);
}

#[test]
fn a_store_into_the_block_that_runs_counts_at_once() {
    for dispatch in [Dispatch::Tail, Dispatch::Loop] {
        let mut m = Machine::new();
        m.cpu.set_dispatch(dispatch);
        m.cpu.set_gpr(3, CODE + 6);
        // mov byte [rbx], 7; nop x 2; mov al, 1 (its immediate becomes 7); hlt
        m.code(&[0xc6, 0x03, 0x07, 0x90, 0x90, 0xb0, 0x01, 0xf4]);
        assert_eq!(m.cpu.run(100), Stopped::Halted);
        assert_eq!(m.cpu.gpr(0) & 0xff, 7);
        assert_eq!(m.cpu.retired(), 5);
    }
}

#[test]
fn a_loop_that_rewrites_itself_runs_the_new_code_each_time() {
    let mut m = Machine::new();
    m.cpu.set_gpr(3, CODE + 3);
    m.cpu.set_gpr(1, 10);
    // 0: add eax, imm8 is at 1: xor edx, edx... the immediate at 3 counts down by 1 a turn.
    // nop; add eax, 10; dec byte [rbx]; dec ecx; jnz 0; hlt
    m.code(&[
        0x90, 0x83, 0xc0, 0x0a, 0xfe, 0x0b, 0xff, 0xc9, 0x75, 0xf6, 0xf4,
    ]);
    m.cpu.set_gpr(0, 0);
    assert_eq!(m.cpu.run(1000), Stopped::Halted);
    assert_eq!(m.cpu.gpr(0), 55);
}

#[test]
fn a_fault_in_the_middle_of_a_block_leaves_the_state_before_its_instruction() {
    let mut m = Machine::new();
    m.ram.write_u64(TABLE, 0);
    m.cpu.set_gpr(0, 5);
    // inc eax; inc eax; add [rbx], eax; inc eax
    m.code(&[0xff, 0xc0, 0xff, 0xc0, 0x01, 0x03, 0xff, 0xc0]);
    let e = m.exception(4);
    assert_eq!(
        e.and_then(|e| e.code),
        Some(2),
        "the read of a read-modify-write is a write"
    );
    assert_eq!((m.cpu.gpr(0), m.cpu.rip()), (7, CODE + 4));
}

#[test]
fn guest_instructions_exit_with_their_lengths() {
    // Bytes, cause, VMX reason, SVM code.
    type Row = (&'static [u8], Cause, Option<u16>, Option<u64>);
    let rows: &[Row] = &[
        (&[0x66, 0x0f, 0x01, 0xcc], Cause::Tdcall, Some(77), None),
        (&[0x66, 0x0f, 0x01, 0xcf], Cause::Seamcall, Some(76), None),
        (&[0x0f, 0x01, 0xc1], Cause::Vmcall, Some(18), None),
        (&[0x0f, 0x01, 0xd9], Cause::Vmmcall, None, Some(0x81)),
        (&[0xf3, 0x0f, 0x01, 0xd9], Cause::Vmgexit, None, Some(0x403)),
        (&[0xf2, 0x0f, 0x01, 0xff], Cause::Pvalidate, None, None),
        (&[0xf3, 0x0f, 0x01, 0xfe], Cause::Rmpadjust, None, None),
        (&[0xf2, 0x0f, 0x01, 0xfe], Cause::Rmpupdate, None, None),
        (&[0xf3, 0x0f, 0x01, 0xff], Cause::Psmash, None, None),
        (&[0x0f, 0xa2], Cause::Cpuid, Some(10), Some(0x72)),
        (&[0xf4], Cause::Hlt, Some(12), Some(0x78)),
        (&[0x0f, 0x32], Cause::Rdmsr, Some(31), Some(0x7c)),
        (&[0x0f, 0x30], Cause::Wrmsr, Some(32), Some(0x7c)),
        (&[0x0f, 0x09], Cause::Wbinvd, Some(54), Some(0x89)),
    ];
    for (bytes, cause, vmx, svm) in rows {
        let mut m = Machine::new();
        *m.cpu.controls_mut() = kvm_ops_cpu::Controls::confidential();
        m.code(bytes);
        let exit = m.exit();
        assert_eq!(
            (exit.cause, exit.len as usize),
            (*cause, bytes.len()),
            "{bytes:x?}"
        );
        assert_eq!(exit.vmx().map(|v: VmxExit| v.reason), *vmx, "{bytes:x?}");
        assert_eq!(exit.svm(0).map(|s: SvmExit| s.code), *svm, "{bytes:x?}");
        assert_eq!(m.cpu.rip(), CODE);
        m.cpu.skip(&exit);
        assert_eq!(m.cpu.rip(), CODE + bytes.len() as u64);
    }
}

#[test]
fn a_refused_page_is_a_violation_with_both_addresses() {
    let mut m = Machine::with(|bus| bus.refused = Some(FRAME));
    m.ram.write_u64(TABLE, FRAME | P | W);
    m.code(WRITE);
    let exit = m.exit();
    assert_eq!((exit.linear, exit.physical), (Some(TARGET), Some(FRAME)));
    assert_eq!(
        exit.vmx().map(|v| (v.reason, v.qualification & 0x187)),
        Some((48, 0x182))
    );
    assert_eq!(m.cpu.rip(), CODE);
}

#[test]
fn string_output_without_a_device_exits_for_each_element_and_goes_on() {
    let mut m = Machine::new();
    m.ram.write(0x5000, b"abc");
    m.cpu.set_gpr(6, 0x5000);
    m.cpu.set_gpr(1, 3);
    m.cpu.set_gpr(2, 0x3f8);
    // rep outsb; hlt
    m.code(&[0xf3, 0x6e, 0xf4]);
    let mut seen = Vec::new();
    for left in [2, 1, 0] {
        let exit = m.exit();
        let Cause::Io(io) = exit.cause else {
            panic!("{exit:?}")
        };
        assert!(io.string && io.repeat && !io.input);
        seen.push(io.value as u8);
        m.cpu.complete_io(&exit, 0).expect("an I/O exit");
        assert_eq!(m.cpu.gpr(1), left);
    }
    assert_eq!(seen, b"abc");
    assert_eq!(m.cpu.run(10), Stopped::Halted);
}

#[test]
fn what_is_not_implemented_is_ud_and_named() {
    let mut m = Machine::new();
    // vmxoff; vpdpbusd xmm1, xmm1, xmm2; monitor
    for bytes in [
        &[0x0fu8, 0x01, 0xc4][..],
        &[0xc4, 0xe2, 0x71, 0x50, 0xca],
        &[0x0f, 0x01, 0xc8],
    ] {
        m.code(bytes);
        assert_eq!(m.exception(1).map(|e| e.vector), Some(6), "{bytes:x?}");
    }
    let names: Vec<String> = m.cpu.missing().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    // UD2 is defined to fault, so it is not missing.
    m.code(&[0x0f, 0x0b]);
    assert_eq!(m.exception(1).map(|e| e.vector), Some(6));
    assert_eq!(m.cpu.missing().len(), 3);
}

#[test]
fn an_instruction_of_more_than_15_bytes_is_gp() {
    const PREFIX: u8 = 0x66;
    const NOP: u8 = 0x90;
    let mut m = Machine::new();
    m.code(&[&[PREFIX; 14][..], &[NOP]].concat());
    assert_eq!(m.cpu.run(1), Stopped::Budget);
    assert_eq!(m.cpu.rip(), CODE + 15);
    // A NOP before it is executed.
    m.code(&[&[NOP][..], &[PREFIX; 15], &[NOP]].concat());
    let e = m.exception(2).expect("an exception");
    assert_eq!((e.vector, e.code, m.cpu.rip()), (13, Some(0), CODE + 1));
    // Prefixes before UD2 and before an opcode that there is not change nothing.
    for opcode in [[0x0f, 0x0b], [0x0f, 0xff]] {
        m.code(&[&[PREFIX; 3][..], &opcode].concat());
        assert_eq!(m.exception(1).map(|e| e.vector), Some(6));
    }
}

#[test]
fn an_event_that_faults_while_it_is_delivered_exits_with_its_vectoring() {
    let mut m = Machine::new();
    // No interrupt table: #GP while interrupt 33 is delivered.
    let exit = m.cpu.inject(Event::interrupt(33)).expect("an exit");
    let Cause::Exception(e) = exit.cause else {
        panic!("{exit:?}")
    };
    assert_eq!(e.vector, 13);
    assert_eq!(exit.vectoring.map(|v| v.vector), Some(33));
    assert_eq!(exit.vmx().map(|v| v.vectoring), Some(0x8000_0021));
}

#[test]
fn bits_of_cr4_and_instructions_of_a_feature_go_with_its_cpuid_bit() {
    // Leaf, register (1 EBX, 2 ECX), bit, and the bit of CR4.
    for (leaf, register, bit, cr4) in [
        (1, 2, 26, 18),
        (7, 1, 0, 16),
        (7, 1, 7, 20),
        (7, 1, 20, 21),
        (7, 2, 2, 11),
        (7, 2, 3, 22),
        (7, 2, 31, 24),
    ] {
        for offered in [true, false] {
            let mut m = Machine::new();
            let mut table = CpuidTable::intel();
            let mut value = table.get(leaf, 0);
            let word = match register {
                1 => &mut value.ebx,
                _ => &mut value.ecx,
            };
            assert_ne!(*word >> bit & 1, 0, "offered as it is");
            *word &= !(u32::from(!offered) << bit);
            table.set(leaf, 0, value);
            m.cpu.set_cpuid(table);
            let old = m.cpu.registers().cr4;
            m.cpu.set_gpr(0, old | 1 << cr4);
            m.code(&[0x0f, 0x22, 0xe0]); // mov cr4, rax
            let fault = m.exception(1).map(|e| e.vector);
            assert_eq!(fault, (!offered).then_some(13), "CR4 bit {cr4}");
        }
    }
    // INVPCID
    let mut m = Machine::new();
    let mut table = CpuidTable::intel();
    let mut value = table.get(7, 0);
    value.ebx &= !(1 << 10);
    table.set(7, 0, value);
    m.cpu.set_cpuid(table);
    m.code(&[0x66, 0x0f, 0x38, 0x82, 0x08]);
    assert_eq!(m.exception(1).map(|e| e.vector), Some(6));
}

#[test]
fn an_access_whose_last_byte_is_not_canonical_is_a_general_protection_fault_before_a_page_fault() {
    // mov rax, [rbx]; mov [rbx], rax
    for code in [[0x48, 0x8b, 0x03], [0x48, 0x89, 0x03]] {
        for (address, vector) in [(0x7fff_ffff_fff8, 14), (0x7fff_ffff_fff9, 13)] {
            let mut m = Machine::new();
            m.cpu.set_gpr(3, address);
            m.code(&code);
            let exception = m.exception(1).expect("no page is there");
            assert_eq!(exception.vector, vector, "{address:#x}");
        }
    }
}

#[test]
fn debug_registers_that_do_not_exist_are_ud_at_every_cpl() {
    // mov rax, dr4; mov dr5, rax
    for code in [[0x0f, 0x21, 0xe0], [0x0f, 0x23, 0xe8]] {
        for (extensions, user, vector) in [
            (0, false, None),
            (0, true, Some(13)),
            (8, false, Some(6)),
            (8, true, Some(6)),
        ] {
            let mut m = Machine::new();
            if user {
                m.user();
            }
            m.cr4(extensions);
            m.code(&code);
            assert_eq!(m.exception(1).map(|e| e.vector), vector);
        }
    }
}
