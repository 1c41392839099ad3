//! A vCPU that is reset is as a new one.

mod common;

use common::{Memory, real_mode_vm};
use kvm_ops_core::{DebugRegs, Events, Exit, Irqchip, MpState, Msr, VcpuId, VcpuOps, VmPort};
use kvm_ops_kvm::KvmVcpu;

/// Bytes of the XSAVE area: XMM3, and which states it holds.
const XMM3: std::ops::Range<usize> = 160 + 3 * 16..160 + 4 * 16;
const XSTATE_BV: usize = 512;
const STAR: u32 = 0xc000_0081;
const CD_NW: u64 = 0b11 << 29;

/// The state that a reset must restore, as far as a test can compare it.
fn state(vcpu: &KvmVcpu) -> String {
    let fd = vcpu.fd();
    let events = fd.get_vcpu_events().unwrap();
    format!(
        "{:x?}\n{:x?}\n{:x?}\n{:x?}\n{:x?}\n{:x?}\n{:x?} {:x?} {:x?}",
        kvm_bindings::kvm_regs {
            // The signature of the processor, which a new vCPU gets before it has a CPUID.
            rdx: 0,
            ..fd.get_regs().unwrap()
        },
        fd.get_sregs().unwrap(),
        fd.get_debug_regs().unwrap(),
        fd.get_fpu().unwrap(),
        &fd.get_xsave().unwrap().region[..512 / 4],
        msr(vcpu, STAR),
        (events.exception.injected, events.interrupt.injected),
        (
            events.interrupt.shadow,
            events.nmi.pending,
            events.nmi.masked
        ),
        fd.get_mp_state().unwrap(),
    )
}

fn msr(vcpu: &KvmVcpu, index: u32) -> u64 {
    let mut msr = [Msr::read(index)];
    vcpu.msrs(&mut msr).unwrap();
    msr[0].value
}

/// Changes something of every kind, and ends in the middle of a port read.
fn disturb(vcpu: &mut KvmVcpu) {
    vcpu.set_msrs(&[Msr::write(STAR, 0x1234)]).unwrap();
    let debug = DebugRegs {
        dr7: 0x402,
        ..DebugRegs::default()
    };
    vcpu.set_debug_regs(&debug).unwrap();
    let mut events = vcpu.events().unwrap();
    events.nmi.masked = true;
    vcpu.set_events(&events).unwrap();
    // In the format of XSAVE, because what KVM_SET_FPU writes is lost where KVM uses XSAVE.
    let mut xsave = vcpu.xsave().unwrap();
    let area = xsave.as_bytes_mut();
    area[..2].copy_from_slice(&0x27f_u16.to_le_bytes());
    area[XMM3].fill(7);
    area[XSTATE_BV] |= 0b11;
    vcpu.set_xsave(&xsave).unwrap();
    common::change_sregs(vcpu, |sregs| sregs.cr0 = 0x11);
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
    vcpu.exit_data()[0] = 0x55;
}

#[test]
fn a_reset_restores_the_state_after_power_on() {
    let Some(host) = common::host() else { return };
    for irqchip in [Irqchip::None, Irqchip::Full, Irqchip::Split] {
        let memory = Memory::new(16);
        let new = common::vm(&host, 1, irqchip)
            .create_vcpu(VcpuId(0))
            .unwrap();
        // in al, 0x10
        let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xe4, 0x10], irqchip);
        disturb(&mut vcpu);
        assert_ne!(state(&vcpu), state(&new));
        vcpu.vcpu_reset(false).unwrap();
        assert_eq!(state(&vcpu), state(&new));
        let regs = vcpu.regs().unwrap();
        assert_eq!((regs.rip, regs.rax, regs.rflags), (0xfff0, 0, 2));
        let cpuid = vcpu.cpuid().unwrap();
        let leaf1 = cpuid.iter().find(|entry| entry.leaf == 1).unwrap();
        assert_eq!(regs.rdx, u64::from(leaf1.regs[0]));
        // The port read that was under way writes nothing over it.
        common::real_mode(&mut vcpu);
        memory.write(common::CODE as usize, &[0xf4]);
        if irqchip == Irqchip::None {
            assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Hlt);
            assert_eq!(vcpu.regs().unwrap().rax, 0);
        }
    }
}

#[test]
fn init_keeps_what_init_keeps() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xe4, 0x10], Irqchip::None);
    disturb(&mut vcpu);
    vcpu.vcpu_reset(true).unwrap();
    assert_eq!(msr(&vcpu, STAR), 0x1234);
    assert_eq!(vcpu.xsave().unwrap().as_bytes()[XMM3], [7; 16]);
    let sregs = vcpu.sregs().unwrap();
    assert_eq!(
        sregs.cr0 & (CD_NW | 1),
        0,
        "caching stays on, PE is cleared"
    );
    assert_eq!((sregs.cs.base, sregs.cs.selector), (0xffff_0000, 0xf000));
    assert_eq!(vcpu.regs().unwrap().rip, 0xfff0);
    assert_eq!(vcpu.debug_regs(), Ok(DebugRegs::default()));
    assert_eq!(vcpu.events(), Ok(Events::default()));
}

#[test]
fn all_vcpus_but_the_first_wait_for_their_start_up_message() {
    let Some(host) = common::host() else { return };
    let vm = common::vm(&host, 2, Irqchip::Full);
    for (id, after_reset, after_init) in [
        (0, MpState::Runnable, MpState::Runnable),
        (1, MpState::Uninitialized, MpState::InitReceived),
    ] {
        let mut vcpu = vm.create_vcpu(VcpuId(id)).unwrap();
        vcpu.vcpu_reset(true).unwrap();
        assert_eq!(vcpu.mp_state(), Ok(after_init));
        vcpu.vcpu_reset(false).unwrap();
        assert_eq!(vcpu.mp_state(), Ok(after_reset));
    }
}

#[test]
fn a_kick_before_a_reset_is_answered_after_it_and_a_reset_is_no_kick() {
    let Some(host) = common::host() else { return };
    let memory = Memory::new(16);
    let (_vm, mut vcpu) = real_mode_vm(&host, &memory, &[0xe4, 0x10], Irqchip::None);
    for kick in [true, false] {
        assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
        if kick {
            vcpu.kick_handle().kick();
        }
        vcpu.vcpu_reset(false).unwrap();
        common::real_mode(&mut vcpu);
        if kick {
            assert_eq!(vcpu.vcpu_run().unwrap(), Exit::Interrupted);
        }
    }
    assert!(matches!(vcpu.vcpu_run().unwrap(), Exit::IoIn { .. }));
}
