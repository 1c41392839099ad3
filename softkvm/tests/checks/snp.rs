//! The launch of SNP guests.

use crate::common::{file_slot, snp_policy};
use crate::support::*;
use kvm_ops_uapi::checks::*;
use kvm_ops_uapi::sev::{self, *};
use kvm_ops_uapi::state::guest_debug;
use kvm_ops_uapi::{U16, U64, ioctl};

pub(crate) const CASES: &[Case] = &[
    (snp_launch_start::SNP, |w| {
        w.command(w.guest(3), 100, &snp_policy(0x3_0000)).0
    }),
    (snp_launch_start::COPY, |w| {
        without_structure(w, w.guest(4), 100)
    }),
    (snp_launch_start::ONCE, |w| {
        w.command(started_snp(w), 100, &snp_policy(0x3_0000)).0
    }),
    (snp_launch_start::FLAGS, |w| {
        let args = SnpLaunchStart {
            flags: U16::new(1),
            ..snp_policy(0x3_0000)
        };
        w.command(w.guest(4), 100, &args).0
    }),
    (snp_launch_start::POLICY, |w| {
        w.command(w.guest(4), 100, &snp_policy(1 << 18)).0
    }),
    (snp_launch_start::RESERVED, |w| {
        w.command(w.guest(4), 100, &snp_policy(1 << 16)).0
    }),
    (snp_launch_start::SEV_FD, |w| {
        let vm = w.guest(4);
        w.task.close(w.sev)?;
        w.command(vm, 100, &snp_policy(0x3_0000)).0
    }),
    (snp_launch_update::SNP, |w| w.bare(w.guest(4), 101)),
    (snp_launch_update::COPY, |w| {
        without_structure(w, started_snp(w), 101)
    }),
    (snp_launch_update::LEN, |w| {
        update_with(w, |u| u.len = U64::ZERO)
    }),
    (snp_launch_update::LEN, |w| {
        update_with(w, |u| u.len = U64::new(4097))
    }),
    (snp_launch_update::FLAGS, |w| {
        update_with(w, |u| u.flags = U16::new(1))
    }),
    (snp_launch_update::TYPE, |w| update_with(w, |u| u.kind = 2)),
    (snp_launch_update::TYPE, |w| update_with(w, |u| u.kind = 7)),
    (snp_launch_update::SOURCE, |w| {
        update_with(w, |u| u.uaddr = U64::ZERO)
    }),
    (snp_launch_update::SOURCE, |w| {
        update_with(w, |u| u.uaddr = U64::new(0x1001))
    }),
    (snp_launch_update::SLOT, |w| {
        update_with(w, |u| u.gfn_start = U64::ZERO)
    }),
    (snp_launch_update::SLOT, |w| {
        update_with(w, |u| u.gfn_start = U64::new(!0))
    }),
    (snp_launch_update::COPY_BACK, |w| {
        let vm = started_snp(w);
        let gmem = w.gmem(vm, 0x20_0000);
        w.region(vm, &file_slot(gmem))?;
        let private = attributes_args(0x10_0000, 4096, 8, 0);
        w.call(vm, ioctl::KVM_SET_MEMORY_ATTRIBUTES, &private)?;
        let args = SnpLaunchUpdate {
            gfn_start: U64::new(0x100),
            uaddr: U64::new(w.task.map(4096)),
            len: U64::new(4096),
            kind: page_type::NORMAL,
            ..SnpLaunchUpdate::default()
        };
        let refused = sealed_command(w, vm, sev::SNP_LAUNCH_UPDATE, &args);
        let again = w.command(vm, sev::SNP_LAUNCH_UPDATE, &args).0;
        let again = again.map_err(|refusal| refusal.check());
        assert_eq!(
            again,
            Err(Some(snp_launch_update::FIRST_PAGE)),
            "the page was added"
        );
        refused
    }),
    // The attribute of the page is not private.
    (snp_launch_update::FIRST_PAGE, |w| update_with(w, |_| ())),
    (snp_launch_finish::SNP, |w| w.bare(w.guest(2), 102)),
    (snp_launch_finish::STARTED, |w| w.bare(w.guest(4), 102)),
    (snp_launch_finish::COPY, |w| {
        without_structure(w, started_snp(w), 102)
    }),
    (snp_launch_finish::FLAGS, |w| {
        let args = SnpLaunchFinish {
            flags: U16::new(1),
            ..SnpLaunchFinish::default()
        };
        w.command(started_snp(w), 102, &args).0
    }),
    (snp_launch_finish::SIGNAL, |w| {
        let vm = started_snp(w);
        interrupted(w, || w.command(vm, 102, &SnpLaunchFinish::default()).0)
    }),
    (snp_launch_finish::PROTECTED, |w| {
        let vm = w.guest(4);
        w.vcpu(vm, 0);
        w.launch_snp(vm);
        w.command(vm, 102, &SnpLaunchFinish::default()).0?;
        w.command(vm, 102, &SnpLaunchFinish::default()).0
    }),
    (snp_launch_finish::DEBUGGED, |w| {
        let vm = started_snp(w);
        debug(w, w.vcpu(vm, 0), guest_debug::ENABLE)?;
        w.command(vm, 102, &SnpLaunchFinish::default()).0
    }),
    (snp_launch_finish::DR7, |w| {
        let vm = started_snp(w);
        break_at(w, w.vcpu(vm, 0), 1)?;
        w.command(vm, 102, &SnpLaunchFinish::default()).0
    }),
    (snp_launch_finish::ID_BLOCK, |w| {
        let args = SnpLaunchFinish {
            id_block_en: 1,
            ..SnpLaunchFinish::default()
        };
        w.command(started_snp(w), 102, &args).0
    }),
    (snp_launch_finish::SEV_FD, |w| {
        let vm = started_snp(w);
        w.task.close(w.sev)?;
        w.command(vm, 102, &SnpLaunchFinish::default()).0
    }),
    (snp_enable_req_certs::NO_VCPU, |w| {
        let vm = w.guest(4);
        w.vcpu(vm, 0);
        w.bare(vm, sev::SNP_ENABLE_REQ_CERTS)
    }),
    (snp_enable_req_certs::SNP, |w| {
        w.bare(w.guest(3), sev::SNP_ENABLE_REQ_CERTS)
    }),
];
