//! SEAMCALL: dispatch, and one file per family of leaves.

mod checks;
mod hugepage;
mod l2_entry;
mod mem;
mod mng;
mod mng_init;
mod mr;
mod phymem;
mod sys;
mod sys_config;
mod sys_info;
mod unset_root;
mod vp;
mod vp_enter;

use crate::leaf::HostLeaf;
use crate::migrate::{self, export, import};
use crate::platform::{Flow, Lp, LpState, Platform, Running, SysState};
use crate::regs::Regs;
use crate::servtd;
use crate::status::{Code, Operand, Status};
use crate::vcpu::Event;

pub(crate) use checks::{
    EntryGuard, TdRef, free_page, implicit_tdr, lock_target, private_operand, shared_operand,
    state_or, td_in_state, tdr, tdvpr, tree_gpa, walk_page,
};
pub(crate) use mem::{poison, take_operands as mem_operands};
pub(crate) use mng_init::{are_valid_attributes, is_valid_eptp_controls, is_valid_xfam};
pub(crate) use phymem::owner_of;
pub(crate) use vp::{associate, check_pages};

/// A successful TDH.VP.ENTER.
pub(crate) struct Entered {
    pub(crate) running: Running,
    pub(crate) guest: Regs,
    pub(crate) injected: Option<Event>,
    /// The VM that runs.
    pub(crate) vm: u8,
}

/// A call in execution.
pub(crate) struct Call<'p, 'r> {
    pub(crate) p: &'p Platform,
    pub(crate) lp: usize,
    pub(crate) this: &'p Lp,
    pub(crate) regs: &'r mut Regs,
    /// Leaf number: bits 15:0 of RAX.
    pub(crate) leaf: u16,
    pub(crate) version: u8,
    /// Set by TDH.VP.ENTER.
    pub(crate) entered: Option<Entered>,
}

/// Outcome of a leaf; the error side also carries the few statuses without error flag.
pub(crate) type Leaf<T = ()> = Result<T, Status>;

const RESERVED_RAX: u64 = 0xFFFF_FFFF_FF00_0000;

/// Executes a SEAMCALL on a processor that is outside any TD.
pub(crate) fn dispatch(
    p: &Platform,
    lp: usize,
    this: &Lp,
    state: &mut LpState,
    regs: &mut Regs,
) -> Flow {
    let rax = regs.rax;
    let input = p.observer.is_tracing().then_some(*regs);
    let mut call = Call {
        p,
        lp,
        this,
        regs,
        leaf: rax as u16,
        version: (rax >> 16) as u8,
        entered: None,
    };
    let result = call.run();
    if let Some(entered) = call.entered {
        state.running = Some(entered.running);
        p.observer.record(lp, rax, input, None);
        return Flow::Entered {
            guest: entered.guest,
            injected: entered.injected,
            vm: entered.vm,
        };
    }
    let status = result.err().unwrap_or(Status::SUCCESS);
    // An entry that zero-step filtering turns into a TD exit sets RAX itself.
    if !(status == Status::SUCCESS && rax & 0xFFFF == 0) {
        regs.rax = status.0;
    }
    let status = Status(regs.rax);
    p.observer.record(lp, rax, input, Some(regs));
    Flow::Returned(status)
}

impl Call<'_, '_> {
    fn run(&mut self) -> Leaf {
        let rax = self.regs.rax;
        let number = self.leaf;
        let bad_rax = Code::OPERAND_INVALID.on(Operand::RAX);
        if rax & RESERVED_RAX != 0 || self.version != 0 && !HostLeaf::is_versioned(number) {
            return Err(bad_rax);
        }
        let leaf = HostLeaf::from_number(number);
        let state = self.p.sys_state();
        if state == SysState::Shutdown && leaf != Some(HostLeaf::SysLpShutdown) {
            return Err(Code::SYS_SHUTDOWN.status());
        }
        if state < SysState::Ready && !HostLeaf::is_allowed_before_ready(number) {
            // TDH.SYS.TDMR.INIT comes after the module is ready, so it is not an exception.
            return Err(Code::SYS_NOT_READY.status());
        }
        let leaf = leaf.ok_or(bad_rax)?;
        let machine = &self.p.machine;
        let transient = || machine.transient(self.lp, &self.this.transient_calls, leaf);
        if let Some(status) = machine.forced(leaf).or_else(transient) {
            return Err(status);
        }
        match leaf {
            HostLeaf::VpEnter => vp_enter::enter(self),
            HostLeaf::MngAddcx => mng::addcx(self),
            HostLeaf::MemPageAdd => mem::page_add(self),
            HostLeaf::MemSeptAdd => mem::sept_add(self),
            HostLeaf::VpAddcx => vp::addcx(self),
            HostLeaf::MemPageRelocate => mem::page_relocate(self),
            HostLeaf::MemPageAug => mem::page_aug(self),
            HostLeaf::MemRangeBlock => mem::range_block(self),
            HostLeaf::MngKeyConfig => mng::key_config(self),
            HostLeaf::MngCreate => mng::create(self),
            HostLeaf::VpCreate => vp::create(self),
            HostLeaf::MngRd => mng::rd(self),
            HostLeaf::MemRd => mem::rd_wr(self, false),
            HostLeaf::MngWr => mng::wr(self),
            HostLeaf::MemWr => mem::rd_wr(self, true),
            HostLeaf::MemPageDemote => hugepage::demote(self),
            HostLeaf::MrExtend => mr::extend(self),
            HostLeaf::MrFinalize => mr::finalize(self),
            HostLeaf::VpFlush => vp::flush(self),
            HostLeaf::MngVpflushdone => mng::vpflushdone(self),
            HostLeaf::MngKeyFreeid => mng::key_freeid(self),
            HostLeaf::MngInit => mng_init::init(self),
            HostLeaf::VpInit => vp::init(self),
            HostLeaf::MemPagePromote => hugepage::promote(self),
            HostLeaf::PhymemPageRdmd => phymem::page_rdmd(self),
            HostLeaf::MemSeptRd => mem::sept_rd(self),
            HostLeaf::VpRd => vp::rd(self),
            HostLeaf::PhymemPageReclaim => phymem::page_reclaim(self),
            HostLeaf::MemPageRemove => mem::page_remove(self),
            HostLeaf::MemSeptRemove => mem::sept_remove(self),
            HostLeaf::SysKeyConfig => sys::key_config(self),
            HostLeaf::SysInfo => sys_info::info(self),
            HostLeaf::SysInit => sys::init(self),
            HostLeaf::SysRd => sys_info::rd(self),
            HostLeaf::SysLpInit => sys::lp_init(self),
            HostLeaf::SysTdmrInit => sys_config::tdmr_init(self),
            HostLeaf::SysRdall => sys_info::rdall(self),
            HostLeaf::MemTrack => mem::track(self),
            HostLeaf::MemRangeUnblock => mem::range_unblock(self),
            HostLeaf::PhymemCacheWb => phymem::cache_wb(self),
            HostLeaf::PhymemPageWbinvd => phymem::page_wbinvd(self),
            HostLeaf::VpWr => vp::wr(self),
            HostLeaf::SysConfig => sys_config::config(self),
            HostLeaf::SysShutdown => sys::shutdown(self),
            HostLeaf::SysUpdate => sys::update(self),
            HostLeaf::ServtdBind => servtd::bind(self),
            HostLeaf::ServtdPrebind => servtd::prebind(self),
            HostLeaf::ExportAbort => export::abort(self),
            HostLeaf::ExportBlockw => export::blockw(self),
            HostLeaf::ExportRestore => export::restore(self),
            HostLeaf::ExportMem => export::mem(self),
            HostLeaf::ExportPause => export::pause(self),
            HostLeaf::ExportTrack => export::track(self),
            HostLeaf::ExportStateImmutable => export::immutable(self),
            HostLeaf::ExportStateTd => export::td(self),
            HostLeaf::ExportStateVp => export::vp(self),
            HostLeaf::ExportUnblockw => export::unblockw(self),
            HostLeaf::ImportAbort => import::abort(self),
            HostLeaf::ImportEnd => import::end(self),
            HostLeaf::ImportCommit => import::commit(self),
            HostLeaf::ImportMem => import::mem(self),
            HostLeaf::ImportTrack => import::track(self),
            HostLeaf::ImportStateImmutable => import::immutable(self),
            HostLeaf::ImportStateTd => import::td(self),
            HostLeaf::ImportStateVp => import::vp(self),
            HostLeaf::MigStreamCreate => migrate::stream_create(self),
            HostLeaf::SysLpShutdown | HostLeaf::MngKeyReclaimid => Ok(()),
        }
    }

    /// Rejects versions above `max` of a versioned leaf.
    fn max_version(&self, max: u8) -> Leaf {
        if self.version > max {
            Err(Code::OPERAND_INVALID.on(Operand::RAX))
        } else {
            Ok(())
        }
    }

    fn check_tsc_adjust(&self) -> Leaf {
        use std::sync::atomic::Ordering::Acquire;
        const IA32_TSC_ADJUST: u32 = 0x3B;
        let p = self.p;
        if p.machine.tsc_adjust.load(Acquire) == p.boot_tsc_adjust.load(Acquire) {
            Ok(())
        } else {
            Err(Code::INCONSISTENT_MSR.detail(IA32_TSC_ADJUST))
        }
    }

    pub(crate) fn check_cpuid_limit(&self) -> Leaf {
        match self
            .p
            .machine
            .limit_cpuid_maxval
            .load(std::sync::atomic::Ordering::Acquire)
        {
            true => Err(Code::LIMIT_CPUID_MAXVAL_SET.status()),
            false => Ok(()),
        }
    }
}

pub(crate) fn invalid(op: Operand) -> Status {
    Code::OPERAND_INVALID.on(op)
}

pub(crate) fn busy(op: Operand) -> Status {
    Code::OPERAND_BUSY.on(op)
}
