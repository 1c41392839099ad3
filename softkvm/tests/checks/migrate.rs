//! SEND_*, RECEIVE_*, LOCAL_SEND and LOCAL_RECEIVE.

use crate::common::psp::certificates;
use crate::common::{Answer, World, slot};
use crate::support::*;
use kvm_ops::Vendor;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::memory::UserspaceMemoryRegion2;
use kvm_ops_uapi::sev::{self, *};
use kvm_ops_uapi::{U32, U64};

/// The target's certificates, and room for a session. No firmware looks at the last chain: the policy does not ask
/// for a genuine platform.
fn target(w: &World) -> SevSendStart {
    let (pdh, chain) = certificates(w);
    let (pdh_cert, pdh_cert_len) = w.blob(&pdh);
    let (plat_certs, plat_certs_len) = w.blob(&chain);
    let (amd_certs, amd_certs_len) = w.blob(&[0; 16]);
    SevSendStart {
        pdh_cert,
        pdh_cert_len,
        plat_certs,
        plat_certs_len,
        amd_certs,
        amd_certs_len,
        session: U64::new(w.task.map(512)),
        session_len: U32::new(512),
        ..SevSendStart::default()
    }
}

/// What a source gave, for RECEIVE_START.
fn sent(w: &World) -> SevReceiveStart {
    let args = target(w);
    let (sent, told) = w.command(w.running(0), sev::SEND_START, &args);
    sent.expect("a source");
    SevReceiveStart {
        pdh: args.pdh_cert,
        pdh_len: args.pdh_cert_len,
        session: args.session,
        session_len: told.session_len,
        ..SevReceiveStart::default()
    }
}

fn send_to(w: &World, vm: i32, change: impl FnOnce(&mut SevSendStart)) -> Answer {
    let mut args = target(w);
    change(&mut args);
    w.command(vm, sev::SEND_START, &args).0
}

fn send_with(w: &World, change: impl FnOnce(&mut SevSendStart)) -> Answer {
    send_to(w, w.guest(2), change)
}

/// A page of the process for each of three addresses.
fn update(w: &World) -> SevUpdateData {
    let page = || U64::new(w.task.map(4096));
    SevUpdateData {
        hdr: page(),
        hdr_len: U32::new(64),
        guest: page(),
        guest_len: U32::new(4096),
        trans: page(),
        trans_len: U32::new(4096),
        ..SevUpdateData::default()
    }
}

fn update_with(w: &World, id: u32, change: impl FnOnce(&mut SevUpdateData)) -> Answer {
    let mut args = update(w);
    change(&mut args);
    w.command(w.guest(2), id, &args).0
}

fn pack(w: &World, change: impl FnOnce(&mut SevUpdateData)) -> Answer {
    update_with(w, sev::SEND_UPDATE_DATA, change)
}

fn unpack(w: &World, change: impl FnOnce(&mut SevUpdateData)) -> Answer {
    update_with(w, sev::RECEIVE_UPDATE_DATA, change)
}

/// A guest that is being sent, with memory.
fn sending(w: &World) -> (i32, u64) {
    let vm = w.running(0);
    let ram = w.map(0x1000);
    let region = UserspaceMemoryRegion2 {
        memory_size: U64::new(0x1000),
        userspace_addr: U64::new(ram),
        ..slot()
    };
    w.region(vm, &region).unwrap();
    send_to(w, vm, |_| ()).unwrap();
    (vm, ram)
}

/// A packet of that memory, to a place that is not there.
fn pack_into(w: &World, change: impl FnOnce(&mut SevUpdateData)) -> Answer {
    let (vm, ram) = sending(w);
    let mut args = SevUpdateData {
        guest: U64::new(ram),
        ..update(w)
    };
    change(&mut args);
    w.command(vm, sev::SEND_UPDATE_DATA, &args).0
}

fn receive_with(w: &World, change: impl FnOnce(&mut SevReceiveStart)) -> Answer {
    let (pdh, pdh_len) = w.blob(&[0; 16]);
    let (session, session_len) = w.blob(&[0; 16]);
    let mut args = SevReceiveStart {
        pdh,
        pdh_len,
        session,
        session_len,
        ..SevReceiveStart::default()
    };
    change(&mut args);
    w.command(w.guest(2), sev::RECEIVE_START, &args).0
}

/// The token of a guest that is staged.
fn staged(w: &World, vm: i32) -> [u8; 16] {
    let (answer, told) = w.command(vm, sev::LOCAL_SEND, &SevLocalSend::default());
    answer.unwrap();
    told.token
}

fn take(w: &World, vm: i32, token: [u8; 16]) -> Answer {
    let args = SevLocalReceive {
        token,
        ..SevLocalReceive::default()
    };
    w.command(vm, sev::LOCAL_RECEIVE, &args).0
}

pub(crate) const CASES: &[Case] = &[
    (send_start::SEV, |w| w.bare(w.vm(2), sev::SEND_START)),
    (send_start::COPY, |w| {
        without_structure(w, w.guest(2), sev::SEND_START)
    }),
    (send_start::GIVEN, |w| {
        send_with(w, |s| s.pdh_cert = U64::ZERO)
    }),
    (send_start::GIVEN, |w| {
        send_with(w, |s| s.pdh_cert_len = U32::ZERO)
    }),
    (send_start::GIVEN, |w| {
        send_with(w, |s| s.session = U64::ZERO)
    }),
    (send_start::GIVEN, |w| {
        send_with(w, |s| s.session_len = U32::new(16385))
    }),
    (send_start::BLOBS, |w| {
        send_with(w, |s| s.pdh_cert_len = U32::new(16385))
    }),
    (send_start::BLOBS, |w| {
        send_with(w, |s| s.plat_certs_len = U32::ZERO)
    }),
    (send_start::BLOBS, |w| {
        send_with(w, |s| s.amd_certs_len = U32::ZERO)
    }),
    (send_start::BLOBS, |w| {
        send_with(w, |s| s.amd_certs = U64::ZERO)
    }),
    (send_start::READABLE, |w| {
        send_with(w, |s| s.pdh_cert = U64::new(NOWHERE))
    }),
    (send_start::READABLE, |w| {
        send_with(w, |s| s.plat_certs = U64::new(NOWHERE))
    }),
    (send_start::READABLE, |w| {
        send_with(w, |s| s.amd_certs = U64::new(NOWHERE))
    }),
    (send_start::SEV_FD, |w| send_with(w, |_| ())),
    (send_start::SEV_FD, |w| {
        send_with(w, |s| s.session_len = U32::ZERO)
    }),
    (send_start::SESSION, |w| {
        send_to(w, w.running(0), |s| s.session = U64::new(NOWHERE))
    }),
    (send_start::COPY_BACK, |w| {
        let vm = w.running(0);
        sealed_command(w, vm, sev::SEND_START, &target(w))
    }),
    (send_update_data::SEV, |w| {
        w.bare(w.vm(2), sev::SEND_UPDATE_DATA)
    }),
    (send_update_data::COPY, |w| {
        without_structure(w, w.guest(2), sev::SEND_UPDATE_DATA)
    }),
    (send_update_data::GIVEN, |w| pack(w, |u| u.hdr = U64::ZERO)),
    (send_update_data::GIVEN, |w| {
        pack(w, |u| u.guest = U64::ZERO)
    }),
    (send_update_data::GIVEN, |w| {
        pack(w, |u| u.guest_len = U32::ZERO)
    }),
    (send_update_data::GIVEN, |w| {
        pack(w, |u| u.trans = U64::ZERO)
    }),
    (send_update_data::PAGE, |w| {
        pack(w, |u| u.guest = U64::new(u.guest.get() + 16))
    }),
    (send_update_data::PAGE, |w| {
        pack(w, |u| u.guest_len = U32::new(!0))
    }),
    (send_update_data::PINNED, |w| {
        pack(w, |u| {
            (u.guest, u.guest_len) = (U64::new(NOWHERE), U32::new(16))
        })
    }),
    (send_update_data::PINNED, |w| {
        w.task.limit_pins(locked(0));
        pack(w, |_| ())
    }),
    (send_update_data::MEMORY, |w| {
        pack(w, |u| u.hdr_len = U32::new((4 << 20) + 1))
    }),
    (send_update_data::MEMORY, |w| {
        pack(w, |u| u.trans_len = U32::new(!0))
    }),
    (send_update_data::MEMORY, |_| {
        short_of_memory(
            Vendor::Amd,
            send_update_data::MEMORY,
            sending,
            |w, &(vm, ram)| {
                let args = SevUpdateData {
                    guest: U64::new(ram),
                    ..update(w)
                };
                w.command(vm, sev::SEND_UPDATE_DATA, &args).0
            },
        )
    }),
    (send_update_data::SEV_FD, |w| pack(w, |_| ())),
    (send_update_data::SEV_FD, |w| {
        pack(w, |u| u.hdr_len = U32::ZERO)
    }),
    (send_update_data::BUFFERS, |w| {
        pack_into(w, |u| u.trans = U64::new(NOWHERE))
    }),
    (send_update_data::BUFFERS, |w| {
        pack_into(w, |u| u.hdr = U64::new(NOWHERE))
    }),
    (send_end::SEV, |w| w.bare(w.vm(3), sev::SEND_FINISH)),
    (send_end::SEV, |w| w.bare(w.vm(3), sev::SEND_CANCEL)),
    (send_end::SEV_FD, |w| w.bare(w.guest(2), sev::SEND_FINISH)),
    (send_end::SEV_FD, |w| w.bare(w.guest(2), sev::SEND_CANCEL)),
    (receive_start::SEV, |w| w.bare(w.vm(2), sev::RECEIVE_START)),
    (receive_start::COPY, |w| {
        without_structure(w, w.guest(2), sev::RECEIVE_START)
    }),
    (receive_start::GIVEN, |w| {
        receive_with(w, |r| r.pdh = U64::ZERO)
    }),
    (receive_start::GIVEN, |w| {
        receive_with(w, |r| r.pdh_len = U32::ZERO)
    }),
    (receive_start::GIVEN, |w| {
        receive_with(w, |r| r.session = U64::ZERO)
    }),
    (receive_start::GIVEN, |w| {
        receive_with(w, |r| r.session_len = U32::ZERO)
    }),
    (receive_start::BLOBS, |w| {
        receive_with(w, |r| r.pdh_len = U32::new(16385))
    }),
    (receive_start::BLOBS, |w| {
        receive_with(w, |r| r.session_len = U32::new(!0))
    }),
    (receive_start::READABLE, |w| {
        receive_with(w, |r| r.pdh = U64::new(NOWHERE))
    }),
    (receive_start::READABLE, |w| {
        receive_with(w, |r| r.session = U64::new(NOWHERE))
    }),
    (receive_start::SEV_FD, |w| {
        w.task.close(w.sev)?;
        receive_with(w, |_| ())
    }),
    (receive_start::COPY_BACK, |w| {
        sealed_command(w, w.guest(2), sev::RECEIVE_START, &sent(w))
    }),
    (receive_update_data::SEV, |w| {
        w.bare(w.vm(2), sev::RECEIVE_UPDATE_DATA)
    }),
    (receive_update_data::COPY, |w| {
        without_structure(w, w.guest(2), sev::RECEIVE_UPDATE_DATA)
    }),
    (receive_update_data::GIVEN, |w| {
        unpack(w, |u| u.hdr_len = U32::ZERO)
    }),
    (receive_update_data::GIVEN, |w| {
        unpack(w, |u| u.trans_len = U32::ZERO)
    }),
    (receive_update_data::GIVEN, |w| {
        unpack(w, |u| u.guest_len = U32::ZERO)
    }),
    (receive_update_data::GIVEN, |w| {
        unpack(w, |u| u.hdr = U64::ZERO)
    }),
    (receive_update_data::GIVEN, |w| {
        unpack(w, |u| u.trans = U64::ZERO)
    }),
    (receive_update_data::GIVEN, |w| {
        unpack(w, |u| u.guest = U64::ZERO)
    }),
    (receive_update_data::PAGE, |w| {
        unpack(w, |u| u.guest = U64::new(u.guest.get() + 16))
    }),
    (receive_update_data::BLOBS, |w| {
        unpack(w, |u| u.hdr_len = U32::new(16385))
    }),
    (receive_update_data::BLOBS, |w| {
        unpack(w, |u| u.trans_len = U32::new(16385))
    }),
    (receive_update_data::READABLE, |w| {
        unpack(w, |u| u.hdr = U64::new(NOWHERE))
    }),
    (receive_update_data::READABLE, |w| {
        unpack(w, |u| u.trans = U64::new(NOWHERE))
    }),
    (receive_update_data::PINNED, |w| {
        unpack(w, |u| {
            (u.guest, u.guest_len) = (U64::new(NOWHERE), U32::new(16))
        })
    }),
    (receive_update_data::PINNED, |w| {
        w.task.limit_pins(locked(0));
        unpack(w, |_| ())
    }),
    (receive_update_data::SEV_FD, |w| unpack(w, |_| ())),
    (receive_finish::SEV, |w| {
        w.bare(w.vm(0), sev::RECEIVE_FINISH)
    }),
    (receive_finish::SEV_FD, |w| {
        w.bare(w.guest(2), sev::RECEIVE_FINISH)
    }),
    (local_send::SEV, |w| w.bare(w.vm(2), sev::LOCAL_SEND)),
    (local_send::SEV, |w| w.bare(started_snp(w), sev::LOCAL_SEND)),
    (local_send::LAUNCHED, |w| {
        w.bare(w.guest(2), sev::LOCAL_SEND)
    }),
    (local_send::COPY_BACK, |w| {
        without_structure(w, w.running(0), sev::LOCAL_SEND)
    }),
    (local_send::STAGED, |w| {
        let vm = w.running(0);
        staged(w, vm);
        for id in (0..23).filter(|id| ![sev::DBG_DECRYPT, sev::DBG_ENCRYPT].contains(id)) {
            let answer = w.bare(vm, id).map_err(|refusal| refusal.check());
            assert_eq!(answer, Err(Some(local_send::STAGED)), "{id}");
        }
        w.bare(vm, sev::LOCAL_SEND)
    }),
    (local_receive::SEV, |w| take(w, w.vm(2), [1; 16])),
    (local_receive::SEV, |w| take(w, w.guest(4), [1; 16])),
    (local_receive::FRESH, |w| take(w, w.running(0), [1; 16])),
    (local_receive::COPY, |w| {
        without_structure(w, w.guest(2), sev::LOCAL_RECEIVE)
    }),
    (local_receive::TOKEN, |w| take(w, w.guest(2), [1; 16])),
    (local_receive::TOKEN, |w| {
        let token = staged(w, w.running(0));
        take(w, w.guest(2), token).unwrap();
        take(w, w.guest(2), token)
    }),
    (local_receive::TOKEN, |w| {
        let vm = w.running(0);
        let token = staged(w, vm);
        w.task.close(vm)?;
        take(w, w.guest(2), token)
    }),
    (local_receive::FITS, |w| {
        let token = staged(w, w.running(0));
        take(w, w.guest(3), token)
    }),
    (local_receive::FITS, |w| {
        let token = staged(w, w.measured(1));
        take(w, w.guest(3), token)
    }),
    (local_receive::COPY_BACK, |w| {
        let token = staged(w, w.running(0));
        let args = SevLocalReceive {
            token,
            ..SevLocalReceive::default()
        };
        let vm = w.guest(2);
        let refused = sealed_command(w, vm, sev::LOCAL_RECEIVE, &args);
        take(w, vm, token).expect("the token is still good");
        refused
    }),
];

/// Linux: `sev_unbind_asid`.
#[test]
fn a_guest_whose_handle_cannot_be_told_is_ended_and_can_be_started_again() {
    for (kind, policy) in [(2, 0), (3, 4)] {
        let w = World::amd();
        let vm = w.guest(kind);
        let start = SevLaunchStart {
            policy: U32::new(policy),
            ..SevLaunchStart::default()
        };
        let refused = sealed_command(&w, vm, sev::LAUNCH_START, &start).unwrap_err();
        assert_eq!(refused.check(), Some(launch_start::COPY_BACK));
        let (status, _) = w.command(vm, sev::GUEST_STATUS, &SevGuestStatus::default());
        assert_eq!(status.unwrap_err().check(), Some(guest_status::SEV_FD));
        w.command(vm, sev::LAUNCH_START, &start).0.expect("again");
    }
    let w = World::amd();
    let (vm, start) = (w.guest(2), sent(&w));
    let refused = sealed_command(&w, vm, sev::RECEIVE_START, &start).unwrap_err();
    assert_eq!(refused.check(), Some(receive_start::COPY_BACK));
    w.command(vm, sev::RECEIVE_START, &start).0.expect("again");
}
