//! The number of ioctls of an operation: one for a group of registers, at most three for a flat start.
//!
//! The test binary has its own `ioctl`, which counts the calls of its thread and makes the system
//! call: the linker prefers it to that of the C library.

mod common;

use std::cell::Cell;
use std::ffi::{c_int, c_long, c_ulong, c_void};

use common::Memory;
use kvm_ops_core::{Irqchip, Msr, VcpuId, VcpuOps, VmPort};

thread_local! {
    static CALLS: Cell<u32> = const { Cell::new(0) };
}

/// # Safety
/// As `ioctl`, whose third argument is a word.
#[unsafe(no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    CALLS.set(CALLS.get() + 1);
    let fd = c_long::from(fd);
    // SAFETY: the caller's arguments, for the system call that it asked for.
    unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int }
}

fn ioctls<T>(operation: impl FnOnce() -> T) -> (T, u32) {
    let before = CALLS.get();
    let value = operation();
    (value, CALLS.get() - before)
}

#[test]
fn each_group_is_read_and_written_by_one_ioctl() {
    let Some(host) = common::host() else { return };
    let vm = common::vm(&host, 1, Irqchip::Full);
    let (vcpu, counted) = ioctls(|| vm.create_vcpu(VcpuId(0)));
    let mut vcpu = vcpu.unwrap();
    assert!(counted > 0, "the calls are seen");
    // The length of the area is asked for once.
    vcpu.xsave().unwrap();
    macro_rules! one_each {
        ($($get:ident $set:ident [$($by:tt)?]),* $(,)?) => {$(
            let (group, read) = ioctls(|| vcpu.$get());
            let (set, written) = ioctls(|| vcpu.$set($($by)? group.as_ref().unwrap().clone()));
            set.unwrap();
            assert_eq!((read, written), (1, 1), stringify!($get));
        )*};
    }
    one_each!(
        regs set_regs [&],
        sregs set_sregs [&],
        xsave set_xsave [&],
        events set_events [&],
        debug_regs set_debug_regs [&],
        xcrs set_xcrs [&],
        mp_state set_mp_state [],
    );
    let mut msrs = [0x174, 0x175, 0xc000_0081].map(Msr::read);
    assert_eq!(ioctls(|| vcpu.msrs(&mut msrs)), (Ok(()), 1));
    assert_eq!(ioctls(|| vcpu.set_msrs(&msrs)), (Ok(()), 1));
}

#[test]
fn a_flat_start_takes_at_most_three_ioctls() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    let (_vm, mut vcpu) = common::real_mode_vm(&host, &memory, &[0xf4], Irqchip::None);
    let ((), counted) = ioctls(|| common::real_mode(&mut vcpu));
    assert!(counted <= 3, "{counted}");
}

#[test]
fn a_run_is_one_ioctl_with_its_data_and_answer() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(4);
    // in al, 0x10; hlt
    let code = [0xe4, 0x10, 0xf4];
    let (_vm, mut vcpu) = common::real_mode_vm(&host, &memory, &code, Irqchip::None);
    let ((), counted) = ioctls(|| {
        vcpu.vcpu_run().unwrap();
        vcpu.exit_data()[0] = 1;
        vcpu.vcpu_run().unwrap();
    });
    assert_eq!(counted, 2);
}
