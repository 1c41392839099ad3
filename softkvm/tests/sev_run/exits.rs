//! Exits of SEV guests, and their completion by the next run.

use iced_x86::code_asm::*;
use kvm_ops_uapi::checks::run;
use kvm_ops_uapi::run::{
    Hypercall, Io, MemoryFault, Mmio, MsrExit, SnpReqCerts, SystemEvent, exit_reason, system_event,
};
use kvm_ops_uapi::sev::{self, SevInit};
use kvm_ops_uapi::system::vm_type::{SEV, SEV_ES, SNP};
use kvm_ops_uapi::vm::msr_exit_reason;
use kvm_ops_uapi::{Errno, U64, cap, ioctl};

use crate::guest::*;

const MAP_GPA_RANGE: u64 = 12;
const ENCRYPTED: u64 = 1 << 4;
/// The upper half of the answer to a page state change that failed.
const PSC_ERROR: u32 = 1 << 31;

/// Says EAX by a port, as a guest does whose registers its host sees.
fn say_eax(a: &mut CodeAssembler) -> Assembled {
    a.out(u32::from(SAY), eax)
}

#[test]
fn a_hypercall_of_a_sev_guest_leaves_with_its_arguments_and_takes_any_answer() {
    let guest = Guest::new(SEV, |a| {
        for _ in 0..2 {
            a.mov(eax, MAP_GPA_RANGE as u32)?;
            a.mov(ebx, 0x4000)?;
            a.mov(ecx, 3)?;
            a.mov(edx, (ENCRYPTED | 1) as u32)?;
            a.vmmcall()?;
            say_eax(a)?;
        }
        Ok(())
    });
    assert_eq!(guest.says() as i32, -1000, "it was not asked for");
    guest.allow_conversions();
    let exit: Hypercall = guest.runs_to(exit_reason::HYPERCALL);
    assert_eq!(exit.nr.get(), MAP_GPA_RANGE);
    let args = exit.args.map(U64::get);
    assert_eq!(args, [0x4000, 3, ENCRYPTED | 1, 0, 0, 0]);
    assert_eq!((exit.ret.get(), exit.flags.get()), (0, 1));
    guest.answer(&Hypercall {
        ret: U64::new(77),
        ..exit
    });
    assert_eq!(guest.says(), 77);
}

#[test]
fn a_sev_guest_uses_ports_and_devices_as_any_other() {
    let guest = Guest::new(SEV, |a| {
        a.in_(eax, 0x90u32)?;
        say_eax(a)?;
        a.mov(rbx, DEVICE)?;
        a.mov(eax, dword_ptr(rbx + 4))?;
        say_eax(a)
    });
    let io: Io = guest.runs_to(exit_reason::IO);
    assert_eq!((io.direction, io.size, io.port.get()), (0, 4, 0x90));
    let data = 0x1122_3344u32.to_le_bytes();
    guest.area().write(io.data_offset.get(), &data);
    assert_eq!(guest.says(), 0x1122_3344);
    let mmio: Mmio = guest.runs_to(exit_reason::MMIO);
    let place = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(place, (DEVICE + 4, 4, 0), "the C-bit is no part of it");
}

#[test]
fn a_device_without_the_c_bit_is_a_device() {
    let guest = Guest::new(SEV, |a| {
        a.mov(rbx, SHARED_VIEW + DEVICE)?;
        a.mov(eax, dword_ptr(rbx + 4))?;
        say_eax(a)
    });
    let mmio: Mmio = guest.runs_to(exit_reason::MMIO);
    assert_eq!(
        (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write),
        (DEVICE + 4, 4, 0)
    );
    guest.answer(&Mmio {
        data: 0x0badu64.to_le_bytes(),
        ..mmio
    });
    assert_eq!(guest.says(), 0x0bad);
}

#[test]
fn a_message_to_other_vcpus_by_the_local_apics_page_is_sent_once() {
    const COMMAND: u64 = 0xfee0_0300;
    /// INIT to all but the sender.
    const INIT: u32 = 0xc_4500;
    let guest = Guest::prepared_by(
        SEV,
        |a| {
            a.mov(rbx, COMMAND)?;
            a.mov(dword_ptr(rbx), INIT)?;
            a.mov(eax, dword_ptr(rbx))?;
            say_eax(a)
        },
        |w, vm| {
            w.ioctl(vm, ioctl::KVM_CREATE_IRQCHIP, 0).unwrap();
            w.command(vm, sev::INIT2, &SevInit::default()).0.unwrap();
        },
    );
    guest.launch(0);
    assert_eq!(guest.says(), INIT);
}

/// SEV-ES: ports and devices by the GHCB page.
fn by_page(a: &mut CodeAssembler) -> Assembled {
    use_page(a, false)?;
    page_request(a, 0x7b, [0x90 << 16 | 1 << 5 | 1, 0], &[(RAX, 0)])?;
    a.mov(rbx, qword_ptr(r15 + RAX))?;
    say_by_page(a, rbx)?;
    let buffer = (SCRATCH, GHCB + BUFFER as u64);
    page_request(a, 0x8000_0001, [DEVICE, 4], &[buffer])?;
    a.mov(rbx, qword_ptr(r15 + BUFFER))?;
    say_by_page(a, rbx)?;
    page_request(a, 0x8000_0002, [DEVICE + 8, 2], &[buffer])
}

#[test]
fn a_guest_with_secret_registers_uses_ports_and_devices_by_its_ghcb() {
    let guest = Guest::new(SEV_ES, by_page);
    let io: Io = guest.runs_to(exit_reason::IO);
    assert_eq!(
        (io.direction, io.size, io.port.get(), io.count.get()),
        (0, 2, 0x90, 1)
    );
    guest.area().write(io.data_offset.get(), &[0xcd, 0xab]);
    assert_eq!(guest.says(), 0xabcd);
    let mmio: Mmio = guest.runs_to(exit_reason::MMIO);
    let told = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(told, (DEVICE, 4, 0));
    guest.answer(&Mmio {
        data: 0x5566_7788u64.to_le_bytes(),
        ..mmio
    });
    assert_eq!(guest.says(), 0x5566_7788);
    let mmio: Mmio = guest.runs_to(exit_reason::MMIO);
    let told = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(told, (DEVICE + 8, 2, 1));
    assert_eq!(mmio.data[..2], [0x88, 0x77]);
}

/// Asks to be ended by the GHCB page, and has an invalid instruction behind that.
fn ends_by_page(a: &mut CodeAssembler, snp: bool) -> Assembled {
    use_page(a, snp)?;
    page_request(a, 0x8000_fffe, [0, 0], &[])?;
    a.ud2()
}

#[test]
fn a_guest_that_asks_to_be_ended_is_past_its_request() {
    let by_value: Part = |a| {
        terminate(a)?;
        a.ud2()
    };
    for (kind, code, msr) in [
        (SEV_ES, by_value, TERMINATE),
        (SNP, by_value, TERMINATE),
        (SEV_ES, (|a| ends_by_page(a, false)) as Part, GHCB),
        (SNP, (|a| ends_by_page(a, true)) as Part, GHCB),
    ] {
        let guest = Guest::new(kind, code);
        let event: SystemEvent = guest.runs_to(exit_reason::SYSTEM_EVENT);
        let told = (event.kind.get(), event.ndata.get(), event.data[0].get());
        assert_eq!(told, (system_event::SEV_TERM, 1, msr), "{kind}");
        // It has no interrupt table.
        assert_eq!(guest.run(), exit_reason::SHUTDOWN, "{kind}");
    }
}

/// The MSR that user space answers for, and what it says.
const ASKED: (u32, u64) = (0x4b4f_0001, 0x1122_3344_5566_7788);

/// Reads an MSR by the GHCB page, and says both halves of what it got, or the exception.
fn reads_msr(a: &mut CodeAssembler, snp: bool) -> Assembled {
    const RCX: i32 = 0x308;
    const RDX: i32 = 0x310;
    use_page(a, snp)?;
    for _ in 0..2 {
        page_request(a, 0x7c, [0, 0], &[(RCX, ASKED.0.into())])?;
        a.mov(r11, rbx)?;
        a.mov(r12, qword_ptr(r15 + RAX))?;
        a.mov(r13, qword_ptr(r15 + RDX))?;
        say_by_page(a, r11)?;
        say_by_page(a, r12)?;
        say_by_page(a, r13)?;
    }
    Ok(())
}

#[test]
fn an_msr_that_a_secret_guest_asks_for_is_user_spaces_to_answer() {
    for (kind, code) in [
        (SEV_ES, (|a| reads_msr(a, false)) as Part),
        (SNP, (|a| reads_msr(a, true)) as Part),
    ] {
        let guest = Guest::new(kind, code);
        let reasons = msr_exit_reason::UNKNOWN;
        let cap = cap::X86_USER_SPACE_MSR;
        guest.w.enable(guest.vm, cap, reasons).unwrap();
        let exit: MsrExit = guest.runs_to(exit_reason::X86_RDMSR);
        let told = (exit.index.get(), u64::from(exit.reason.get()));
        assert_eq!(told, (ASKED.0, reasons));
        guest.answer(&MsrExit {
            data: U64::new(ASKED.1),
            ..exit
        });
        let said = [guest.says(), guest.says(), guest.says()];
        assert_eq!(said, [0, ASKED.1 as u32, (ASKED.1 >> 32) as u32]);
        let exit: MsrExit = guest.runs_to(exit_reason::X86_RDMSR);
        guest.answer(&MsrExit { error: 1, ..exit });
        assert_eq!(guest.says(), 1, "an exception");
    }
}

/// A page state change by the GHCB MSR, of which the guest says the upper half of the answer.
fn change_state(a: &mut CodeAssembler) -> Assembled {
    for _ in 0..3 {
        msr_request(a, 1 << 52 | (OPEN + 0x3000) | 0x014)?;
        a.mov(r13, rbx)?;
        use_page(a, true)?;
        a.mov(rbx, r13)?;
        a.shr(rbx, 32)?;
        say_by_page(a, rbx)?;
    }
    Ok(())
}

#[test]
fn a_page_state_change_leaves_where_it_was_asked_for_and_takes_three_answers() {
    for answer in [0, Errno::EINVAL.0 as u64, Errno::EAGAIN.0 as u64, 1] {
        let guest = Guest::new(SNP, change_state);
        assert_eq!(guest.says(), PSC_ERROR, "it was not asked for");
        guest.allow_conversions();
        let exit: Hypercall = guest.runs_to(exit_reason::HYPERCALL);
        let args = exit.args.map(U64::get);
        assert_eq!(exit.nr.get(), MAP_GPA_RANGE);
        assert_eq!(args, [OPEN + 0x3000, 1, ENCRYPTED, 0, 0, 0]);
        guest.answer(&Hypercall {
            ret: U64::new(answer),
            ..exit
        });
        if answer == 1 {
            let refusal = guest.try_run().unwrap_err();
            assert_eq!(refusal.check(), Some(run::COMPLETION));
            continue;
        }
        assert_eq!(guest.says(), if answer == 0 { 0 } else { PSC_ERROR });
    }
}

#[test]
fn private_memory_that_is_shared_by_its_attribute_faults_until_it_is_converted() {
    const AT: u64 = OPEN + 0x8000;
    let guest = Guest::new(SNP, |a| {
        a.mov(rbx, AT)?;
        // PVALIDATE of 4 KiB.
        a.mov(rax, rbx)?;
        a.xor(ecx, ecx)?;
        a.mov(edx, 1)?;
        a.pvalidate()?;
        a.mov(dword_ptr(rbx), 0x77)?;
        a.mov(r12d, dword_ptr(rbx))?;
        use_page(a, true)?;
        say_by_page(a, r12)
    });
    let refusal = guest.try_run().unwrap_err();
    assert_eq!(refusal.errno(), Errno::EFAULT);
    assert_eq!(guest.reason(), exit_reason::MEMORY_FAULT);
    let fault: MemoryFault = guest.exit();
    let told = (fault.flags.get(), fault.gpa.get(), fault.size.get());
    assert_eq!(told, (8, AT, PAGE));
    guest.set_attributes(AT, PAGE, 8);
    assert_eq!(guest.says(), 0x77);
    assert_eq!(
        guest.read(AT),
        [0; 4],
        "private memory is not the process's"
    );
}

/// A request for a report with certificates: the message is no message, so firmware refuses it.
fn ask(a: &mut CodeAssembler) -> Assembled {
    use_page(a, true)?;
    a.mov(rbx, SHARED_VIEW + OPEN + PAGE)?;
    a.mov(byte_ptr(rbx + 0x34), 5)?;
    let certificates = OPEN + 3 * PAGE;
    for _ in 0..5 {
        page_request(
            a,
            0x8000_0012,
            [OPEN + PAGE, OPEN + 2 * PAGE],
            &[(RAX, certificates), (RBX, 1)],
        )?;
        a.mov(r12, rdx)?;
        a.shr(rdx, 32)?;
        say_by_page(a, rdx)?;
        say_by_page(a, r12)?;
    }
    Ok(())
}

fn certificate_guest(on: bool) -> Guest {
    let guest = Guest::prepared_by(SNP, ask, |w, vm| {
        w.command(vm, sev::INIT2, &SevInit::default()).0.unwrap();
        if on {
            w.bare(vm, sev::SNP_ENABLE_REQ_CERTS).unwrap();
        }
    });
    guest.launch(0);
    guest
}

#[test]
fn a_request_for_a_report_asks_for_certificates_where_user_space_has_some() {
    let guest = certificate_guest(true);
    let mut status_of_firmware = None;
    for (ret, pages, error) in [
        (Errno::ENOSPC.0 as u64, 4, 1),
        (Errno::EAGAIN.0 as u64, 0, 2),
        (Errno::EIO.0 as u64, 0, u32::MAX),
        (0, 0, 0),
    ] {
        let exit: SnpReqCerts = guest.runs_to(exit_reason::SNP_REQ_CERTS);
        assert_eq!((exit.gpa.get(), exit.npages.get()), (OPEN + 3 * PAGE, 1));
        guest.answer(&SnpReqCerts {
            ret: U64::new(ret),
            npages: U64::new(pages),
            ..exit
        });
        assert_eq!(guest.says(), error, "{ret}");
        status_of_firmware = Some(guest.says());
        if pages != 0 {
            let needed = u64::from_le_bytes(guest.read(GHCB + RBX as u64));
            assert_eq!(needed, pages, "the guest learns how many it needs");
        }
    }
    assert_ne!(
        status_of_firmware,
        Some(0),
        "firmware refuses what is no message"
    );
    let exit: SnpReqCerts = guest.runs_to(exit_reason::SNP_REQ_CERTS);
    guest.answer(&SnpReqCerts {
        ret: U64::new(3),
        ..exit
    });
    let refusal = guest.try_run().unwrap_err();
    assert_eq!(refusal.check(), Some(run::COMPLETION));
}

#[test]
fn without_certificates_the_request_goes_to_firmware_at_once() {
    let guest = certificate_guest(false);
    assert_eq!(guest.says(), 0);
    assert_ne!(guest.says(), 0);
}
