//! What KVM leaves to firmware: addresses, lengths and the order of a launch's commands.

use iced_x86::code_asm::*;
use kvm_ops_softkvm::Process;
use kvm_ops_uapi::sev::{
    self, SevAttestation, SevGuestStatus, SevLaunchStart, SevRange, SnpLaunchUpdate, page_type,
};
use kvm_ops_uapi::system::vm_type::{SEV, SNP};
use kvm_ops_uapi::{Errno, U32, U64};

use crate::common::psp::INVALID_LEN;
use crate::guest::*;
use crate::hosts::{INVALID_ADDRESS, INVALID_GUEST_STATE, ask, bare, done};

const ASID_OWNED: u32 = 0xc;
/// Where the guests look for what was encrypted in pieces.
const PIECES: u64 = 0x3_0000;

fn range(address: u64, len: u32) -> SevRange {
    SevRange {
        uaddr: U64::new(address),
        len: U32::new(len),
        ..SevRange::default()
    }
}

/// Says the words at an address.
fn says_pieces(a: &mut CodeAssembler) -> Assembled {
    for word in 0..3 {
        a.mov(rbx, PIECES + word * 16)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.out(u32::from(SAY), eax)?;
    }
    Ok(())
}

/// A guest whose launch has begun, with its code encrypted.
fn launching() -> Guest {
    let guest = Guest::prepared(SEV, says_pieces);
    guest.w.launch(guest.vm, 0);
    guest
        .command(sev::LAUNCH_UPDATE_DATA, &range(guest.ram, PIECES as u32))
        .unwrap();
    guest
}

fn finish(guest: &Guest) {
    let room = range(guest.w.task.map(48), 48);
    guest.command(sev::LAUNCH_MEASURE, &room).unwrap();
    bare(guest, sev::LAUNCH_FINISH).unwrap();
}

#[test]
fn memory_is_encrypted_in_pieces_of_any_length_that_firmware_takes() {
    let guest = launching();
    let at = guest.ram + PIECES;
    for (piece, word) in [(0, 5_u32), (1, 6), (2, 7)] {
        guest.write(PIECES + piece * 16, &word.to_le_bytes());
    }
    // Over the end of a page, too: the page in front of it is encrypted once more.
    for (address, len) in [(at - 32, 48), (at + 16, 32)] {
        done(&guest, sev::LAUNCH_UPDATE_DATA, &range(address, len));
    }
    for piece in 0..3 {
        assert_ne!(
            guest.read::<16>(PIECES + piece * 16)[..4],
            [5 + piece as u8, 0, 0, 0]
        );
    }
    for (address, len, status) in [
        (at + 8, 16, INVALID_ADDRESS),
        (at, 24, INVALID_LEN),
        (at, 1, INVALID_LEN),
    ] {
        let (refused, _) = ask(&guest, sev::LAUNCH_UPDATE_DATA, &range(address, len));
        assert_eq!(refused, Err((Errno::EIO, status)), "{len}");
    }
    finish(&guest);
    assert_eq!([guest.says(), guest.says(), guest.says()], [5, 6, 7]);
}

#[test]
fn memory_that_is_encrypted_twice_is_taken_as_it_lies_there() {
    let guest = launching();
    let at = guest.ram + PIECES;
    let twice = |word: u32| {
        guest.write(PIECES, &word.to_le_bytes());
        done(&guest, sev::LAUNCH_UPDATE_DATA, &range(at, PAGE as u32));
    };
    twice(5);
    twice(9);
    finish(&guest);
    assert_eq!(guest.says(), 9);
}

#[test]
fn memory_without_a_slot_is_encrypted_and_in_pieces_too() {
    let guest = launching();
    let memory = guest.w.map(PAGE);
    let word = 0x55_u32.to_le_bytes();
    guest.w.write(memory + 32, &word).unwrap();
    done(&guest, sev::LAUNCH_UPDATE_DATA, &range(memory + 32, 16));
    let mut found = [0; 4];
    guest.w.read(memory + 32, &mut found).unwrap();
    assert_ne!(found, word);
}

#[test]
fn a_launch_that_begins_twice_is_firmwares_to_refuse_and_goes_on() {
    let guest = launching();
    let status = || done(&guest, sev::GUEST_STATUS, &SevGuestStatus::default());
    let first = status();
    let (refused, told) = ask(&guest, sev::LAUNCH_START, &SevLaunchStart::default());
    assert_eq!(refused, Err((Errno::EIO, ASID_OWNED)));
    assert_eq!(told.handle.get(), 0, "no handle is told");
    assert_eq!(status(), first);
    // One that shares the key takes the first one's place.
    let sharing = SevLaunchStart {
        handle: first.handle,
        ..SevLaunchStart::default()
    };
    let told = done(&guest, sev::LAUNCH_START, &sharing);
    assert_ne!(told.handle, first.handle);
    assert_eq!(status().handle, told.handle);
    finish(&guest);
    guest.try_run().unwrap();
}

#[test]
fn lengths_of_measurements_are_told_as_firmware_tells_them() {
    let guest = launching();
    let short = range(guest.w.task.map(48), 47);
    let refused = Err((Errno::EIO, INVALID_LEN));
    let (answer, told) = ask(&guest, sev::LAUNCH_MEASURE, &range(0, 0));
    assert_eq!((answer, told.len.get()), (refused, 48));
    let (answer, told) = ask(&guest, sev::LAUNCH_MEASURE, &short);
    assert_eq!((answer, told.len.get()), (refused, 47), "not a query");
    let (answer, told) = ask(&guest, sev::LAUNCH_MEASURE, &range(0, 48));
    assert_eq!((answer, told.len.get()), (refused, 48), "no buffer");
    let report = SevAttestation::default();
    let wrong_state = Err((Errno::EIO, INVALID_GUEST_STATE));
    let (answer, told) = ask(&guest, sev::GET_ATTESTATION_REPORT, &report);
    assert_eq!(
        (answer, told.len.get()),
        (wrong_state, 0),
        "not measured yet"
    );
    let long = range(guest.w.task.map(64), 64);
    assert_eq!(done(&guest, sev::LAUNCH_MEASURE, &long).len.get(), 48);
    let (answer, told) = ask(&guest, sev::LAUNCH_MEASURE, &range(0, 0));
    assert_eq!((answer, told.len.get()), (wrong_state, 0), "measured");
    let (answer, told) = ask(&guest, sev::GET_ATTESTATION_REPORT, &report);
    assert_eq!((answer, told.len.get()), (refused, 0xd0));
}

#[test]
fn a_page_after_the_end_of_an_snp_launch_is_firmwares_to_refuse() {
    let guest = Guest::new(SNP, terminate);
    guest.set_attributes(OPEN, PAGE, 8);
    let update = SnpLaunchUpdate {
        gfn_start: U64::new(OPEN / PAGE),
        uaddr: U64::new(guest.ram),
        len: U64::new(PAGE),
        kind: page_type::NORMAL,
        ..SnpLaunchUpdate::default()
    };
    let (answer, told) = ask(&guest, sev::SNP_LAUNCH_UPDATE, &update);
    assert_eq!(answer, Err((Errno::EIO, INVALID_GUEST_STATE)));
    assert_eq!(told, update, "nothing was done");
}
