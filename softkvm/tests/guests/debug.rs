//! Guest debugging, as the kernel's self-test debug_regs goes through it.

use kvm_ops_uapi::run::{Debug, Io, exit_reason};
use kvm_ops_uapi::state::guest_debug::{
    BLOCKIRQ, ENABLE, INJECT_BP, INJECT_DB, SINGLESTEP, USE_HW_BP, USE_SW_BP,
};
use kvm_ops_uapi::state::{GuestDebug, Regs};
use kvm_ops_uapi::{U32, U64, ioctl};

use crate::guest::{CODE, Guest};

/// The vectors of #DB and #BP.
const DB: u32 = 1;
const BP: u32 = 3;
/// DR6 without events, its single step and its general detect.
const NOTHING: u64 = 0xffff_0ff0;
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
/// DR7 without breakpoints.
const FIXED: u64 = 0x400;
const DATA: u64 = 0x2000;

fn debug(guest: &Guest, control: u32, registers: &[(usize, u64)]) {
    let mut args = GuestDebug {
        control: U32::new(control),
        ..GuestDebug::default()
    };
    for (number, value) in registers {
        args.debugreg[*number] = U64::new(*value);
    }
    let set = ioctl::KVM_SET_GUEST_DEBUG;
    guest.call(guest.vcpu, set, &args).unwrap();
}

/// Runs to a debug exit: exception, address from the start of the code, DR6 and DR7.
#[track_caller]
fn stop(guest: &Guest) -> (u32, u64, u64, u64) {
    assert_eq!(guest.run(), exit_reason::DEBUG);
    let exit: Debug = guest.exit();
    (
        exit.exception.get(),
        exit.pc.get() - CODE,
        exit.dr6.get(),
        exit.dr7.get(),
    )
}

fn jump(guest: &Guest, to: u64) {
    let regs = guest.regs();
    guest.set_regs(&Regs {
        rip: U64::new(CODE + to),
        ..regs
    });
}

#[test]
fn int3_stops_at_the_instruction() {
    // nop; int3; hlt
    let guest = Guest::new(&[0x90, 0xcc, 0xf4]);
    debug(&guest, ENABLE | USE_SW_BP, &[]);
    for _ in 0..2 {
        let (exception, pc, ..) = stop(&guest);
        assert_eq!((exception, pc), (BP, 1));
        assert_eq!(guest.regs().rip.get(), CODE + 1);
    }
    jump(&guest, 2);
    assert_eq!(guest.run(), exit_reason::HLT);
}

#[test]
fn breakpoints_in_each_register_stop_in_front_of_an_instruction_and_behind_an_access() {
    // mov [0x2000], ax; hlt
    let guest = Guest::new(&[0xa3, 0x00, 0x20, 0xf4]);
    for n in 0..4 {
        let dr7 = FIXED | 2 << (2 * n);
        debug(&guest, ENABLE | USE_HW_BP, &[(n, CODE), (7, dr7)]);
        assert_eq!(stop(&guest), (DB, 0, NOTHING | 1 << n, dr7));
    }
    for n in 0..4 {
        let dr7 = FIXED | 2 << (2 * n) | 5 << (16 + 4 * n);
        debug(&guest, ENABLE | USE_HW_BP, &[(n, DATA), (7, dr7)]);
        assert_eq!(stop(&guest), (DB, 3, NOTHING | 1 << n, dr7));
        jump(&guest, 0);
    }
    debug(&guest, 0, &[(0, CODE), (7, FIXED | 2)]);
    assert_eq!(guest.run(), exit_reason::HLT);
}

#[test]
fn single_steps_go_over_instructions_that_leave_to_user_space() {
    // sti; xor ax, ax; cpuid; out 0x80, al; cli; hlt
    let code: [&[u8]; 5] = [
        &[0xfb],
        &[0x31, 0xc0],
        &[0x0f, 0xa2],
        &[0xe6, 0x80],
        &[0xfa],
    ];
    let guest = Guest::new(&[&code.concat()[..], &[0xf4]].concat());
    debug(&guest, ENABLE | SINGLESTEP | BLOCKIRQ, &[(7, FIXED)]);
    let mut pc = 0;
    for instruction in code {
        pc += instruction.len() as u64;
        if instruction[0] == 0xe6 {
            assert_eq!(guest.run(), exit_reason::IO);
            let io: Io = guest.exit();
            assert_eq!(io.port.get(), 0x80);
        }
        assert_eq!(stop(&guest), (DB, pc, NOTHING | BS, FIXED));
    }
    assert_eq!(
        guest.regs().rflags.get() & 1 << 8,
        0,
        "TF is not the guest's"
    );
    debug(&guest, 0, &[]);
    assert_eq!(guest.run(), exit_reason::HLT);
}

#[test]
fn general_detect_stops_at_a_move_of_a_debug_register() {
    // mov eax, dr0; hlt
    let guest = Guest::new(&[0x0f, 0x21, 0xc0, 0xf4]);
    debug(&guest, ENABLE | USE_HW_BP, &[(7, FIXED | 1 << 13)]);
    assert_eq!(stop(&guest), (DB, 0, NOTHING | BD, FIXED | 1 << 13));
}

#[test]
fn injected_exceptions_are_the_guests() {
    for (control, vector, behind) in [(INJECT_DB, 1, 0), (INJECT_BP, 3, 1)] {
        // int3; hlt. Handler: nop; hlt
        let guest = Guest::new(&[0xcc, 0xf4]);
        guest.write(vector * 4, &[0x00, 0x30, 0x00, 0x00]);
        guest.write(0x3000, &[0x90, 0xf4]);
        debug(&guest, ENABLE | USE_SW_BP | SINGLESTEP | control, &[]);
        let (exception, pc, ..) = stop(&guest);
        assert_eq!(
            (exception, pc),
            (DB, 0x3001 - CODE),
            "a step of the handler"
        );
        let frame: [u8; 2] = guest.read(0x0ff0 - 6);
        assert_eq!(u64::from(u16::from_le_bytes(frame)), CODE + behind);
    }
}

/// What the guest's own breakpoints and INT3 do is not the debugger's, unless it asks for them.
#[test]
fn what_is_not_asked_for_is_the_guests() {
    // int3; hlt
    let guest = Guest::new(&[0xcc, 0xf4]);
    guest.write(3 * 4, &[0x00, 0x30, 0x00, 0x00]);
    guest.write(0x3000, &[0xf4]);
    debug(&guest, ENABLE, &[]);
    assert_eq!(guest.run(), exit_reason::HLT);
    assert_eq!(guest.regs().rip.get(), 0x3001);
}
