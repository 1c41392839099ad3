//! Guests that move to another VM of their host by a token.

use iced_x86::code_asm::*;
use kvm_ops_uapi::run::exit_reason;
use kvm_ops_uapi::sev::{self, SevDbg, SevGuestStatus, SevInit, SevLocalReceive, SevLocalSend};
use kvm_ops_uapi::state::Sregs;
use kvm_ops_uapi::system::vm_type::{SEV, SEV_ES};
use kvm_ops_uapi::{Errno, U32, U64, ioctl};

use crate::guest::*;

fn send(guest: &Guest) -> [u8; 16] {
    let (answer, told) = guest
        .w
        .command(guest.vm, sev::LOCAL_SEND, &SevLocalSend::default());
    answer.unwrap();
    told.token
}

/// A VM with the same memory and a vCPU, and no launch: its file and its vCPU's.
fn vacant(guest: &Guest) -> (i32, i32) {
    let vm = guest.w.vm(guest.kind);
    let (init, _) = guest.w.command(vm, sev::INIT2, &SevInit::default());
    init.unwrap();
    guest.set_slot_of(vm);
    (vm, guest.w.vcpu(vm, 0))
}

fn receive(guest: &Guest, vm: i32, token: [u8; 16]) -> Result<u32, Errno> {
    let args = SevLocalReceive {
        token,
        ..SevLocalReceive::default()
    };
    let (answer, told) = guest.w.command(vm, sev::LOCAL_RECEIVE, &args);
    answer.map_err(|refusal| refusal.errno())?;
    Ok(told.handle.get())
}

fn status(guest: &Guest, vm: i32) -> SevGuestStatus {
    let args = SevGuestStatus::default();
    let (answer, told) = guest.w.command(vm, sev::GUEST_STATUS, &args);
    answer.unwrap();
    told
}

/// The first bytes of the guest's code, as its owner's debugger sees them.
fn debugged(guest: &Guest, vm: i32) -> [u8; 16] {
    let room = guest.w.task.map(16);
    let args = SevDbg {
        src: U64::new(guest.ram + CODE),
        dst: U64::new(room),
        len: U32::new(16),
        ..SevDbg::default()
    };
    guest.w.command(vm, sev::DBG_DECRYPT, &args).0.unwrap();
    guest.w.task.get(room).unwrap()
}

#[test]
fn a_guest_goes_on_in_the_vm_that_brings_its_token() {
    let mut guest = Guest::new(SEV, |a| {
        for number in [7, 8] {
            a.mov(eax, number)?;
            a.out(u32::from(SAY), eax)?;
        }
        Ok(())
    });
    let code = debugged(&guest, guest.vm);
    assert_eq!(code[..5], [0xb8, 7, 0, 0, 0], "mov eax, 7");
    let memory: [u8; 16] = guest.read(CODE);
    assert_ne!(memory, code, "the process has ciphertext");
    assert_eq!(guest.says(), 7);
    let (regs, sregs) = (
        guest.regs(),
        guest.get::<Sregs>(guest.vcpu, ioctl::KVM_GET_SREGS),
    );
    let (handle, (vm, vcpu)) = (status(&guest, guest.vm).handle.get(), vacant(&guest));

    let token = send(&guest);
    assert_eq!(guest.try_run().unwrap_err().errno(), Errno::EIO);
    assert_eq!(debugged(&guest, guest.vm), code);
    assert_eq!(receive(&guest, vm, token), Ok(handle));
    assert_eq!(debugged(&guest, guest.vm), code, "its new VM lets it see");
    assert_eq!(guest.try_run().unwrap_err().errno(), Errno::EIO);

    guest.w.task.close(guest.vm).unwrap();
    (guest.vm, guest.vcpu) = (vm, vcpu);
    assert_eq!(status(&guest, vm).state.get(), 3);
    guest.set_state(vcpu, &sregs, &behind_port_access(regs));
    assert_eq!(guest.says(), 8);
}

#[test]
fn secret_registers_go_along() {
    let mut guest = Guest::new(SEV_ES, terminate);
    let (vm, vcpu) = vacant(&guest);
    let token = send(&guest);
    receive(&guest, vm, token).unwrap();
    (guest.vm, guest.vcpu) = (vm, vcpu);
    assert_eq!(guest.run(), exit_reason::SYSTEM_EVENT);
    let refused = guest
        .w
        .ioctl(vcpu, ioctl::KVM_SET_REGS, guest.w.task.map(144));
    assert_eq!(refused.unwrap_err().errno(), Errno::EINVAL);
}

#[test]
fn a_token_is_good_for_one_vm_and_as_long_as_its_guest_lives() {
    let guest = Guest::new(SEV, |a| a.hlt());
    let ((first, _), (second, _)) = (vacant(&guest), vacant(&guest));
    let token = send(&guest);
    receive(&guest, first, token).unwrap();
    assert_eq!(receive(&guest, second, token), Err(Errno::ENOENT));
    let (args, again) = (SevLocalSend::default(), first);
    let (answer, told) = guest.w.command(again, sev::LOCAL_SEND, &args);
    answer.unwrap();
    assert_ne!(told.token, token);
    receive(&guest, second, told.token).unwrap();
    drop(guest);
}
