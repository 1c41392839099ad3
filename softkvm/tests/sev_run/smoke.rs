//! The cases of the kernel's sev_smoke_test.

use iced_x86::code_asm::*;
use kvm_ops_uapi::run::{SystemEvent, exit_reason, system_event};
use kvm_ops_uapi::state::{XSAVE_SIZE, Xcrs};
use kvm_ops_uapi::system::vm_type::{SEV, SEV_ES, SNP};
use kvm_ops_uapi::{U64, ioctl};

use crate::guest::*;

const EFER: u32 = 0xc000_0080;

/// Ends in #UD, and so in a shutdown, unless the bits of RAX are set.
fn demand(a: &mut CodeAssembler, bits: u32) -> Assembled {
    let mut right = a.create_label();
    a.and(eax, bits)?;
    a.cmp(eax, bits)?;
    a.je(right)?;
    a.ud2()?;
    a.set_label(&mut right)
}

fn demand_equal(a: &mut CodeAssembler) -> Assembled {
    let mut right = a.create_label();
    a.cmp(rax, rbx)?;
    a.je(right)?;
    a.ud2()?;
    a.set_label(&mut right)
}

/// guest_sev_test_regs: each register reads as it was written.
fn registers(a: &mut CodeAssembler) -> Assembled {
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.mov(ebx, eax)?;
    a.wrmsr()?;
    a.rdmsr()?;
    a.mov(eax, eax)?;
    demand_equal(a)?;
    for register in [cr0, cr3, cr4, cr8] {
        a.mov(rbx, register)?;
        a.mov(register, rbx)?;
        a.mov(rax, register)?;
        demand_equal(a)?;
    }
    Ok(())
}

fn status(a: &mut CodeAssembler, bits: u32) -> Assembled {
    a.mov(ecx, STATUS_MSR)?;
    a.rdmsr()?;
    demand(a, bits)
}

/// guest_sev_code.
fn sev(a: &mut CodeAssembler) -> Assembled {
    a.mov(eax, 0x8000_001fu32)?;
    a.cpuid()?;
    demand(a, 1 << 1)?;
    status(a, 1)?;
    registers(a)?;
    a.mov(rdi, 0x1234_5678_u64)?;
    a.in_(eax, dx)?;
    a.mov(eax, edi)?;
    a.out(u32::from(SAY), eax)
}

/// guest_sev_es_code.
fn sev_es(a: &mut CodeAssembler) -> Assembled {
    status(a, 0b11)?;
    registers(a)?;
    terminate(a)
}

/// guest_snp_code.
fn snp(a: &mut CodeAssembler) -> Assembled {
    status(a, 0b111)?;
    registers(a)?;
    terminate(a)
}

/// guest_shutdown_code: no interrupt table.
fn shutdown(a: &mut CodeAssembler) -> Assembled {
    a.ud2()
}

/// guest_code_xsave: the extended state of the start, into shared memory.
fn xsave(a: &mut CodeAssembler) -> Assembled {
    a.mov(eax, 7)?;
    a.xor(edx, edx)?;
    a.mov(rdi, SHARED_VIEW + OPEN + PAGE)?;
    a.xsave(ptr(rdi))?;
    sev_es(a)
}

fn ends(guest: &Guest) {
    let event: SystemEvent = guest.runs_to(exit_reason::SYSTEM_EVENT);
    let told = (event.kind.get(), event.ndata.get(), event.data[0].get());
    assert_eq!(told, (system_event::SEV_TERM, 1, TERMINATE));
}

/// test_sev(guest_sev_code): with and without debugging.
#[test]
fn a_sev_guest_finds_its_features_and_registers_and_talks_by_ports() {
    for policy in [1, 0] {
        let guest = Guest::prepared(SEV, sev);
        guest.launch(policy);
        assert_eq!(guest.run(), exit_reason::IO);
        assert_eq!(guest.regs().rdi.get(), 0x1234_5678);
        assert_eq!(guest.says(), 0x1234_5678);
    }
}

/// test_sev(guest_sev_es_code).
#[test]
fn a_sev_es_guest_finds_its_features_and_registers_and_ends_itself() {
    for policy in [5, 4] {
        let guest = Guest::prepared(SEV_ES, sev_es);
        guest.launch(policy);
        ends(&guest);
    }
}

/// test_sev(guest_snp_code).
#[test]
fn an_snp_guest_finds_its_features_and_registers_and_ends_itself() {
    for policy in [1 << 19, 0] {
        let guest = Guest::prepared(SNP, snp);
        guest.launch(policy);
        ends(&guest);
    }
}

/// test_sev_shutdown.
#[test]
fn a_fault_without_an_interrupt_table_shuts_a_guest_down() {
    for kind in SECRET {
        let guest = Guest::new(kind, shutdown);
        assert_eq!(guest.run(), exit_reason::SHUTDOWN);
    }
}

/// test_sync_vmsa: what SET_XSAVE gave the vCPU is in its save area.
#[test]
fn extended_registers_of_the_start_are_measured_and_the_guests() {
    for kind in SECRET {
        let guest = Guest::prepared(kind, xsave);
        let mut xcrs = Xcrs {
            nr_xcrs: kvm_ops_uapi::U32::new(1),
            ..Xcrs::default()
        };
        xcrs.xcrs[0].value = U64::new(7);
        let set = ioctl::KVM_SET_XCRS;
        guest.w.call(guest.vcpu, set, &xcrs).unwrap();
        let area = state();
        let at = guest.w.task.put(&area);
        guest.w.ioctl(guest.vcpu, ioctl::KVM_SET_XSAVE, at).unwrap();
        guest.launch(if kind == SEV_ES { 4 } else { 0 });
        guest.write(OPEN + PAGE, &[0; 4096]);
        ends(&guest);
        let found: [u8; 832] = guest.read(OPEN + PAGE);
        let differs: Vec<_> = (0..832).filter(|at| found[*at] != area[*at]).collect();
        assert!(differs.is_empty(), "{kind}: {differs:?}");
    }
}

/// x87 with pi in its top register, and all bits of YMM4.
fn state() -> [u8; XSAVE_SIZE] {
    let mut area = [0; XSAVE_SIZE];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[2..4].copy_from_slice(&0x3800u16.to_le_bytes()); // the top is register 7
    area[4] = 0x80;
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[28..32].copy_from_slice(&0x2_ffffu32.to_le_bytes());
    area[32..40].copy_from_slice(&0xc90f_daa2_2168_c000u64.to_le_bytes());
    area[40..42].copy_from_slice(&0x4000u16.to_le_bytes());
    area[160 + 4 * 16..][..16].fill(0xff);
    area[512] = 7;
    area[576 + 4 * 16..][..16].fill(0xff);
    area
}
