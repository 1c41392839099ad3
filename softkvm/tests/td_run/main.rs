//! `KVM_RUN` of a TD: machine code that makes TDCALLs, and the exits that the kernel has for them.

#[path = "../common/mod.rs"]
mod common;
mod guest;
mod interrupts;

use guest::*;
use iced_x86::code_asm::*;
use kvm_ops::{Host, SeamPort};
use kvm_ops_uapi::checks::run;
use kvm_ops_uapi::run::{
    GetQuote, Hypercall, Io, MemoryFault, Mmio, SetupEventNotify, SystemEvent, TdVmCallInfo,
    TdxExit, exit_reason, system_event,
};
use kvm_ops_uapi::system::MsrEntry;
use kvm_ops_uapi::tdx::{tdvmcall, tdvmcall_status};
use kvm_ops_uapi::{Errno, U32, U64, ioctl};
use zerocopy::{FromBytes, IntoBytes};

const PAGE: u64 = 4096;

/// The arguments of a request, and the request with others.
fn request<T: FromBytes>(exit: &TdxExit) -> T {
    T::read_from_bytes(&exit.call[..size_of::<T>()]).unwrap_or_else(|_| panic!("a request"))
}

fn with<T: IntoBytes + zerocopy::Immutable>(exit: TdxExit, call: &T) -> TdxExit {
    let mut exit = exit;
    exit.call[..size_of::<T>()].copy_from_slice(call.as_bytes());
    exit
}

#[test]
fn a_td_starts_with_the_rcx_that_init_vcpu_gave_it() {
    let td = Td::new(|a| {
        a.mov(rbx, rcx)?;
        say_rbx(a)
    });
    assert_eq!(td.says(), RCX);
}

#[test]
fn ports_and_devices_are_read_and_written_by_user_space() {
    let td = Td::new(|a| {
        call(a, IO, [2, 0, 0x1234, 0])?;
        say(a, r11)?;
        call(a, MMIO, [8, 0, SHARED | DEVICE, 0])?;
        say(a, r11)?;
        call(a, MMIO, [4, 1, SHARED | DEVICE | 8, 0xdead_beef])?;
        say(a, r10)
    });
    let io: Io = td.runs_to(exit_reason::IO);
    assert_eq!((io.direction, io.size, io.port.get()), (0, 2, 0x1234));
    td.set_port_data(io, &[0x55, 0xaa]);
    assert_eq!(td.says(), 0xaa55);
    let mmio: Mmio = td.runs_to(exit_reason::MMIO);
    let told = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(told, (DEVICE, 8, 0));
    td.device_read(mmio, 0x0123_4567_89ab_cdefu64.to_le_bytes());
    assert_eq!(td.says(), 0x0123_4567_89ab_cdef);
    let mmio: Mmio = td.runs_to(exit_reason::MMIO);
    let told = (mmio.phys_addr.get(), mmio.len.get(), mmio.is_write);
    assert_eq!(told, (DEVICE + 8, 4, 1));
    assert_eq!(mmio.data[..4], 0xdead_beefu32.to_le_bytes());
    assert_eq!(td.says(), tdvmcall_status::SUCCESS);
}

#[test]
fn a_request_for_a_quote_leaves_and_is_unsupported_unless_it_is_answered() {
    let td = Td::new(|a| {
        for _ in 0..2 {
            call(a, GET_QUOTE, [SHARED | LOW, 0x4000, 0, 0])?;
            say(a, r10)?;
        }
        Ok(())
    });
    for (answer, status) in [
        (None, tdvmcall_status::SUBFUNC_UNSUPPORTED),
        (Some(tdvmcall_status::RETRY), tdvmcall_status::RETRY),
    ] {
        let exit: TdxExit = td.runs_to(exit_reason::TDX);
        assert_eq!((exit.flags.get(), exit.nr.get()), (0, tdvmcall::GET_QUOTE));
        let quote: GetQuote = request(&exit);
        assert_eq!((quote.gpa.get(), quote.size.get()), (LOW, 0x4000));
        if let Some(ret) = answer {
            let ret = U64::new(ret);
            td.answer(&with(exit, &GetQuote { ret, ..quote }));
        }
        assert_eq!(td.says(), status);
    }
}

#[test]
fn the_list_of_functions_and_the_vector_for_events_are_user_spaces() {
    let td = Td::new(|a| {
        call(a, INFO, [1, 0, 0, 0])?;
        a.mov(rbx, r11)?;
        a.add(rbx, r12)?;
        say_rbx(a)?;
        call(a, INFO, [0, 0, 0, 0])?;
        say(a, r10)?;
        call(a, EVENT_NOTIFY, [0x60, 0, 0, 0])?;
        say(a, r10)?;
        // Vectors of exceptions are nobody's.
        call(a, EVENT_NOTIFY, [31, 0, 0, 0])?;
        say(a, r10)
    });
    let exit: TdxExit = td.runs_to(exit_reason::TDX);
    assert_eq!(exit.nr.get(), tdvmcall::GET_TD_VM_CALL_INFO);
    let info: TdVmCallInfo = request(&exit);
    assert_eq!((info.ret.get(), info.leaf.get()), (0, 1));
    let answer = TdVmCallInfo {
        r11: U64::new(0x1_0000_0000),
        r12: U64::new(7),
        ..info
    };
    td.answer(&with(exit, &answer));
    assert_eq!(td.says(), 0x1_0000_0007);
    assert_eq!(
        td.says(),
        0,
        "the basic functions are no question to user space"
    );
    let exit: TdxExit = td.runs_to(exit_reason::TDX);
    assert_eq!(exit.nr.get(), tdvmcall::SETUP_EVENT_NOTIFY_INTERRUPT);
    let notify: SetupEventNotify = request(&exit);
    assert_eq!(notify.vector.get(), 0x60);
    let ret = U64::ZERO;
    td.answer(&with(exit, &SetupEventNotify { ret, ..notify }));
    assert_eq!(td.says(), 0);
    assert_eq!(td.says(), tdvmcall_status::INVALID_OPERAND);
}

#[test]
fn a_conversion_is_unsupported_where_user_space_did_not_ask_for_it() {
    let td = Td::new(|a| {
        call(a, MAP_GPA, [SHARED | LOW, PAGE, 0, 0])?;
        say(a, r10)
    });
    assert_eq!(td.says(), tdvmcall_status::SUBFUNC_UNSUPPORTED);
}

#[test]
fn memory_is_shared_by_a_hypercall_and_private_again_with_other_contents() {
    let td = Td::new(|a| {
        call(a, MAP_GPA, [SHARED | LOW, PAGE, 0, 0])?;
        say(a, r10)?;
        a.mov(rdi, SHARED_VIEW | LOW)?;
        a.mov(rbx, 0x7465_6c6c_696d_6521u64)?;
        a.mov(qword_ptr(rdi), rbx)?;
        say_rbx(a)?;
        a.mov(rbx, qword_ptr(rdi + 8))?;
        say_rbx(a)?;
        call(a, MAP_GPA, [LOW, PAGE, 0, 0])?;
        accept(a, LOW)?;
        a.mov(rdi, LOW)?;
        a.mov(rbx, qword_ptr(rdi))?;
        say_rbx(a)?;
        a.mov(qword_ptr(rdi), rdi)?;
        say(a, rdi)
    })
    .with_conversions();
    let converts = |attributes: u64| {
        let call: Hypercall = td.runs_to(exit_reason::HYPERCALL);
        let told = (call.nr.get(), call.args.map(U64::get), call.flags.get());
        assert_eq!(told, (12, [LOW, 1, attributes, 0, 0, 0], 1));
        assert_eq!(call.ret.get(), 0);
        td.w.set_private(td.vm, LOW, PAGE, attributes != 0);
    };
    converts(0);
    assert_eq!(td.says(), 0);
    kvm_ops_softkvm::Process::write(&*td.w, td.low + 8, &77u64.to_le_bytes()).unwrap();
    assert_eq!(td.says(), 0x7465_6c6c_696d_6521);
    assert_eq!(td.shared(LOW), 0x7465_6c6c_696d_6521);
    assert_eq!(td.says(), 77);
    converts(1 << 4);
    assert_eq!(td.says(), 0, "an accepted page is empty");
    assert_eq!(td.says(), LOW);
    assert_eq!(
        td.shared(LOW),
        0x7465_6c6c_696d_6521,
        "the shared side is another page"
    );
}

#[test]
fn answers_to_a_conversion_are_three_and_another_fails_the_run() {
    let td = Td::new(|a| {
        for _ in 0..3 {
            call(a, MAP_GPA, [SHARED | LOW, PAGE, 0, 0])?;
            say(a, r10)?;
        }
        Ok(())
    })
    .with_conversions();
    for (ret, status) in [
        (Errno::EINVAL.0, tdvmcall_status::INVALID_OPERAND),
        (Errno::EAGAIN.0, tdvmcall_status::RETRY),
    ] {
        let call: Hypercall = td.runs_to(exit_reason::HYPERCALL);
        let ret = U64::new(ret as u64);
        td.answer(&Hypercall { ret, ..call });
        assert_eq!(td.says(), status);
    }
    let call: Hypercall = td.runs_to(exit_reason::HYPERCALL);
    let ret = U64::new(1);
    td.answer(&Hypercall { ret, ..call });
    let refused = td.run().unwrap_err();
    assert_eq!(refused.check(), Some(run::COMPLETION));
}

#[test]
fn a_hypercall_that_kvm_does_not_know_never_leaves() {
    let td = Td::new(|a| {
        a.xor(eax, eax)?;
        a.mov(ecx, 0xfc00)?;
        a.mov(r10d, 5)?; // KVM_HC_KICK_CPU
        a.tdcall()?;
        say(a, r10)
    });
    assert_eq!(td.says() as i64, -1000);
}

#[test]
fn an_access_of_the_other_kind_than_the_attribute_is_a_memory_fault_to_repair() {
    let td = Td::new(|a| {
        a.mov(rdi, SHARED_VIEW | LOW)?;
        a.mov(rbx, qword_ptr(rdi))?;
        say_rbx(a)?;
        accept(a, DEVICE)?;
        say(a, rax)
    });
    kvm_ops_softkvm::Process::write(&*td.w, td.low, &5u64.to_le_bytes()).unwrap();
    for _ in 0..2 {
        assert_eq!(td.run().unwrap_err().errno(), Errno::EFAULT);
        let fault: MemoryFault = td.exit(exit_reason::MEMORY_FAULT);
        let told = (fault.flags.get(), fault.gpa.get(), fault.size.get());
        assert_eq!(told, (0, LOW, PAGE));
    }
    td.w.set_private(td.vm, LOW, PAGE, false);
    assert_eq!(td.says(), 5);
    // A private page where no slot is.
    assert_eq!(td.run().unwrap_err().errno(), Errno::EFAULT);
    let fault: MemoryFault = td.exit(exit_reason::MEMORY_FAULT);
    assert_eq!((fault.flags.get(), fault.gpa.get()), (8, DEVICE));
}

#[test]
fn shared_memory_that_leaves_under_a_td_is_efault_and_its_private_memory_stays() {
    let td = Td::new(|a| {
        a.mov(rdi, SHARED_VIEW | LOW)?;
        for _ in 0..3 {
            a.mov(rbx, qword_ptr(rdi))?;
            say_rbx(a)?;
        }
        Ok(())
    });
    td.w.set_private(td.vm, LOW, PAGE, false);
    kvm_ops_softkvm::Process::write(&*td.w, td.low, &5u64.to_le_bytes()).unwrap();
    assert_eq!(td.says(), 5);
    let own = kvm_ops_softkvm::Process::address_space(&*td.w);
    td.w.kernel().invalidate(own, td.low, PAGE);
    assert_eq!(td.says(), 5, "it was lent again");
    td.w.kernel().invalidate(own, td.low, PAGE);
    td.w.unmap(td.low);
    for _ in 0..2 {
        assert_eq!(td.run().unwrap_err().errno(), Errno::EFAULT);
        let fault: MemoryFault = td.exit(exit_reason::MEMORY_FAULT);
        assert_eq!((fault.flags.get(), fault.gpa.get()), (0, LOW));
    }
}

#[test]
fn a_fatal_error_is_an_event_with_the_guests_registers() {
    let td = Td::new(|a| {
        a.mov(rsi, 0x6965u64)?;
        call(a, FATAL, [0xbad, 1, 2, 3])
    });
    let event: SystemEvent = td.runs_to(exit_reason::SYSTEM_EVENT);
    let told = (event.kind.get(), event.ndata.get());
    assert_eq!(told, (system_event::TDX_FATAL, 16));
    assert_eq!(event.data[11].get(), u64::from(FATAL), "R11");
    assert_eq!(event.data[12].get(), 0xbad, "R12");
}

#[test]
fn msrs_are_those_that_user_space_set_and_no_others() {
    let td = Td::new(|a| {
        call(a, RDMSR, [0x8b, 0, 0, 0])?;
        say(a, r11)?;
        call(a, WRMSR, [0x1a0, 0x1234, 0, 0])?;
        say(a, r10)?;
        call(a, RDMSR, [0x1a0, 0, 0, 0])?;
        say(a, r11)?;
        call(a, RDMSR, [0xc001_0015, 0, 0, 0])?;
        say(a, r10)
    });
    let msr = MsrEntry {
        index: U32::new(0x8b),
        data: U64::new(0x65 << 32),
        ..MsrEntry::default()
    };
    let list = [&[1, 0, 0, 0, 0, 0, 0, 0], msr.as_bytes()].concat();
    let at = td.w.task.put(&list[..]);
    assert_eq!(td.w.ioctl(td.vcpu, ioctl::KVM_SET_MSRS, at), Ok(1));
    assert_eq!(td.says(), 0x65 << 32);
    assert_eq!(td.says(), 0);
    assert_eq!(td.says(), 0x1234);
    assert_eq!(td.says(), tdvmcall_status::INVALID_OPERAND);
}

#[test]
fn an_immediate_exit_comes_after_the_answer_and_in_front_of_the_guest() {
    let td = Td::new(|a| {
        call(a, IO, [4, 0, 0x10, 0])?;
        say(a, r11)
    });
    let io: Io = td.runs_to(exit_reason::IO);
    td.set_port_data(io, &9u32.to_le_bytes());
    td.set_byte(1, 1);
    for _ in 0..2 {
        let refused = td.run().unwrap_err();
        assert_eq!(refused.check(), Some(run::IMMEDIATE_EXIT));
        td.set_port_data(io, &[0; 4]);
    }
    td.set_byte(1, 0);
    assert_eq!(td.says(), 9);
}

#[test]
fn registers_in_the_run_page_are_not_a_tds() {
    let td = Td::new(|a| a.nop());
    td.set_byte(288, 1);
    let refused = td.run().unwrap_err();
    assert_eq!(refused.check(), Some(run::SYNC_REGS));
}

#[test]
fn a_page_that_was_not_accepted_is_the_tds_end() {
    let td = Td::new(|a| {
        a.mov(rdi, LOW)?;
        a.mov(rbx, qword_ptr(rdi))?;
        say_rbx(a)
    });
    assert_eq!(td.run().unwrap_err().errno(), Errno::EIO);
    let dead = td.run().unwrap_err();
    assert_eq!(dead.check(), Some(kvm_ops_uapi::checks::any::ALIVE));
}

#[test]
fn a_td_that_ran_leaves_nothing() {
    let td = Td::new(|a| {
        accept(a, LOW)?;
        call(a, IO, [4, 0, 0x10, 0])
    });
    let _: Io = td.runs_to(exit_reason::IO);
    let host = td.host.clone();
    drop(td);
    assert_eq!(host.live_vms(), 0);
    assert_eq!(host.seam().unwrap().key_ids().in_use(), 0);
    assert_eq!(host.pages().unwrap().frames_out(), 0);
}

#[test]
fn the_cpuid_that_a_td_asks_for_is_what_user_space_set() {
    const CPUID: u32 = 10;
    let td = Td::new(|a| {
        call(a, CPUID, [1, 0, 0, 0])?;
        say(a, r14)?;
        call(a, CPUID, [0x4000_0000, 0, 0, 0])?;
        say(a, r12)
    });
    assert_eq!(td.says() >> 21 & 1, 1, "x2APIC");
    assert_eq!(td.says(), 0, "not in the list");
}
