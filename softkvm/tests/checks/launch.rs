//! `KVM_MEMORY_ENCRYPT_OP`, and the launch of SEV and SEV-ES guests.

use crate::common::World;
use crate::support::*;
use kvm_ops::Vendor;
use kvm_ops::sim::{SevSetup, SimHost};
use kvm_ops_softkvm::Kernel;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::ioctl;
use kvm_ops_uapi::sev::{self, *};
use kvm_ops_uapi::state::guest_debug;
use kvm_ops_uapi::{U16, U32, U64};
use soft_amd_sp::Platform;

/// A machine without SNP, whose ASIDs end with a number. Those below the lowest one of SEV are for SEV-ES.
fn with_asids(min_sev: u32, max: u32) -> World {
    let platform = Platform::builder().asids(min_sev, max).memory(64 << 20);
    let setup = SevSetup::new(platform).without_snp();
    let host = SimHost::builder(Vendor::Amd).sev(setup).build().unwrap();
    World::of(&Kernel::new(host))
}

pub(crate) const CASES: &[Case] = &[
    (encrypt_sev::ENABLED, |w| {
        w.bare(w.vcpu(w.vm(0), 0), sev::INIT)
    }),
    (encrypt_sev::COPY, |w| {
        unmapped(ioctl::KVM_MEMORY_ENCRYPT_OP, |w| w.vm(0), w)
    }),
    (encrypt_sev::MIRROR, |w| {
        let mirror = mirror_of(w, w.late_guest(false));
        (0..23)
            .filter(|id| !sev::MIRROR_COMMANDS.contains(id))
            .for_each(|id| {
                let answer = w.bare(mirror, id).map_err(|refusal| refusal.check());
                assert_eq!(answer, Err(Some(encrypt_sev::MIRROR)), "{id}");
            });
        w.bare(mirror, sev::SNP_LAUNCH_START)
    }),
    (encrypt_sev::SNP, |w| w.bare(w.guest(4), sev::GUEST_STATUS)),
    (encrypt_sev::KNOWN, |w| w.bare(w.vm(0), 14)),
    (encrypt_sev::COPY_BACK, |w| {
        let vm = w.vm(0);
        let cmd = SevCmd {
            id: U32::new(sev::INIT),
            ..SevCmd::default()
        };
        let refused = w.ioctl(vm, ioctl::KVM_MEMORY_ENCRYPT_OP, sealed(w, &cmd));
        let again = w.bare(vm, sev::INIT).map_err(|refusal| refusal.check());
        assert_eq!(again, Err(Some(init_any::ONCE)), "the command was done");
        refused
    }),
    (init::TYPE, |w| w.bare(w.vm(2), sev::INIT)),
    // All ASIDs are for guests without SEV-ES.
    (es_init::ENABLED, |_| {
        let w = with_asids(1, 8);
        w.bare(w.vm(0), sev::ES_INIT)
    }),
    (es_init::TYPE, |w| w.bare(w.vm(3), sev::ES_INIT)),
    (init2::ONCE, |w| {
        w.command(w.guest(2), sev::INIT2, &SevInit::default()).0
    }),
    (init2::TYPE, |w| init2_of(w, 0, |_| ())),
    (init2::TYPE, |w| init2_of(w, 1, |_| ())),
    (init2::COPY, |w| without_structure(w, w.vm(2), sev::INIT2)),
    (init_any::NO_VCPU, |w| {
        let vm = w.vm(0);
        w.vcpu(vm, 0);
        w.bare(vm, sev::ES_INIT)
    }),
    (init_any::FLAGS, |w| {
        init2_of(w, 2, |i| i.flags = U32::new(1))
    }),
    (init_any::FEATURES, |w| {
        init2_of(w, 2, |i| i.vmsa_features = U64::new(1 << 5))
    }),
    (init_any::FEATURES, |w| {
        init2_of(w, 3, |i| i.vmsa_features = U64::new(1))
    }),
    (init_any::FEATURES, |w| {
        init2_of(w, 4, |i| i.vmsa_features = U64::new(1 << 9))
    }),
    (init_any::GHCB, |w| {
        init2_of(w, 2, |i| i.ghcb_version = U16::new(1))
    }),
    (init_any::GHCB, |w| {
        init2_of(w, 3, |i| i.ghcb_version = U16::new(3))
    }),
    (init_any::SNP_GHCB, |w| {
        init2_of(w, 4, |i| i.ghcb_version = U16::new(1))
    }),
    (init_any::ONCE, |w| w.bare(w.late_guest(false), sev::INIT)),
    // All ASIDs are for guests with SEV-ES.
    (init_any::RANGE, |_| {
        let w = with_asids(9, 8);
        w.bare(w.vm(0), sev::INIT)
    }),
    (init_any::ASID, |_| {
        let w = with_asids(8, 8);
        let first = w.guest(2);
        let second = w.vm(2);
        let init = || w.command(second, sev::INIT2, &SevInit::default()).0;
        let refused = init();
        w.task.close(first)?;
        init().expect("the ASID is free");
        refused
    }),
    (init_any::MEMORY, |_| {
        let call = |w: &World, vm: &i32| w.bare(*vm, sev::INIT);
        short_of_memory(Vendor::Amd, init_any::MEMORY, |w| w.vm(0), call)
    }),
    (launch_start::SEV, |w| {
        w.command(w.vm(2), sev::LAUNCH_START, &SevLaunchStart::default())
            .0
    }),
    (launch_start::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_START)
    }),
    (launch_start::DH_LEN, |w| {
        start_with(w, (NOWHERE, 0), (0, 0))
    }),
    (launch_start::DH_LEN, |w| {
        start_with(w, (NOWHERE, 16385), (0, 0))
    }),
    (launch_start::DH, |w| {
        start_with(w, (NOWHERE, 16384), (0, 0))
    }),
    (launch_start::SESSION_LEN, |w| {
        start_with(w, (0, 9), (NOWHERE, 0))
    }),
    (launch_start::SESSION, |w| {
        start_with(w, (0, 9), (NOWHERE, 1))
    }),
    (launch_start::SEV_FD, |w| {
        let vm = w.guest(2);
        w.task.close(w.sev)?;
        w.command(vm, sev::LAUNCH_START, &SevLaunchStart::default())
            .0
    }),
    (launch_start::COPY_BACK, |w| {
        sealed_command(w, w.guest(2), sev::LAUNCH_START, &SevLaunchStart::default())
    }),
    (launch_update_data::SEV, |w| {
        w.command(w.vm(2), sev::LAUNCH_UPDATE_DATA, &range(1, 1)).0
    }),
    (launch_update_data::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_UPDATE_DATA)
    }),
    (launch_update_data::RANGE, |w| {
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(1, 0))
            .0
    }),
    (launch_update_data::RANGE, |w| {
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(!0, 2))
            .0
    }),
    (launch_update_data::PINNED, |w| {
        // The second page is not there.
        let page = w.task.map(4096);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page, 4097))
            .0
    }),
    (launch_update_data::PINNED, |w| {
        let page = w.task.map(4096);
        w.task.protect(page);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page, 4096))
            .0
    }),
    (launch_update_data::RANGE, |w| {
        w.task.limit_pins(of_memory(1));
        let page = w.task.map(8192);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page + 4095, 2))
            .0
    }),
    (launch_update_data::PINNED, |w| {
        w.task.limit_pins(locked(1));
        let page = w.task.map(8192);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page + 4095, 2))
            .0
    }),
    (launch_update_data::SEV_FD, |w| {
        let page = w.task.map(4096);
        w.command(w.guest(2), sev::LAUNCH_UPDATE_DATA, &range(page, 4096))
            .0
    }),
    (launch_update_vmsa::ES, |w| {
        w.bare(w.guest(2), sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_update_vmsa::SIGNAL, |w| {
        let vm = w.guest(3);
        interrupted(w, || w.bare(vm, sev::LAUNCH_UPDATE_VMSA))
    }),
    (launch_update_vmsa::PROTECTED, |w| {
        w.bare(w.measured(2), sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_update_vmsa::DEBUGGED, |w| {
        let vm = w.guest(3);
        debug(w, w.vcpu(vm, 0), guest_debug::ENABLE)?;
        w.bare(vm, sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_update_vmsa::DR7, |w| {
        let vm = w.guest(3);
        break_at(w, w.vcpu(vm, 0), 1)?;
        w.bare(vm, sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_update_vmsa::SEV_FD, |w| {
        let vm = w.guest(3);
        w.vcpu(vm, 0);
        w.bare(vm, sev::LAUNCH_UPDATE_VMSA)
    }),
    (launch_secret::SEV, |w| {
        w.command(w.vm(2), sev::LAUNCH_SECRET, &SevLaunchSecret::default())
            .0
    }),
    (launch_secret::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_SECRET)
    }),
    (launch_secret::RANGE, |w| {
        secret_with(w, |s| s.guest_len = U32::ZERO)
    }),
    (launch_secret::PINNED, |w| {
        secret_with(w, |s| s.guest = U64::new(NOWHERE))
    }),
    (launch_secret::RANGE, |w| {
        w.task.limit_pins(of_memory(0));
        secret_with(w, |_| ())
    }),
    (launch_secret::PINNED, |w| {
        w.task.limit_pins(locked(0));
        secret_with(w, |_| ())
    }),
    (launch_secret::TRANS_LEN, |w| {
        secret_with(w, |s| s.trans = U64::ZERO)
    }),
    (launch_secret::HDR_LEN, |w| {
        secret_with(w, |s| s.hdr = U64::ZERO)
    }),
    (launch_secret::TRANS_LEN, |w| {
        secret_with(w, |s| s.trans_len = U32::ZERO)
    }),
    (launch_secret::TRANS, |w| {
        secret_with(w, |s| s.trans = U64::new(NOWHERE))
    }),
    (launch_secret::HDR_LEN, |w| {
        secret_with(w, |s| s.hdr_len = U32::new(16385))
    }),
    (launch_secret::HDR, |w| {
        secret_with(w, |s| s.hdr = U64::new(NOWHERE))
    }),
    (launch_secret::SEV_FD, |w| secret_with(w, |_| ())),
    (launch_measure::SEV, |w| {
        w.command(w.vm(3), sev::LAUNCH_MEASURE, &range(0, 0)).0
    }),
    (launch_measure::COPY, |w| {
        without_structure(w, w.guest(2), sev::LAUNCH_MEASURE)
    }),
    (launch_measure::LEN, |w| {
        w.command(w.guest(2), sev::LAUNCH_MEASURE, &range(NOWHERE, 16385))
            .0
    }),
    (launch_measure::SEV_FD, |w| {
        w.command(w.guest(2), sev::LAUNCH_MEASURE, &range(0, 0)).0
    }),
    (launch_measure::BUFFER, |w| {
        let vm = w.guest(2);
        w.launch(vm, 0);
        w.command(vm, sev::LAUNCH_MEASURE, &range(NOWHERE, 48)).0
    }),
    // The query, and a measurement.
    (launch_measure::COPY_BACK, |w| {
        let vm = w.guest(2);
        w.launch(vm, 0);
        sealed_command(w, vm, sev::LAUNCH_MEASURE, &range(0, 0))
    }),
    (launch_measure::COPY_BACK, |w| {
        let vm = w.guest(2);
        w.launch(vm, 0);
        let room = range(w.task.map(48), 48);
        sealed_command(w, vm, sev::LAUNCH_MEASURE, &room)
    }),
    (launch_finish::SEV, |w| w.bare(w.vm(0), sev::LAUNCH_FINISH)),
    (launch_finish::SEV_FD, |w| {
        w.bare(sev_closed(w, w.guest(3), 4), sev::LAUNCH_FINISH)
    }),
    (guest_status::SEV, |w| w.bare(w.vm(0), sev::GUEST_STATUS)),
    (guest_status::SEV_FD, |w| {
        w.bare(w.guest(2), sev::GUEST_STATUS)
    }),
    (guest_status::COPY_BACK, |w| {
        let vm = w.guest(2);
        w.launch(vm, 0);
        without_structure(w, vm, sev::GUEST_STATUS)
    }),
    (dbg::SEV, |w| w.bare(w.vm(0), sev::DBG_ENCRYPT)),
    (dbg::COPY, |w| {
        without_structure(w, w.guest(2), sev::DBG_ENCRYPT)
    }),
    (dbg::GIVEN, |w| dbg_with(w, 0, 1, 1)),
    (dbg::GIVEN, |w| dbg_with(w, 1, 0, 1)),
    (dbg::GIVEN, |w| dbg_with(w, 1, 1, 0)),
    (dbg::WRAP, |w| dbg_with(w, !0, 1, 2)),
    (dbg::WRAP, |w| dbg_with(w, 1, !0, 2)),
    (dbg::PINNED, |w| dbg_with(w, NOWHERE, NOWHERE, 1)),
    (dbg::PINNED, |w| {
        w.task.limit_pins(locked(0));
        let page = w.task.map(4096);
        dbg_with(w, page, page, 1)
    }),
    (dbg::SEV_FD, |w| {
        let page = w.task.map(4096);
        dbg_with(w, page, page, 1)
    }),
];
